"""Distillation: training the numbers in finished records towards the fine-tune's output.

BitDelta (arXiv 2402.10193, sec. 3.1) trains one scale for each matrix. Here the singular values of factored records are
trained as well, and then the stored values themselves, with straight-through gradients for the rounding. Masks, widths
and levels stay the same: the file does not grow by a byte. BitDelta's loss is the mean squared error of the logits;
here it is KL(fine-tune || compressed), the measure by which compressed models are evaluated.
"""

from .settings import OPTIMIZERS, TRAINED, DistillReport, DistillSettings

__all__ = ["OPTIMIZERS", "TRAINED", "DistillReport", "DistillSettings"]
