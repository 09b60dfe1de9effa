"""The values that pruning settings can have, kept apart so that the command line lists them without importing torch."""

SCORES = ("igia", "gradient_norm")
PARTS = ("attention", "mlp")
