"""Distillation of a few decoder layers at a time, for when two whole models do not fit in memory.

The input of each group of layers is the output of the trained compressed layers before it, and its target is the
fine-tune's hidden states after it, so that it also compensates for errors of the layers before. The target of the last
group is the logits.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import TrainingArguments

from ..calibration.streamed_model import StreamedModel, streamed_model
from ..common import processes
from ..common.files import atomic_write
from ..common.partial_logits import LogitsOf
from ..common.progress import Progress
from ..modeling.delta_record import parse_stack
from ..modeling.tensors import Model, Tensors
from .fit import fit
from .memory import DeltaSize
from .recomputation import recompute_layers
from .record_trainer import Outcome, RecordTrainer
from .settings import DistillReport, DistillSettings
from .student import Place, compressed, head_delta
from .text import check_tokens, divergence, relative_error

PURPOSE = "distillation by blocks"

_Records = Mapping[str, np.ndarray]


def _save(outcome: Outcome, path: Path) -> None:
    """Write the outcome of a group of layers atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = [outcome.steps, outcome.best_step, outcome.before, outcome.after]
    with atomic_write(path) as temporary:
        save_file(outcome.records, temporary, {"numbers": json.dumps(numbers)})


def _load(path: Path) -> Outcome:
    with safe_open(path, "np") as file:
        records = {name: file.get_tensor(name) for name in file.keys()}
        return Outcome(records, *json.loads(file.metadata()["numbers"]))


def distill_blocks(
    base: Tensors,
    finetuned: Model,
    records: _Records,
    tokens: Tensor,
    settings: DistillSettings,
    arguments: TrainingArguments,
    progress: Progress,
) -> tuple[dict[str, bytes], DistillReport]:
    """Distil as `distill` does, in groups of `settings.blocks` layers."""
    models = _BlockModels(base, finetuned, records, tokens, settings, arguments)
    folder, count = Path(str(arguments.output_dir)), len(models.teacher.layers)
    current, trained, steps, best_steps = dict(records), set[str](), 0, 0
    # Input hidden states of the next group: the teacher's, the student's, and a student's with the original records.
    teacher_input = student_input = original_input = None
    assert settings.blocks is not None
    for start in range(0, count, settings.blocks):
        group = _Group(range(start, min(start + settings.blocks, count)), count)
        names = models.names_of(group)
        can_be_trained = places_of(models.teacher, base, finetuned, names)
        own = [name for name in names if name in records and name in can_be_trained]
        trained.update(own)
        models.teacher.load(names)
        teacher_output = None
        if not group.is_last:
            teacher_output = models.output(models.teacher, group, teacher_input, range(len(tokens)))
            models.teacher.release(names)
        loss = partial(models.loss, group, teacher_input, teacher_output)
        path = folder / f"layers-{start}.safetensors"
        if path.exists():
            outcome = _load(path)
        else:
            arguments.output_dir = str(folder / f"layers-{start}")
            layers = f"layers {start + 1} to {group.layers.stop} of {count}"
            part = progress.part(layers, -(-(count - group.layers.stop) // settings.blocks))
            outcome = models.train(group, current, own, partial(loss, student_input), part)
            outcome = processes.from_first(outcome)
            if processes.is_first():
                _save(outcome, path)
                shutil.rmtree(arguments.output_dir, ignore_errors=True)  # the checkpoints, which are many times larger
        current |= outcome.records
        steps, best_steps = steps + outcome.steps, best_steps + outcome.best_step
        # Only one student exists at a time, to save memory.
        if group.is_last:
            after = models.record_trainer.mean(partial(loss, student_input, models.student(current, group)))
            before = models.record_trainer.mean(partial(loss, original_input, models.student(records, group)))
        else:
            student_input = models.output(models.student(current, group), group, student_input, range(len(tokens)))
            original_input = models.output(
                models.student(records, group), group, original_input, models.record_trainer.validation
            )
            teacher_input = teacher_output
    untrained = tuple(sorted(records.keys() - trained))
    if not after < before:
        return {name: r.tobytes() for name, r in records.items()}, DistillReport(steps, 0, before, before, untrained)
    report = DistillReport(steps, best_steps, before, after, untrained)
    return {name: r.tobytes() for name, r in current.items()}, report


@dataclass(frozen=True)
class _Group:
    """Successive decoder layers that are trained together.

    Attributes:
        layers: indices of the layers.
        count: number of layers in the model.
    """

    layers: range
    count: int

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.count


@torch.no_grad()
def check_blocks(base: Tensors, finetuned: Model, tokens: Tensor, device: str | torch.device) -> frozenset[str]:
    """Check that a model can be distilled by blocks, for which two decoder layers are loaded.

    Returns:
        The names of the tensors that are trained, if they have records.

    Raises:
        ValueError: if it cannot, or if a token is not in its vocabulary.
    """
    model = streamed_model(finetuned, tokens, device, PURPOSE, torch.float32)
    model.check_run(tokens[:1].to(model.device))
    names = {*model.output_names, *(name for layer in model.layers for name in model.names_in(layer))}
    return frozenset(places_of(model, base, finetuned, names))


def places_of(model: StreamedModel, base: Tensors, finetuned: Model, names: Iterable[str]) -> dict[str, Place]:
    """Return the place in a model of those of the named tensors that can be trained."""
    places = {}
    for name in names:
        group, stack = model.group(name), model.stacks.get(model.parameters[name])
        if base.shape(name) == finetuned.shape(name) and (group.converter is None or stack is not None):
            places[name] = Place([group.key], None if stack is None or stack.is_as_stored else stack)
    return places


class _BlockModels:
    """The teacher, loaded layer by layer, and students of the same layers.

    Hidden states are float32 (sequences, length, size) on the CPU, of all sequences or of the last ones; None before
    the first layer.

    Attributes:
        teacher: the fine-tune.
        record_trainer: trains a group's records.
    """

    def __init__(
        self,
        base: Tensors,
        finetuned: Model,
        records: _Records,
        tokens: Tensor,
        settings: DistillSettings,
        arguments: TrainingArguments,
    ):
        self._base, self._finetuned, self._tokens = base, finetuned, tokens
        self._arguments = arguments
        self.teacher = streamed_model(finetuned, tokens, arguments.device, PURPOSE, torch.float32)
        check_tokens(tokens, self.teacher.vocabulary)
        assert settings.blocks is not None
        count = len(self.teacher.layers)
        self._logits = self._logits_of(self.teacher, range((count - 1) // settings.blocks * settings.blocks, count))
        sizes: dict[str, list[DeltaSize]] = {}  # by parameter: of experts, those of all its tensors
        for name in places_of(self.teacher, base, finetuned, [n for n in self.teacher.names if n in records]):
            own = map(DeltaSize.of, parse_stack(records[name], name))
            sizes.setdefault(self.teacher.parameters[name], []).extend(own)
        self._fit = fit(self.teacher.model.config, sizes, settings, arguments, (len(tokens), tokens.shape[1]))
        self.record_trainer = RecordTrainer(
            base, finetuned, len(tokens), settings, arguments, self._fit.micro_batch_size
        )
        self.teacher.load(self.teacher.embedding_names)
        # The tensors before the first layer are not trained, so that all students share them.
        self._embeddings = {
            name: self._tensor(name, records).to(arguments.device, torch.float32)
            for name in self.teacher.embedding_names
        }

    def names_of(self, group: _Group) -> list[str]:
        """Return the names of a group's tensors; the last group includes the output projection and the final norm."""
        layers = list(self.teacher.layers)[group.layers.start : group.layers.stop]
        names = sorted(name for layer in layers for name in self.teacher.names_in(layer))
        return names + (self.teacher.output_names if group.is_last else [])

    def student(self, records: _Records, group: _Group, trained: frozenset[str] = frozenset()) -> StreamedModel:
        """Make a student with a group's layers; `trained` tensors get the base's weights, to attach deltas to."""
        model = self.teacher.another()
        for name, tensor in self._embeddings.items():
            model.put(name, tensor)
        for name in self.names_of(group):
            model.put(name, self._base.tensor(name) if name in trained else self._tensor(name, records))
        return model

    def _tensor(self, name: str, records: _Records) -> Tensor:
        """Return a tensor of the compressed model."""
        if name in records:
            return compressed(self._base, self._finetuned, name, records[name], self._arguments.device)
        return self._finetuned.tensor(name)

    def _inputs(self, hidden: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return some sequences' tokens, and their hidden states before a group, on the device."""
        rows = rows.cpu()
        # Indices count from the end, because `hidden` may contain only the last sequences.
        chosen = None if hidden is None else hidden[rows - len(self._tokens)].to(self.teacher.device)
        return self._tokens[rows].to(self.teacher.device), chosen

    def _run(self, model: StreamedModel, group: _Group, hidden: Tensor | None, rows: Tensor) -> Tensor:
        """Run a group of layers that is not the last on some sequences, and return the hidden states after it."""
        tokens, group_input = self._inputs(hidden, rows)
        with self._cached():
            return model.run(tokens, group_input, group.layers)

    def _cached(self) -> AbstractContextManager[None]:
        # Some layers read a stack once for each of its matrices; layers that are recomputed have their own cache.
        return nullcontext() if self._fit.recomputes else parametrize.cached()

    def _logits_of(self, model: StreamedModel, window: range) -> LogitsOf:
        like = None if model is self.teacher else self._logits
        return LogitsOf(model.model, lambda tokens: model.run(tokens, None, window), like)

    def _last_divergence(
        self, group: _Group, teacher_input: Tensor | None, student_input: Tensor | None, student: StreamedModel,
        rows: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return the divergence of the logits, for the last group."""
        tokens, hidden = self._inputs(teacher_input, rows)
        with torch.no_grad():
            expected = self._logits(tokens, partial(self.teacher.run, hidden=hidden, window=group.layers))
        hidden = self._inputs(student_input, rows)[1]
        with self._cached():
            logits = self._logits_of(student, group.layers)(
                tokens, partial(student.run, hidden=hidden, window=group.layers)
            )
            return divergence(expected, logits, head_delta(student.model))

    @torch.no_grad()
    def output(self, model: StreamedModel, group: _Group, hidden: Tensor | None, rows: range) -> Tensor:
        """Return the hidden states after a group of layers that is not the last."""
        parts = torch.tensor(rows).split(self._arguments.per_device_eval_batch_size)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self._arguments.bf16):
            return torch.cat([self._run(model, group, hidden, part).float().cpu() for part in parts])

    def loss(
        self,
        group: _Group,
        teacher_input: Tensor | None,
        teacher_output: Tensor | None,
        student_input: Tensor | None,
        student: StreamedModel,
        rows: Tensor,
    ) -> Tensor:
        """Return the difference between the student's and the teacher's output of a group, for some sequences.

        Args:
            teacher_input: the teacher's hidden states before the group.
            teacher_output: the teacher's hidden states after the group; None for the last group, whose logits are
                compared.
            student_input: the student's hidden states before the group.
            student: the student, from `student`.
            rows: indices of the sequences, int64 (batch,).
        """
        if teacher_output is None:
            return self._last_divergence(group, teacher_input, student_input, student, rows)
        student_output = self._run(student, group, student_input, rows)
        target = teacher_output[rows.cpu() - len(self._tokens)].to(student_output.device)
        return relative_error(target, student_output)

    def train(
        self,
        group: _Group,
        records: _Records,
        names: list[str],
        loss: Callable[[StreamedModel, Tensor], Tensor],
        progress: Progress,
    ) -> Outcome:
        """Train the records of a group of layers."""
        student = self.student(records, group, frozenset(names))
        places = places_of(student, self._base, self._finetuned, names)
        deltas = self.record_trainer.attach(student.model, names, records, places)
        if self._fit.recomputes:
            recompute_layers(student.model)
        return self.record_trainer.train(deltas, partial(loss, student), "outputs", progress)
