"""The reader: everything that loading a delta repository needs, and nothing more.

Every published repository holds a copy of these files, so they import only torch, numpy, safetensors, transformers and
huggingface_hub, and each other by relative imports.
"""
