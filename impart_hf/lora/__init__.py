"""Export of a delta as a LoRA adapter in PEFT's format."""
