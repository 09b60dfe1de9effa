"""The reader: everything that is needed to load a delta repository, and nothing more.

These files travel inside every pushed repository, so they import only torch, numpy, safetensors, transformers and
huggingface_hub, and each other by relative imports.
"""
