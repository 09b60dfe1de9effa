"""Numbers that the evaluation takes unless others are given; the command line states them without importing torch."""

PROMPT_TOKENS = 512
NEW_TOKENS = 64
