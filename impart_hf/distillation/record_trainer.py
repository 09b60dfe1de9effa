"""Training of records for any loss: used by distillation end to end and by blocks."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor
from transformers import TrainingArguments

from ..common.progress import Progress
from ..modeling.tensors import Model, Tensors
from .settings import OPTIMIZERS, DistillSettings
from .student import Place, attach, exact_delta, packed
from .text import split
from .trained_delta import TrainedDelta
from .trainer import TrainableDeltas, autocast, mean_loss, train


@dataclass(frozen=True)
class Outcome:
    """The result of training.

    Attributes:
        records: all trained records if the held-out loss fell, otherwise none.
        steps: steps taken.
        best_step: the step whose numbers are in the records; 0 if there are none.
        before, after: the loss on the held-out sequences.
    """

    records: dict[str, np.ndarray]
    steps: int
    best_step: int
    before: float
    after: float


class RecordTrainer:
    """Trains the records of a pair on token sequences, some of which are held out.

    Attributes:
        validation: indices of the held-out sequences.
        micro_batch_size: sequences that a process runs at a time.
    """

    def __init__(
        self,
        base: Tensors,
        finetuned: Model,
        sequences: int,
        settings: DistillSettings,
        arguments: TrainingArguments,
        micro_batch_size: int,
    ):
        self.micro_batch_size = micro_batch_size
        self._base, self._finetuned = base, finetuned
        self._settings, self._arguments = settings, arguments
        self._training, self.validation = split(sequences, settings.validation_share)

    def attach(
        self, student: Any, names: Iterable[str], records: Mapping[str, np.ndarray], places: Mapping[str, Place]
    ) -> dict[str, TrainedDelta]:
        """Add the deltas of some tensors to a student that has the base's weights there, with `student.attach`.

        Args:
            places: by tensor name, its place in the student.
        """
        deltas = {}
        for name in names:
            exact = self._exact(name) if self._settings.trains == "codes" else None
            deltas[name] = attach(student, name, records[name], exact, places[name])
        return deltas

    def _exact(self, name: str) -> Tensor:
        # Deltas are read one at a time: all of them together would be as large as a model.
        return exact_delta(self._base, self._finetuned, name)

    def mean(self, loss: Callable[[Tensor], Tensor]) -> float:
        """Return the mean loss on the held-out sequences."""
        return mean_loss(TrainableDeltas((), loss, self.micro_batch_size), self.validation, self._arguments)

    def fit_micro_batch(self, deltas: Mapping[str, TrainedDelta], loss: Callable[[Tensor], Tensor]) -> None:
        """Halve the micro-batch until its loss and gradients are computed without running out of memory.

        The forecast may be wrong, and other processes may use the device. On a CPU there is no such error: the system
        ends the process.

        Raises:
            ValueError: if not even one sequence fits.
        """
        numbers = [values for delta in deltas.values() for values in delta.parameters()]
        of_moments = OPTIMIZERS[self._settings.optim] * sum(values.numel() for values in numbers)

        def run(size: int) -> None:
            moments = torch.empty(of_moments, dtype=torch.uint8, device=self._arguments.device)
            try:
                with torch.enable_grad(), autocast(self._arguments):
                    value = loss(torch.tensor(self._training[:size]))
                if value.requires_grad:
                    value.backward()
            finally:
                del moments
                for values in numbers:
                    values.grad = None

        def halve() -> int:
            self.micro_batch_size //= 2
            return self.micro_batch_size

        try:
            find_executable_batch_size(run, self.micro_batch_size, reduce_batch_size_fn=halve)()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            raise ValueError(
                "distillation: one sequence does not fit in the memory of the device: give shorter sequences, or fewer "
                "layers at a time with blocks"
            ) from error

    def train(
        self, deltas: Mapping[str, TrainedDelta], loss: Callable[[Tensor], Tensor], outputs: str, progress: Progress
    ) -> Outcome:
        """Train deltas, and keep them if the numbers as stored in their records lower the held-out loss.

        Args:
            deltas: by tensor name, from `attach`.
            loss: gives the mean loss of the sequences with these indices, int64 (batch,).
            outputs: the outputs that the loss compares, for messages.
            progress: shows a bar over the steps.

        Raises:
            ValueError: if a loss is not finite.
        """
        if self._settings.micro_batch_size is None and self._arguments.device.type != "cpu":
            self.fit_micro_batch(deltas, loss)
        before = self.mean(loss)
        if not math.isfinite(before):
            raise ValueError(
                f"distillation: the {outputs} of the fine-tuned or of the compressed model are not finite: "
                "check the weights, or train in bfloat16 or float32"
            )
        if not deltas:
            return Outcome({}, 0, 0, before, before)
        trainable = TrainableDeltas(deltas.values(), loss, self.micro_batch_size)
        settings, arguments = self._settings, self._arguments
        steps, best_step = train(trainable, self._training, self.validation, settings, arguments, progress)
        stored = {name: delta.fold() for name, delta in deltas.items()}
        after = self.mean(loss)
        if not after < before:
            return Outcome({}, steps, 0, before, before)
        records = {
            name: np.frombuffer(packed(stack, self._exact(name), name, arguments.device), np.uint8)
            for name, stack in stored.items()
        }
        return Outcome(records, steps, best_step, before, after)
