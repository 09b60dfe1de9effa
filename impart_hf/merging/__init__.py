"""Merging fine-tunes of one base: task arithmetic and TIES, optionally after sparsifying with DARE or ImPart."""
