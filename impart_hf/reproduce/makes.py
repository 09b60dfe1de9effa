"""How the models of a table's rows are made: each class is one `make` of the tables' lines.

A making is plain data. It says what it needs that is not there, builds its model in a folder, and has an identity, by
which a result is recognised. Heavy modules are imported when a model is built.
"""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..common.model_names import split_revision
from ..methods import MethodConfig

SEED = 0  # of every row: the papers name none
_LORA: dict[str, Any] = {
    "rank": 8,
    "alpha": 32,
    "learning_rate": 1e-4,
    "batch_size": 4,
}  # GradPruner's, as its README and code say


@dataclass(frozen=True)
class Making(abc.ABC):
    """A way to make a model."""

    kind: ClassVar[str]

    def needs(self) -> str:
        """Return what is missing to make it, for the user; empty if nothing is."""
        return ""

    @property
    def stored(self) -> str | None:
        """The model, if nothing has to be made: folder or Hub id, with @REVISION."""
        return None

    @property
    def base(self) -> str | None:
        """The base that the made model is loaded with; None if it needs none."""
        return None

    def build(self, folder: Path, device: str) -> dict[str, Any]:
        """Make the model, and return what there is to know of it beside its scores.

        Args:
            folder: for the model, at `folder / "model"`, and for what is made on the way.
            device: where to compute.

        Raises:
            As the functions that it calls, ValueError and OSError among them.
        """
        raise NotImplementedError(f"{self.kind} makes nothing")

    def identity(self) -> dict[str, Any]:
        """Return all that the model depends on, as JSON values; local models and texts by their content."""
        return {"make": self.kind, **{name: identified(value) for name, value in asdict(self).items()}}


@dataclass(frozen=True)
class Stored(Making):
    """A model that is there: a base or a fine-tune.

    Attributes:
        model: folder or Hub id, with @REVISION; None if it was not published.
        name: its name in the tables.
    """

    kind = "stored"
    model: str | None
    name: str

    def needs(self) -> str:
        return "" if self.model else _model_needed(self.name)

    @property
    def stored(self) -> str | None:
        return self.model

    def identity(self) -> dict[str, Any]:
        return {"make": self.kind, "model": identified(self.model)}


@dataclass(frozen=True)
class Compressed(Making):
    """A delta repository.

    Attributes:
        pair: base and fine-tune.
        method: the method with its settings.
        calibration, distill: texts, as `compress` takes them.
        calibration_samples, calibration_length: sequences of each text, and tokens per sequence.
        distill_settings: fields of `DistillSettings`.
    """

    kind = "compress"
    pair: tuple[str, str]
    method: MethodConfig
    calibration: str | None = None
    distill: str | None = None
    calibration_samples: int = 128
    calibration_length: int = 2048
    distill_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return self.pair[0]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `compress` and `forecast`."""
        (base, base_revision), (finetuned, revision) = map(split_revision, self.pair)
        arguments: dict[str, Any] = {"base": base, "base_revision": base_revision, "finetuned": finetuned}
        arguments |= {"finetuned_revision": revision, "method": self.method, "calibration": self.calibration}
        if self.distill is not None:
            from ..distillation import DistillSettings

            arguments |= {"distill": self.distill, "distill_settings": DistillSettings(**self.distill_settings)}
        return arguments | {
            "calibration_samples": self.calibration_samples,
            "calibration_length": self.calibration_length,
        }

    def build(self, folder: Path, device: str) -> dict[str, Any]:
        from ..compression.compress import compress

        report = compress(output_dir=folder / "model", device=device, **self.arguments())
        return {
            "bytes": report.repository_bytes,
            "ratio": report.checkpoint_bytes / report.repository_bytes,
            **({"shortfall": report.shortfall} if report.shortfall else {}),
        }

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"method": self.method.to_dict()}


@dataclass(frozen=True)
class Merged(Making):
    """A merge, with the best settings of a search on validation texts.

    Attributes:
        base_model: the base.
        models: the fine-tunes by name; None for one that was not published.
        merge_method: as in `MergeConfig`.
        parameters: parameters that are not searched.
        lambdas, trims, densities: what is searched; empty for what the method does not have.
        validation: a text for each task; None for one that is not there.
        samples, length: sequences of each text, and tokens per sequence.
    """

    kind = "merge"
    base_model: str
    models: Mapping[str, str | None]
    merge_method: str
    parameters: Mapping[str, Any]
    lambdas: tuple[float, ...]
    trims: tuple[float, ...]
    densities: tuple[float, ...]
    validation: Mapping[str, str | None]
    samples: int = 64
    length: int = 512

    def needs(self) -> str:
        lacking = [_model_needed(name) for name, model in self.models.items() if not model]
        if texts := [task for task, text in self.validation.items() if not text]:
            lacking.append(_texts_needed("validation", texts))
        return "; ".join(lacking)

    def build(self, folder: Path, device: str) -> dict[str, Any]:
        from ..merging.config import MergeConfig, MergeModel
        from ..merging.search import tune_merge

        models = tuple(MergeModel(model) for model in self.models.values() if model)
        seed = {"seed": SEED} if self.densities else {}
        config = MergeConfig(self.merge_method, self.base_model, models, {**self.parameters, **seed})
        texts = {task: text for task, text in self.validation.items() if text}
        found = tune_merge(
            config, folder / "model", texts, lambdas=self.lambdas, trims=self.trims or None,
            densities=self.densities or None, samples=self.samples, length=self.length, device=device,
        )  # fmt: skip
        return {"chosen": found.best.settings, "candidates": len(found.candidates)}


@dataclass(frozen=True)
class Pruned(Making):
    """A model that was pruned by GradPruner and fine-tuned on a task's text; or only that, if nothing is dropped.

    Attributes:
        model: the dense model.
        task, text: the task, and its text for training; None if it is not there.
        drop: layers that are dropped without merging.
        merged: layers that are dropped and merged after that.
        tuning: "full" or "lora".
        importance_steps: steps in which importance is summed.
        epochs, steps: length of the fine-tuning; `steps` counts if it is not None.
        length: tokens per sequence.
        learning_rate: of full fine-tuning; None for `recover`'s own.
    """

    kind = "prune"
    model: str
    task: str
    text: str | None
    drop: int = 0
    merged: int = 0
    tuning: str = "full"
    importance_steps: int = 40
    epochs: float = 1.0
    steps: int | None = None
    length: int = 512
    learning_rate: float | None = None

    def needs(self) -> str:
        return "" if self.text else _texts_needed("train", [self.task])

    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        del identity["task"]  # what counts is the text
        return identity

    def build(self, folder: Path, device: str) -> dict[str, Any]:
        from ..pruning import compute_importance, prune_layers, recover

        assert self.text is not None
        (model, revision), facts = split_revision(self.model), dict[str, Any]()
        for name, count, merge in (("dropped", self.drop, False), ("merged", self.merged, True)):
            if not count:
                continue
            importance = compute_importance(
                model, folder / f"importance-{name}", self.text, steps=self.importance_steps, masks=merge,
                length=self.length, seed=SEED, device=device, revision=revision, progress=False, **_LORA,
            )  # fmt: skip
            report = prune_layers(
                model, folder / name, importance, drop=count, merge=merge, revision=revision, progress=False
            )
            facts.setdefault("parameters_before", report.parameters_before)
            facts |= {"parameters": report.parameters_after, f"{name}_layers": report.step["removed"]}
            model, revision = str(folder / name), None
        lora = self.tuning == "lora"
        tuning: dict[str, Any] = _LORA if lora else {"learning_rate": self.learning_rate}
        recover(
            model, folder / "model", self.text, lora=lora, steps=self.steps, epochs=self.epochs, length=self.length,
            seed=SEED, device=device, revision=revision, progress=False, **tuning,
        )  # fmt: skip
        return facts


@dataclass(frozen=True)
class Unavailable(Making):
    """A method of the table that impart-hf does not have."""

    kind = "none"

    def needs(self) -> str:
        return "a method that impart-hf does not have"


def _model_needed(name: str) -> str:
    return f"--model {name}=FOLDER, as it was not published"


def _texts_needed(purpose: str, tasks: Sequence[str]) -> str:
    return f"--texts FOLDER with {', '.join(f'{purpose}/{task}.jsonl' for task in tasks)}"


def identified(value: Any) -> Any:
    """Return a value as JSON, with the content's checksum in place of local paths."""
    if isinstance(value, Path):
        value = os.fspath(value)
    if isinstance(value, Mapping):
        return {name: identified(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [identified(part) for part in value]
    if isinstance(value, str) and os.path.isdir(value):
        from ..evaluation.task_results import model_identity

        return model_identity(value, None)
    if isinstance(value, str) and os.path.isfile(value):
        return {"sha256": hashlib.sha256(Path(value).read_bytes()).hexdigest()}
    return value
