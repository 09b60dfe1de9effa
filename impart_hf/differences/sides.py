"""The two models that are compared: dense models, delta repositories, or an adapter on the other."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.adapter_files import find_adapter, refuse_adapter
from ..adapters.companions import companions_of
from ..adapters.open import open_finetune
from ..compression.base_layout import MatchedPair, ReadModel, match
from ..modeling.checkpoints import Checkpoint
from ..modeling.delta_chain import DeltaBase
from ..modeling.delta_repository import DeltaRepository
from ..modeling.model_files import CheckpointError, HubOptions, fetch_file, pinned, read_json
from ..modeling.repository_kind import RepositoryKind, kind_of
from ..modeling.tensors import StoredModel
from ..repository.open import open_repository, warn_of_adapter_beside
from ..repository.sidecar_files import sidecar_files


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        source: its folder or Hub id.
        revision: the revision that the user named.
        config: the content of its config.json.
        files: its sidecar files, by their names.
        delta: the delta repository that it is, or None.
    """

    source: str
    revision: str | None
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    delta: DeltaRepository | None = None


@dataclass(frozen=True)
class Sides:
    """Two models whose tensors belong together.

    Attributes:
        pair: the second in the layout of the first, and the part of the first that it rests on.
        base, finetuned: the two.
    """

    pair: MatchedPair
    base: Side
    finetuned: Side


def open_sides(
    base: str,
    finetuned: str | None,
    base_options: HubOptions,
    finetuned_options: HubOptions,
    base_model: str | None = None,
) -> Sides:
    """Open two models, or a delta repository and its base; only headers are read, and an adapter.

    Args:
        base: dense model or delta repository.
        finetuned: dense model, delta repository or adapter in PEFT's format on `base`; None if `base` is a delta
            repository, to be compared with its own base.
        base_options, finetuned_options: how their files are found; the second also for `base` alone.
        base_model: folder or Hub id of the base of those that are delta repositories, instead of the recorded one.

    Raises:
        CheckpointError: if one of them cannot be read, or is an adapter that has no dense base here.
        DeltaFormatError, WrongBaseError: if a delta repository is damaged, or does not fit its base.
        IncompatibleModelsError: if the two are no pair.
        ModuleNotFoundError: if the second is an adapter and PEFT is not installed.
        ValueError: if `base_model` is given and neither is a delta repository.
    """
    if finetuned is None:
        return _with_own_base(os.fspath(base), finetuned_options, base_model)
    base, finetuned = os.fspath(base), os.fspath(finetuned)
    named = base_options.revision, finetuned_options.revision
    before = _delta_at(base, base_options, base_model)
    after = _delta_at(finetuned, finetuned_options, base_model)
    if base_model is not None and before is None and after is None:
        raise ValueError(f"base_model: neither '{base}' nor '{finetuned}' is a delta repository; leave it out")
    own: Checkpoint | DeltaBase | None = before
    opened: StoredModel | None = after
    if own is None:
        base_options = pinned(base, base_options)
        own = Checkpoint(base, base_options)
        refuse_adapter(base, base_options)
    if opened is None:
        opened = _open_dense(finetuned, finetuned_options, own)
    read = ReadModel(opened)
    first = _side(base, named[0], own)
    if isinstance(own, Checkpoint):  # an output projection that the fine-tune ties is no part of the pair
        own = Checkpoint(base, base_options, tied=read.ties_output)
    return Sides(match(ReadModel(own), read), first, _side(finetuned, named[1], opened))


def _with_own_base(source: str, options: HubOptions, base_model: str | None) -> Sides:
    model = _delta_at(source, options, base_model)
    if model is None:
        raise CheckpointError(
            f"'{source}' is not a delta repository, which alone has a base of its own: give two models to compare"
        )
    base = _repository(model).base
    files = sidecar_files(base.source, base.options)
    first = Side(base.source, base.options.revision, base.config, files)
    return Sides(MatchedPair(base, model), first, _side(source, options.revision, model))


def _delta_at(source: str, options: HubOptions, base_model: str | None) -> DeltaBase | None:
    """Open a delta repository; None if the folder or Hub id is none. What cannot be reached is an error."""
    options = pinned(source, options)
    path = fetch_file(source, "config.json", options)
    if path is None or kind_of(read_json(path)) is not RepositoryKind.DELTA:
        return None
    warn_of_adapter_beside(source, options)
    return DeltaBase(open_repository(source, options, base_model), options, read_json(path), path.parent)


def _repository(model: DeltaBase) -> DeltaRepository:
    assert isinstance(model.repository, DeltaRepository)
    return model.repository


def _open_dense(source: str, options: HubOptions, base: Checkpoint | DeltaBase) -> StoredModel:
    if isinstance(base, Checkpoint):
        return open_finetune(source, options, base)
    if find_adapter(source, options) is not None:
        raise CheckpointError(
            f"'{source}' is an adapter, and '{base.source}' a delta repository: make that dense with "
            "`impart-hf reconstruct` first"
        )
    return Checkpoint(source, pinned(source, options))


def _side(source: str, revision: str | None, model: Any) -> Side:
    if isinstance(model, DeltaBase):
        files = sidecar_files(source, model.options)
        return Side(source, revision, model.config, files, _repository(model))
    return Side(source, revision, model.config, companions_of(model).files)
