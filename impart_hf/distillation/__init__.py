"""Distillation: the numbers that records store anyway, trained until the model answers as the fine-tune does.

BitDelta (arXiv 2402.10193, sec. 3.1) trains one scale for each matrix; here the singular values of factored records are
trained as well, and then the stored values themselves, with gradients that go straight through the rounding. Masks,
bits and levels stay: the file does not grow by a byte. BitDelta's loss is the mean squared error of the logits; ours is
KL(fine-tune || compressed), by which a compressed model is judged in the end.
"""

from .settings import TRAINED, DistillReport, DistillSettings

__all__ = ["TRAINED", "DistillReport", "DistillSettings"]
