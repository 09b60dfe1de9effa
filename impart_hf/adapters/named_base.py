"""The base that an adapter's own configuration names, against the one that it is given."""

import os
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from ..modeling.delta_chain import BaseModel
from ..modeling.model_files import CheckpointError, HubOptions, fetch_file, read_json
from ..modeling.repository_kind import RepositoryKind, kind_of
from .adapter_files import AdapterFiles

logger = logging.get_logger(__name__)


def check_named_base(adapter: AdapterFiles, base: BaseModel) -> None:
    """Check that an adapter was not trained on a delta repository, and warn if it seems to be for another base.

    Raises:
        CheckpointError: if it was trained on a delta repository: on the base alone, the delta would be lost.
    """
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or _same_place(named, base.source):
        return
    if _is_delta(named, replace(adapter.options, revision=adapter.config.get("revision"), subfolder="")):
        raise CheckpointError(
            f"the adapter '{adapter.source}' was trained on the delta repository '{named}', whose delta would be lost: "
            "load that with from_pretrained, merge the adapter into it with PEFT's merge_and_unload, save that model, "
            "and give it instead"
        )
    names = {_last_part(base.source)}
    if os.path.isdir(base.source):  # it may have been renamed
        names.add(_last_part(str(base.config.get("_name_or_path", ""))))
    if _last_part(named) not in names:
        logger.warning(
            f"the adapter '{adapter.source}' names '{named}' as its base, and the base given is '{base.source}': check "
            "that they are the same model"
        )


def _same_place(one: str, other: str) -> bool:
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))


def _is_delta(source: str, options: HubOptions) -> bool:
    """Return whether a model is a delta repository; False if it cannot be reached."""
    try:
        config = fetch_file(source, "config.json", options)
        return config is not None and kind_of(read_json(config)) is RepositoryKind.DELTA
    except CheckpointError:
        return False


def _last_part(source: str) -> str:
    """Return the last part of a Hub id or path, in lower case: the model's name without owner or folders."""
    path = Path(source)
    if path.parent.name == "snapshots":  # in the Hub's cache: models--OWNER--NAME/snapshots/COMMIT
        path = Path(path.parents[1].name.rpartition("--")[2])
    return path.name.lower()
