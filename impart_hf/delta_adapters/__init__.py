"""Deltas that stay beside a base in memory and are chosen for each call, or for each row of a batch."""
