"""Checkpoints of a training as exact deltas: a callback for transformers' Trainer and those derived from it."""
