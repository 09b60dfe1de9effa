"""The public function `diff`: what changed between two models, and which method fits to store it."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..common.devices import usable_device
from ..common.progress import Progress
from ..compression.scan import element_count
from ..modeling.model_files import HubOptions
from .comparison import tensor_diff
from .groups import Group, other_dtypes
from .ratios import ratio_estimates
from .report import DiffReport
from .sides import open_sides
from .verdict import verdict

# Fields of config.json that say nothing of the model.
_ABOUT_THE_FILE = ("_name_or_path", "transformers_version")


def diff(
    base: str,
    finetuned: str | None = None,
    *,
    spectra: bool = True,
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
    base_model: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> DiffReport:
    """Compare two models, or a delta repository with its base, tensor by tensor; nothing is written.

    NaN and infinity are counted, not refused.

    Args:
        base: dense model or delta repository: folder or Hub id.
        finetuned: what is compared with it: a dense model, a delta repository or an adapter in PEFT's format on it.
            None if `base` is a delta repository, which is then compared with its own base.
        spectra: whether singular values of the differences are computed, which takes most of the time of large models.
            Without them no ratio is estimated.
        base_revision, finetuned_revision: branch, tag or commit on the Hub; without `finetuned` the second is that of
            the delta repository.
        base_model: folder or Hub id of the base of delta repositories, instead of the recorded one.
        token, cache_dir: as in `from_pretrained`.
        device: where tensors are compared and decomposed.
        progress: whether to show a bar.

    Raises:
        CheckpointError: if a model cannot be read, or `base` alone is no delta repository.
        DeltaFormatError, WrongBaseError: if a delta repository is damaged, or its base is another model.
        IncompatibleModelsError: if the two are no pair.
        ModuleNotFoundError: if one is an adapter and PEFT is not installed.
        ValueError: if the device cannot be used here, `base_model` has no effect, or `base_revision` is given without
            `finetuned`.
    """
    started = time.perf_counter()
    if finetuned is None and base_revision is not None:
        raise ValueError("base_revision: a delta repository alone has finetuned_revision, and records its base's")
    device = usable_device(device)
    sides = open_sides(
        base, finetuned, HubOptions(base_revision, token, cache_dir), HubOptions(finetuned_revision, token, cache_dir),
        base_model,
    )  # fmt: skip
    before, after = sides.pair.base, sides.pair.finetuned

    def size(name: str) -> int:
        return element_count(after.shape(name))

    names = Progress(progress).track(after.names(), "Comparing", size)
    tensors = tuple(tensor_diff(name, before, after, device, spectra) for name in names)
    config = _changed_fields(sides.base.config, sides.finetuned.config)
    files = _changed_files(sides.base.files, sides.finetuned.files)
    estimates = ratio_estimates(tensors, after.weight_bytes)
    judged = verdict(
        sides.base, sides.finetuned, Group.of("total", tensors), sum(t.entries for t in tensors if t.changed),
        after.weight_bytes, estimates, len(config) + len(files) + len(other_dtypes(tensors)), alone=finetuned is None,
    )  # fmt: skip
    return DiffReport(
        base=sides.base.source,
        finetuned=sides.finetuned.source,
        tensors=tensors,
        absent=tuple(before.absent),
        checkpoint_bytes=after.weight_bytes,
        config=config,
        files=files,
        estimates=tuple(estimates),
        verdict=judged,
        seconds=time.perf_counter() - started,
    )


def _changed_fields(before: Mapping[str, Any], after: Mapping[str, Any], within: str = "") -> tuple[str, ...]:
    """Return the names of the fields in which two config.json differ, sorted."""
    changed: list[str] = []
    for name in sorted({*before, *after} - set(_ABOUT_THE_FILE)):
        one, other = before.get(name), after.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            changed += _changed_fields(one, other, f"{within}{name}.")
        elif one != other:
            changed.append(within + name)
    return tuple(changed)


def _changed_files(before: Mapping[str, Path], after: Mapping[str, Path]) -> tuple[str, ...]:
    """Return the names of files that differ, or that only the second has, sorted."""
    return tuple(
        name
        for name, path in sorted(after.items())
        if name not in before or path.read_bytes() != before[name].read_bytes()
    )
