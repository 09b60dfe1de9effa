"""Merging fine-tunes of one base: task arithmetic and TIES, with DARE or ImPart before them."""
