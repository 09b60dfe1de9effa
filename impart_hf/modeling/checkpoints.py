"""Lazy access to the tensors of a checkpoint: a local folder or a Hub repository, safetensors or pytorch_model.bin.

Files are memory-mapped, and a tensor is read when it is asked for: the model is never in memory as a whole.
"""

import json
import os
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .checksums import tensor_bytes, tensor_checksum
from .model_files import (
    CheckpointError,
    HubOptions,
    fetch_config,
    fetch_file,
    read_json,
)
from .repository_kind import RepositoryKind, kind_of
from .transfer import to_device
from .wrapper_names import unwrapped

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# In transformers' order: where a folder has been saved to twice, it loads the first of these.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TIED_OUTPUT = "lm_head.weight"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
# Buffers in old LLaMA checkpoints, which current models do not load.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is free of NaN and infinity."""
    # `aminmax` propagates NaN, and takes a tenth of the time of `isfinite().all()`.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all())


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one dtype have the same shape and values; NaN counts as the same as itself."""
    if one.shape != other.shape:
        return False
    if torch.equal(one, other):
        return True
    return not all_finite(one) and tensor_bytes(one).tobytes() == tensor_bytes(other).tobytes()


class Checkpoint:
    """The tensors of one checkpoint, by name.

    Attributes:
        source, options: the folder or Hub id that it was opened from, and the options used.
        config: the content of its config.json.
        folder: the folder that holds its files; for a Hub repository, in the Hub's cache.
        folders: this one alone.
        tied: whether the output projection shares the input embeddings.
        weight_bytes: size of its weight files on disk, in bytes.
    """

    def __init__(self, source: str, options: HubOptions, tied: bool | None = None):
        """Open a checkpoint, reading only JSON files and headers.

        Args:
            source: local folder or Hub id.
            options: revision, token and cache.
            tied: whether the output projection shares the input embeddings, in which case a stored copy of it is
                ignored; None takes it from config.json.

        Raises:
            CheckpointError: if the checkpoint cannot be reached or read, or holds no weights.
        """
        self.source, self.options = source, options
        self.config, self.folder = fetch_config(source, options)
        self.folders = {self.folder}
        if kind_of(self.config) is RepositoryKind.DELTA:
            raise CheckpointError(f"'{source}' is a delta repository; make it dense with `impart-hf reconstruct` first")
        if self.config.get("quantization_config"):
            raise CheckpointError(f"'{source}' is a quantised checkpoint; only float weights have a delta")
        self._files, self._index = self._find_weights()
        self._handles: dict[Path, Any] = {}
        self._lock = threading.Lock()
        self.tied = ties_embeddings(self.config) if tied is None else tied
        self._locations = self._list_tensors()
        self._names = sorted(
            name
            for name in self._locations
            if not name.endswith(_IGNORED_SUFFIX) and not (self.tied and name == TIED_OUTPUT)
        )
        self.weight_bytes = sum(path.stat().st_size for path in self._files)

    def _fetch(self, filename: str) -> Path:
        path = fetch_file(self.source, filename, self.options)
        if path is None:
            raise CheckpointError(
                f"'{self.source}' names the weight file {filename}, but does not have it: download it"
            )
        return path

    def _find_weights(self) -> tuple[list[Path], dict[str, str]]:
        for filename in WEIGHT_FILES:
            path = fetch_file(self.source, filename, self.options)
            if path is None:
                continue
            if not filename.endswith(".index.json"):
                return [path], {}
            index = read_json(path).get("weight_map")
            if not index or not isinstance(index, dict) or not all(is_plain_name(v) for v in index.values()):
                raise CheckpointError(f"{path} has no valid weight_map from tensor names to files in its folder")
            return [self._fetch(name) for name in sorted(set(index.values()))], index
        fetch_file(self.source, "model.safetensors", self.options, required=True)  # raises if offline
        others = self._other_weights()
        hint = (
            f"; it has {others[0]}, which cannot be read as one of them: rename, convert or link it" if others else ""
        )
        raise CheckpointError(f"'{self.source}' has none of the weight files {', '.join(WEIGHT_FILES)}{hint}")

    def _other_weights(self) -> list[str]:
        """Return the names of a local folder's files that look like weights: of a variant, of another format."""
        if not os.path.isdir(self.source):
            return []
        found = sorted(path for path in self.folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
        return [f"{path.name} (a broken link)" if not path.exists() else path.name for path in found]

    def _list_tensors(self) -> dict[str, tuple[Path, str]]:
        """Return every tensor's file and its name in that file."""
        files: dict[str, list[Path]] = {}
        for path in self._files:
            for stored in self._open(path).keys():
                files.setdefault(stored, []).append(path)
        if missing := sorted(name for name in set(self._index) - set(files) if not self._is_dispensable(name)):
            raise CheckpointError(f"'{self.source}': the index lists {missing[0]}, but no weight file holds it")
        locations: dict[str, tuple[Path, str]] = {}
        for stored, name in unwrapped(files).items():
            for place in ((path, stored) for path in files[stored]):
                if not self._same_tensor(locations.setdefault(name, place), place):
                    raise CheckpointError(
                        f"'{self.source}': tensor {name} is in two weight files or under two names, with different "
                        "values: remove one"
                    )
        return locations

    def _is_dispensable(self, name: str) -> bool:
        """Return whether a model loads without a tensor that the index lists: it is tied, or a buffer of old."""
        tied = ties_embeddings(self.config) and f".{name}".endswith(f".{TIED_OUTPUT}")
        return tied or name.endswith(_IGNORED_SUFFIX)

    def _same_tensor(self, one: tuple[Path, str], other: tuple[Path, str]) -> bool:
        """Return whether two places hold the same values; only a tensor that is stored twice is read."""
        if one == other:
            return True
        first, second = (self._read(place, lambda view: view[...], lambda tensor: tensor) for place in (one, other))
        return first.dtype == second.dtype and same_values(first, second)

    def _open(self, path: Path) -> Any:
        with self._lock:
            if path not in self._handles:
                try:
                    if path.suffix == ".safetensors":
                        self._handles[path] = safe_open(str(path), framework="pt")
                    else:
                        self._handles[path] = _open_bin(path)
                except (SafetensorError, OSError, ValueError) as error:
                    raise CheckpointError(f"{path} cannot be read as a weight file: {error}") from error
            return self._handles[path]

    def names(self) -> list[str]:
        """Return the tensors' names, sorted: without buffers of old, and without a tied output projection."""
        return list(self._names)

    def stored_names(self) -> list[str]:
        """Return the names of all tensors that it holds, sorted."""
        return sorted(self._locations)

    def _look_up(self, name: str, on_slice: Callable[[Any], Any], on_tensor: Callable[[torch.Tensor], Any]) -> Any:
        return self._read(self._locations[name], on_slice, on_tensor)

    def _read(
        self, place: tuple[Path, str], on_slice: Callable[[Any], Any], on_tensor: Callable[[torch.Tensor], Any]
    ) -> Any:
        path, stored = place
        handle = self._open(path)
        return on_tensor(handle[stored]) if isinstance(handle, dict) else on_slice(handle.get_slice(stored))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the file's header."""
        return tuple(self._look_up(name, lambda s: s.get_shape(), lambda t: t.shape))

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, from the file's header.

        Raises:
            CheckpointError: if deltas do not support the dtype.
        """

        def from_slice(view: Any) -> torch.dtype:
            if view.get_dtype() not in SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"'{self.source}': {name} has the unsupported dtype {view.get_dtype()}: convert it to float weights"
                )
            return SAFETENSORS_DTYPES[view.get_dtype()]

        return self._look_up(name, from_slice, lambda t: t.dtype)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the tensor on a device; on the CPU it is mapped from the file if the format allows that.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        try:
            stored: torch.Tensor = self._look_up(name, lambda s: s[...], lambda t: t)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"'{self.source}': {name} cannot be read: {error}") from error
        return to_device(stored, device)

    def tensor_and_checksum(self, name: str) -> tuple[torch.Tensor, int]:
        """Return the tensor on the CPU, and its checksum (`checksums.tensor_checksum`); errors as for `tensor`."""
        tensor = self.tensor(name)
        return tensor, tensor_checksum(tensor)


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json says that the output projection shares the input embeddings."""
    # Some architectures tie them by default, and their config.json then omits the field.
    model_type = str(config.get("model_type"))
    default = (
        getattr(CONFIG_MAPPING[model_type], "tie_word_embeddings", False) if model_type in CONFIG_MAPPING else False
    )
    return bool(config.get("tie_word_embeddings", default))


def config_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config.json's fields with transformers' notation for infinity decoded.

    It is a copy because transformers modifies nested fields.
    """
    return json.loads(json.dumps(content), object_hook=_special_float)


def _special_float(field: dict[str, Any]) -> Any:
    """Decode {"__float__": "Infinity"} to a float; return other objects unchanged."""
    return float(field["__float__"]) if field.keys() == {"__float__"} else field


def text_config(content: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the decoder's configuration from a config.json, its fields named as in transformers for any architecture.

    Args:
        content: the whole config.json; if transformers does not know the model type, its field names are kept.
    """
    fields = config_fields(content)
    model_type = str(fields.pop("model_type", None))
    kind = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else PreTrainedConfig
    return kind.from_dict(fields).get_text_config(decoder=True)


def config_for(model_class: Any, config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration that a model class takes, as transformers' Auto classes choose it.

    Of a model for text and images that is the text's part, if the class is that of the language model alone.
    """
    part = config.sub_configs.get("text_config")
    return config.get_text_config() if part is not None and model_class.config_class == part else config


def is_plain_name(value: object) -> bool:
    """Return whether a value from a JSON file is the name of a file in the same folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and os.path.basename(value) == value


def _open_bin(path: Path) -> dict[str, torch.Tensor]:
    """Open a pytorch_model*.bin as a dict of memory-mapped tensors; no code in it can run (weights_only)."""
    try:
        # Files written before torch 1.6 are not zip archives and cannot be mapped, so they are read whole.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or refused pickle can raise anything
        raise ValueError(str(error).split("\n")[0]) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in tensors.items()
    ):
        raise ValueError("it does not hold a dictionary of dense tensors")
    return {name: tensor.detach() for name, tensor in tensors.items()}
