"""An adapter's files: PEFT's adapter_config.json and the weights beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..modeling.model_files import ADAPTER_CONFIG, CheckpointError, HubOptions, fetch_file, pinned, read_json
from ..modeling.wrapper_names import unwrapped

PREFIX = "base_model.model."  # of the names of an adapter's tensors, before that of the model's module
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_WHAT_TO_DO = "merge it into its base with PEFT's merge_and_unload, save that model, and give it instead"
# The tuners whose layers give the merged weight from the base's and the adapter's alone.
_MERGEABLE = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "TRAINABLE_TOKENS")
# How LoRA may start. The others replace the base's own weights, so that the adapter belongs to those.
_KEEPS_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterFiles:
    """The files of one adapter.

    Attributes:
        source, options: the folder or Hub id that they are from, and how to read it, pinned to one commit.
        folder: the folder that holds the files; for a Hub repository, in the Hub's cache.
        config: the content of adapter_config.json.
    """

    source: str
    options: HubOptions
    folder: Path
    config: dict[str, Any]


def find_adapter(source: str, options: HubOptions) -> AdapterFiles | None:
    """Return the adapter that a local folder or Hub repository holds, or None.

    Raises:
        CheckpointError: if it cannot be reached or read, or the adapter is of a kind that cannot be merged into weights
            one at a time.
    """
    options = pinned(source, options, ADAPTER_CONFIG)
    path = fetch_file(source, ADAPTER_CONFIG, options)
    if path is None:
        return None
    adapter = AdapterFiles(source, options, path.parent, read_json(path))
    _check_kind(adapter)
    if not any(fetch_file(source, name, options) for name in _WEIGHTS):
        raise CheckpointError(f"'{source}' is an adapter without weights: it has none of {', '.join(_WEIGHTS)}")
    return adapter


def named_adapter(source: str, options: HubOptions) -> AdapterFiles:
    """Return the adapter of a local folder or Hub repository that must hold one.

    Raises:
        CheckpointError: as `find_adapter` does, and if it holds none.
    """
    adapter = find_adapter(source, options)
    if adapter is None:
        raise CheckpointError(f"'{source}' is no adapter: it has no {ADAPTER_CONFIG}")
    return adapter


def adapter_weights(adapter: AdapterFiles) -> dict[str, torch.Tensor]:
    """Read an adapter's weights, on the CPU, by PEFT's names, without those of other wrappers.

    Raises:
        CheckpointError: if the file cannot be read.
        ModuleNotFoundError: if PEFT is not installed.
    """
    try:
        from peft.utils.save_and_load import load_peft_weights
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"'{adapter.source}' is an adapter, and reading it needs PEFT: pip install 'impart-hf[lora]'"
        ) from error
    try:
        weights: dict[str, torch.Tensor] = load_peft_weights(str(adapter.folder), device="cpu")
    except Exception as error:  # a damaged file, or a pickle that is refused, can raise anything
        raise CheckpointError(f"the adapter '{adapter.source}' cannot be read: {str(error).splitlines()[0]}") from error
    if empty := [name for name, tensor in weights.items() if not tensor.numel()]:
        raise CheckpointError(
            f"{empty[0]} of the adapter '{adapter.source}' is empty: it was saved before its parts were gathered "
            "(DeepSpeed ZeRO-3, FSDP); save it again"
        )
    return {f"{PREFIX}{plain}": weights[name] for name, plain in unwrapped(weights).items()}


def refuse_adapter(source: str, options: HubOptions) -> None:
    """Check that a local folder or Hub repository holds no adapter, which reading its weights would pass over.

    Raises:
        CheckpointError: if it does.
    """
    if fetch_file(source, ADAPTER_CONFIG, options) is not None:
        raise CheckpointError(f"'{source}' holds an adapter ({ADAPTER_CONFIG}), not only a model: {_WHAT_TO_DO}")


def _check_kind(adapter: AdapterFiles) -> None:
    config = adapter.config
    kind, task = config.get("peft_type"), config.get("task_type")
    start = config.get("init_lora_weights", True)
    what = None
    if kind not in _MERGEABLE:
        what = f"of the kind {kind}, which impart-hf does not merge into a base"
    elif task == "SEQ_CLS":
        what = "of a classifier"
    elif task not in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"):
        what = f"for the task {task}, and not for a causal language model"
    elif config.get("layer_replication"):
        what = "with layer_replication: it repeats layers of its base"
    elif start not in _KEEPS_THE_BASE:
        what = f"with init_lora_weights '{start}', which replaces the base's own weights"
    if what is not None:
        raise CheckpointError(f"'{adapter.source}' is an adapter {what}: {_WHAT_TO_DO}")
