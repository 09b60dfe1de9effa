"""The search for the settings of a merge, on a validation text for each task (arXiv 2504.13237, appendix C)."""

import dataclasses
import itertools
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..calibration.text import CalibrationSource, calibration_tokens, check_vocabulary, load_tokenizer, within_positions
from ..coding.svd_cache import SvdCache
from ..common.devices import usable_device
from ..common.progress import Progress
from ..common.validation import shard_bytes
from ..evaluation.metrics import load, perplexity
from ..methods import MethodConfig
from ..modeling.checkpoints import text_config
from ..storage.checkpoint_writer import WEIGHTS, DenseTensor, write_weights
from ..storage.locked_folder import LockedFolder
from .config import MergeConfig, MergeModel
from .grids import DENSITIES, LAMBDAS, TRIMS
from .inputs import MergeInputs
from .merge import Merge, MergeReport, compress_merge, free_output, publish, require_peft


@dataclass
class MergeCandidate:
    """One combination of settings that was tried.

    Attributes:
        settings: lambda and, if the method has them, density and trim_density.
        losses: cross-entropy by task, nats per token.
        seconds: time to merge and judge it.
    """

    settings: dict[str, float]
    losses: dict[str, float]
    seconds: float

    @property
    def score(self) -> float:
        """The mean of the losses, by which candidates are compared."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass
class MergeTuningReport:
    """The result of a search.

    Attributes:
        candidates: in the order in which they were tried.
        best: the best candidate, which was written.
        report: the report on its merge.
    """

    candidates: list[MergeCandidate]
    best: MergeCandidate
    report: MergeReport

    def table(self) -> str:
        """Return a table with a line for each candidate, the best one marked; losses are in nats per token."""
        settings, tasks = list(self.best.settings), list(self.best.losses)
        rows = [[*settings, *tasks, "mean"]]
        for candidate in self.candidates:
            losses = [f"{candidate.losses[task]:.4f}" for task in tasks]
            rows.append([*(f"{candidate.settings[name]:g}" for name in settings), *losses, f"{candidate.score:.4f}"])
        widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
        marks = ["", *("  best" if candidate is self.best else "" for candidate in self.candidates)]
        return "\n".join(
            "".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + mark
            for row, mark in zip(rows, marks, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "report": self.report.to_dict()}


def tune_merge(
    config: MergeConfig | dict[str, Any] | str | Path,
    output_dir: str | Path,
    validation: Mapping[str, CalibrationSource],
    *,
    lambdas: Sequence[float] = LAMBDAS,
    trims: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    samples: int = 64,
    length: int = 512,
    batch_size: int = 8,
    compression: MethodConfig | None = None,
    base_name: str | None = None,
    device: str | torch.device = "cpu",
    token: str | bool | None = None,
    cache_dir: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> MergeTuningReport:
    """Merge with every combination of lambda, trimming and density, and keep the model with the lowest mean loss.

    Every candidate is written to a hidden folder beside `output_dir` and loaded as a user would load it; the best one
    so far is kept. The disk needs room for one copy of the model in float32 and two in its own dtype. With ImPart, it
    also needs room for the singular components of every fine-tune's layers. Only what depends on lambda is computed
    more than once.

    Args:
        config, output_dir, compression, base_name, device, token, cache_dir, max_shard_size: as for `merge`. The
            settings of the search replace those of the configuration.
        validation: the validation text of each task, in the forms that `compress` takes for calibration.
        lambdas: factors of the merged delta.
        trims: shares of each delta that TIES keeps, for the methods with TIES; `TRIMS` if None.
        densities: shares that DARE or ImPart keep, for the methods with either; `DENSITIES` if None.
        samples, length: the largest number of sequences of each text, and tokens per sequence.
        batch_size: sequences judged at a time.
        progress: show a bar.

    Raises:
        ValueError: if there is no task, nothing to try, or a setting that the merge method does not have; and as
            `merge`.
    """
    config = MergeConfig.of(config)
    require_peft()
    if not validation:
        raise ValueError("give the validation text of at least one task")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device, shard_size = usable_device(device), shard_bytes(max_shard_size)
    output = free_output(output_dir, config, compression)
    lambdas = sorted(set(map(float, lambdas)))
    grid = _grid(config, lambdas, trims, densities)
    inputs = MergeInputs(config, token=token, cache_dir=cache_dir, device=device)
    tokenizer = load_tokenizer(inputs.tokens.source, inputs.tokens.options)
    vocabulary, length = text_config(inputs.result_config).vocab_size, within_positions(length, inputs.result_config)
    texts = {}
    for task, text in validation.items():
        texts[task] = calibration_tokens(text, tokenizer, samples=samples, length=length)
        check_vocabulary(texts[task], vocabulary, inputs.tokens.source)
    output.parent.mkdir(parents=True, exist_ok=True)
    tried: list[MergeCandidate] = []
    best: MergeCandidate | None = None
    with (
        LockedFolder(output.parent, f".{output.name}.work-") as scratch,
        Progress(progress).bar(len(grid) * len(lambdas), "Tuning") as bar,
    ):
        svds = SvdCache(scratch / "components")
        for settings in grid:
            started = time.perf_counter()
            deltas = None  # its file takes disk space as long as it is open
            deltas = StoredDeltas(Merge(_with(config, settings), inputs, device, svds.of), scratch / "deltas")
            for scale in lambdas:
                candidate = _with(config, {"lambda": scale, **settings})
                folder = scratch / "candidate"
                folder.mkdir()
                Merge(candidate, inputs, device, delta_of=deltas.of).write(
                    folder, output.name, shard_size, Progress(False)
                )
                losses = task_losses(folder, device, texts, batch_size)
                seconds, started = time.perf_counter() - started, time.perf_counter()
                tried.append(MergeCandidate({"lambda": scale, **settings}, losses, seconds))
                if best is None or _rank(tried[-1]) < _rank(best):
                    best = tried[-1]
                    shutil.rmtree(scratch / "best", ignore_errors=True)
                    folder.rename(scratch / "best")
                else:
                    shutil.rmtree(folder)
                bar.update()
        assert best is not None  # the grid has at least one point
        deltas = None
        winner = Merge(_with(config, best.settings), inputs, device)
        for folder in (scratch / "deltas", scratch / "components"):  # to free disk space
            shutil.rmtree(folder, ignore_errors=True)
        write = partial(_move_files, scratch / "best")
        if compression is None:
            report = publish(winner, output, write)
        else:
            report = compress_merge(winner, output, write, compression, None, base_name, shard_size, Progress(False))
    return MergeTuningReport(tried, best, report)


def _rank(candidate: MergeCandidate) -> float:
    """Return the score by which candidates are ranked; a loss of NaN must not win."""
    return math.inf if math.isnan(candidate.score) else candidate.score


def _move_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        path.rename(target / path.name)


def _grid(
    config: MergeConfig, lambdas: Sequence[float], trims: Sequence[float] | None, densities: Sequence[float] | None
) -> list[dict[str, float]]:
    """Return all settings to try, without lambda.

    The largest densities come first, because they need the most singular components: their decomposition then serves
    all that follow.

    Raises:
        ValueError: if a number is invalid, or there is nothing to try.
    """
    method = config.method
    axes: dict[str, Sequence[float]] = {}
    for given, usual, setting, used, name in (
        (densities, DENSITIES, "density", method.sparsifier is not None, "densities"),
        (trims, TRIMS, "density" if method.sparsifier is None else "trim_density", method.consensus, "trims"),
    ):
        if used:
            axes[setting] = sorted(set(map(float, usual if given is None else given)), reverse=True)
        elif given is not None:
            raise ValueError(f"{config.merge_method} has no use for {name}: leave it out")
    if not lambdas or not all(axes.values()):
        raise ValueError("nothing to try: lambdas, trims and densities need at least one value each")
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    for settings, scale in itertools.product(grid, lambdas):
        _with(config, {"lambda": scale, **settings})  # raises an error if a value is invalid
    return grid


def _with(config: MergeConfig, settings: Mapping[str, float]) -> MergeConfig:
    """Return the configuration with these settings for all models and tensors."""
    models = tuple(
        MergeModel(model.model, {k: v for k, v in model.parameters.items() if k not in settings})
        for model in config.models
    )
    return dataclasses.replace(config, models=models, parameters={**config.parameters, **settings})


class StoredDeltas:
    """The combined deltas of a merge, stored in a file because they are read once for every lambda."""

    def __init__(self, merged: Merge, folder: Path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        floats = [name for name in merged.names() if merged.dtype(name).is_floating_point]
        tensors = [
            DenseTensor(name, merged.inputs.base.shape(name), torch.float32, partial(merged.delta, name))
            for name in floats
        ]
        write_weights(folder, tensors, 1 << 62, Progress(False), "Storing deltas")
        self._file = safe_open(str(folder / WEIGHTS), framework="pt")

    def of(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)


def task_losses(
    folder: Path, device: torch.device, texts: Mapping[str, torch.Tensor], batch_size: int
) -> dict[str, float]:
    """Return the cross-entropy of a merged model on each task's text, nats per token."""
    model = load(str(folder), torch.float32, device)
    return {task: math.log(perplexity(model, tokens, batch_size)) for task, tokens in texts.items()}
