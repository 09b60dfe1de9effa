"""Adapters in the place of fine-tunes: base and adapter as one model, tensor by tensor."""
