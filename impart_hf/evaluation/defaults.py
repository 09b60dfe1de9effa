"""Defaults of the evaluation, in a file of their own so that the command line can import them without torch."""

PROMPT_TOKENS = 512
NEW_TOKENS = 64
