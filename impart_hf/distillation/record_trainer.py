"""What both ways of distilling do with the records of some tensors, whatever outputs of the models they compare."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainingArguments

from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint
from .settings import DistillSettings
from .student import attach, exact_delta, packed
from .text import split
from .trained_delta import TrainedDelta
from .trainer import TrainableDeltas, mean_loss, train


@dataclass(frozen=True)
class Outcome:
    """What came of training.

    Attributes:
        records: that are better now: all that were trained, or none.
        steps, best_step: taken, and the one whose numbers are in the records; 0 if there are none.
        before, after: the loss of the sequences that are held out.
    """

    records: dict[str, np.ndarray]
    steps: int
    best_step: int
    before: float
    after: float


class RecordTrainer:
    """A pair, a text of so many sequences, and how its records are trained on it.

    Attributes:
        validation: the sequences that are held out.
    """

    def __init__(
        self,
        base: Checkpoint,
        finetuned: Checkpoint,
        sequences: int,
        settings: DistillSettings,
        arguments: TrainingArguments,
        progress: Progress,
    ):
        self._base, self._finetuned = base, finetuned
        self._settings, self._arguments, self._progress = settings, arguments, progress
        self._training, self.validation = split(sequences, settings.validation_share)

    def attach(
        self, student: Any, names: Iterable[str], records: Mapping[str, np.ndarray], owners: Mapping[str, list[str]]
    ) -> dict[str, TrainedDelta]:
        """Add the deltas of some tensors to a student that has the base's weights there, by `student.attach`."""
        deltas = {}
        for name in names:
            exact = self._exact(name) if self._settings.trains == "codes" else None
            deltas[name] = attach(student, name, records[name], exact, owners.get(name))
        return deltas

    def _exact(self, name: str) -> Tensor:
        # Read when it is wanted: all of them would be a model of their own
        return exact_delta(self._base, self._finetuned, name)

    def mean(self, loss: Callable[[Tensor], Tensor]) -> float:
        """The loss of the sequences that are held out."""
        return mean_loss(TrainableDeltas((), loss), self.validation, self._arguments)

    def train(
        self, deltas: Mapping[str, TrainedDelta], loss: Callable[[Tensor], Tensor], title: str, outputs: str
    ) -> Outcome:
        """Train deltas, and judge them by the numbers that their records store.

        Args:
            loss: of the examples with these numbers.
            title: of the bar.
            outputs: what the loss compares, for messages.

        Raises:
            ValueError: if a loss is not finite.
        """
        before = self.mean(loss)
        if not math.isfinite(before):
            raise ValueError(f"distillation: the {outputs} of the fine-tuned or of the compressed model are not finite")
        if not deltas:
            return Outcome({}, 0, 0, before, before)
        trainable, settings, arguments = TrainableDeltas(deltas.values(), loss), self._settings, self._arguments
        steps, best_step = train(trainable, self._training, self.validation, settings, arguments, self._progress, title)
        stored = {name: delta.fold() for name, delta in deltas.items()}
        after = self.mean(loss)
        if not after < before:
            return Outcome({}, steps, 0, before, before)
        records = {n: np.frombuffer(packed(stack, self._exact(n), n), np.uint8) for n, stack in stored.items()}
        return Outcome(records, steps, best_step, before, after)
