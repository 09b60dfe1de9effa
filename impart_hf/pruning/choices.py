"""The values that settings of pruning can have; the command line lists them without importing torch."""

SCORES = ("igia", "gradient_norm")
PARTS = ("attention", "mlp")
