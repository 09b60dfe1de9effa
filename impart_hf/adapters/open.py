"""Opening a fine-tune that may be an adapter."""

import os

from ..modeling.checkpoints import WEIGHT_FILES, Checkpoint
from ..modeling.delta_chain import BaseModel
from ..modeling.model_files import HubOptions, fetch_file, pinned
from .adapted_model import AdaptedModel
from .adapter_files import find_adapter
from .named_base import check_named_base


def open_finetune(source: str, options: HubOptions, base: BaseModel) -> Checkpoint | AdaptedModel:
    """Open a fine-tune of a base: a dense checkpoint, or an adapter.

    A local folder with weights of its own and an adapter beside them is read as transformers reads it: the adapter is
    on these weights, and not on the base.

    Args:
        source: local folder or Hub id.
        options: how to read it.
        base: the base, opened without `tied`.

    Raises:
        CheckpointError: if it cannot be read, or the adapter cannot be merged, or belongs to a delta repository.
        ModuleNotFoundError: if it is an adapter and PEFT is not installed.
    """
    adapter = find_adapter(source, options)
    if adapter is None:
        return Checkpoint(source, pinned(source, options))
    beside = fetch_file(source, "config.json", options) if os.path.isdir(source) else None
    if beside is not None and any(fetch_file(source, name, options) for name in WEIGHT_FILES):
        base = Checkpoint(source, options)
    else:
        check_named_base(adapter, base)
    return AdaptedModel(base, adapter)
