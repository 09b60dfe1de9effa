"""Distillation of a few decoder layers at a time, for models of which two do not fit.

Each group of layers is fed by the compressed layers before it, as they are after their own training, and trained
towards the fine-tune's hidden states behind it: it makes up for errors of the layers before it as well. The last group
is trained towards the logits.
"""

import json
import shutil
from collections.abc import Callable, Mapping
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
from ..common.files import written_whole
from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint
from ..training import distributed as processes
from .record_trainer import Outcome, RecordTrainer
from .settings import DistillReport, DistillSettings
from .student import compressed
from .text import check_tokens, divergence, relative_error

PURPOSE = "distillation by blocks"

_Records = Mapping[str, np.ndarray]


def _save(outcome: Outcome, path: Path) -> None:
    """Write what came of a group of layers, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = [outcome.steps, outcome.best_step, outcome.before, outcome.after]
    with written_whole(path) as temporary:
        save_file(outcome.records, temporary, {"numbers": json.dumps(numbers)})


def _load(path: Path) -> Outcome:
    with safe_open(path, "np") as file:
        records = {name: file.get_tensor(name) for name in file.keys()}
        return Outcome(records, *json.loads(file.metadata()["numbers"]))


def distill_blocks(
    base: Checkpoint,
    finetuned: Checkpoint,
    records: _Records,
    tokens: Tensor,
    settings: DistillSettings,
    arguments: TrainingArguments,
    progress: Progress,
) -> tuple[dict[str, bytes], DistillReport]:
    """`distill`, by groups of `settings.blocks` layers."""
    work = _Work(base, finetuned, records, tokens, settings, arguments, progress)
    folder, count = Path(str(arguments.output_dir)), len(work.teacher.layers)
    found, trained, steps, best_steps = dict(records), set[str](), 0, 0
    # Behind the layers so far: what the fine-tune gives, the records as they are, and as they were
    wanted = hidden = untouched = None
    assert settings.blocks is not None
    for start in range(0, count, settings.blocks):
        group = _Group(range(start, min(start + settings.blocks, count)), count)
        names = work.names_of(group)
        own = [name for name in names if name in records and base.shape(name) == finetuned.shape(name)]
        trained.update(own)
        work.teacher.load(names)
        behind = None
        if not group.is_last:
            behind = work.behind(work.teacher, group, wanted, range(len(tokens)))
            work.teacher.release(names)
        goal = partial(work.loss, group, wanted, behind)
        path = folder / f"layers-{start}.safetensors"
        if path.exists():
            result = _load(path)
        else:
            arguments.output_dir = str(folder / f"layers-{start}")
            result = work.train(group, found, own, partial(goal, hidden))
            if processes.several():
                result = processes.from_first(result)
            if processes.is_first():
                _save(result, path)
                shutil.rmtree(arguments.output_dir, ignore_errors=True)  # the state of training, many times as large
        found |= result.records
        steps, best_steps = steps + result.steps, best_steps + result.best_step
        # One student after the other, none of which stays
        if group.is_last:
            after = work.record_trainer.mean(partial(goal, hidden, work.student(found, group)))
            before = work.record_trainer.mean(partial(goal, untouched, work.student(records, group)))
        else:
            hidden = work.behind(work.student(found, group), group, hidden, range(len(tokens)))
            untouched = work.behind(work.student(records, group), group, untouched, work.record_trainer.validation)
            wanted = behind
    untrained = tuple(sorted(records.keys() - trained))
    if not after < before:
        return {name: r.tobytes() for name, r in records.items()}, DistillReport(steps, 0, before, before, untrained)
    return {name: r.tobytes() for name, r in found.items()}, DistillReport(steps, best_steps, before, after, untrained)


@dataclass(frozen=True)
class _Group:
    """Layers that are trained together, of so many."""

    layers: range
    count: int

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.count


class _Work:
    """The fine-tune, layer by layer, and compressed models of the same layers.

    Hidden states are float32 (sequences, length, size) on the CPU: of all sequences, or of the last ones, and None
    before the first layer.

    Attributes:
        teacher: the fine-tune.
        record_trainer: the training of a group's records.
    """

    def __init__(
        self,
        base: Checkpoint,
        finetuned: Checkpoint,
        records: _Records,
        tokens: Tensor,
        settings: DistillSettings,
        arguments: TrainingArguments,
        progress: Progress,
    ):
        self._base, self._finetuned, self._tokens = base, finetuned, tokens
        self._arguments = arguments
        self.record_trainer = RecordTrainer(base, finetuned, len(tokens), settings, arguments, progress)
        self.teacher = streamed_model(finetuned, tokens, arguments.device, PURPOSE)
        check_tokens(tokens, self.teacher.vocabulary)
        self.teacher.check_output()
        self.teacher.load(self.teacher.entrance)
        # No group of layers trains it, so that all students share it
        self._entrance = {
            name: self._tensor(name, records).to(arguments.device, torch.float32) for name in self.teacher.entrance
        }

    def names_of(self, group: _Group) -> list[str]:
        """The tensors of a group of layers; of the last, also the output projection's and what else is left."""
        prefixes = tuple(f"{name}." for name in list(self.teacher.layers)[group.layers.start : group.layers.stop])
        names = [name for name in self.teacher.names if name.startswith(prefixes)]
        return names + (sorted(set(self.teacher.outside) - set(self.teacher.entrance)) if group.is_last else [])

    def student(self, records: _Records, group: _Group, trained: frozenset[str] = frozenset()) -> StreamedModel:
        """A group of the compressed model's layers, but with the base's weights for deltas that are to be attached."""
        model = StreamedModel(self._finetuned, self._arguments.device, PURPOSE)
        for name, tensor in self._entrance.items():
            model.put(name, tensor)
        for name in self.names_of(group):
            model.put(name, self._base.tensor(name) if name in trained else self._tensor(name, records))
        return model

    def _tensor(self, name: str, records: _Records) -> Tensor:
        """A tensor of the compressed model."""
        if name in records:
            return compressed(self._base, self._finetuned, name, records[name])
        return self._finetuned.tensor(name)

    def _run(self, model: StreamedModel, group: _Group, hidden: Tensor | None, rows: Tensor) -> Tensor:
        """What a group of layers makes of some sequences' hidden states: those behind it, or the logits."""
        rows = rows.cpu()
        # Counted from the end, as there may be hidden states of the last sequences only
        before = None if hidden is None else hidden[rows - len(self._tokens)].to(model.device)
        with parametrize.cached():
            return model.run(self._tokens[rows].to(model.device), before, group.layers)

    @torch.no_grad()
    def behind(self, model: StreamedModel, group: _Group, hidden: Tensor | None, rows: range) -> Tensor:
        """The hidden states behind a group of layers that is not the last."""
        parts = torch.tensor(rows).split(self._arguments.per_device_eval_batch_size)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self._arguments.bf16):
            return torch.cat([self._run(model, group, hidden, part).float().cpu() for part in parts])

    def loss(
        self,
        group: _Group,
        wanted: Tensor | None,
        behind: Tensor | None,
        hidden: Tensor | None,
        student: StreamedModel,
        rows: Tensor,
    ) -> Tensor:
        """How far a student is from the fine-tune behind a group of layers, for some sequences.

        Args:
            wanted: the fine-tune's hidden states before the group.
            behind: those behind it; None for the last group, which is judged by its logits.
            hidden: the student's before it.
        """
        found = self._run(student, group, hidden, rows)
        if behind is not None:
            return relative_error(behind[rows.cpu() - len(self._tokens)].to(found.device), found)
        with torch.no_grad():
            logits = self._run(self.teacher, group, wanted, rows)
        return divergence(logits, found)

    def train(
        self, group: _Group, records: _Records, names: list[str], loss: Callable[[StreamedModel, Tensor], Tensor]
    ) -> Outcome:
        """Train the records of a group of layers."""
        student = self.student(records, group, frozenset(names))
        deltas = self.record_trainer.attach(student.model, names, records, {})
        title = f"Distilling layers {group.layers.start + 1} to {group.layers.stop} of {group.count}"
        return self.record_trainer.train(deltas, partial(loss, student), title, "outputs")
