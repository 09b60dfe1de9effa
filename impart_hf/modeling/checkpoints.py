"""Lazy access to the tensors of a checkpoint: a local folder or a Hub repository, safetensors or pytorch_model.bin.

Nothing is read before it is asked for, and files are mapped, not loaded: the model is never in memory as a whole.
"""

import json
import os
import threading
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .repository_kind import RepositoryKind, kind_of

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
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
TIED_OUTPUT = "lm_head.weight"
# Buffers that old LLaMA checkpoints carry and no model loads any more.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


class CheckpointError(OSError):
    """A checkpoint that is missing, cannot be reached, or cannot be read."""


@dataclass(frozen=True)
class HubOptions:
    """What huggingface_hub needs to find and fetch a file; the names are `from_pretrained`'s."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""

    def __deepcopy__(self, memo: dict) -> "HubOptions":
        return self

    def __reduce__(self) -> tuple:
        """A pickle may travel, a token must not: it is left out."""
        fields = (self.revision, None, self.cache_dir, self.local_files_only, self.force_download, self.subfolder)
        return HubOptions, fields


def fetch_file(repo: str, filename: str, options: HubOptions, required: bool = False) -> Path | None:
    """Path of one file of a local folder or Hub repository; None if the repository does not have it.

    Where the Hub is offline, a file that is not in the cache is taken for missing if others of the repository are
    there: nothing tells a file that was not downloaded from one that does not exist. With `required`, it is an error.

    Raises:
        CheckpointError: if the repository, revision or network is the problem, saying which and what to do.
    """
    if os.path.isdir(repo):
        path = Path(repo, options.subfolder, filename)
        return path if path.is_file() else None
    revision = options.revision or "main"
    try:
        return Path(
            hf_hub_download(
                repo,
                filename,
                subfolder=options.subfolder or None,
                revision=options.revision,
                token=options.token,
                cache_dir=options.cache_dir,
                local_files_only=options.local_files_only,
                force_download=options.force_download,
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"'{repo}' is gated: accept its terms on the Hub and log in (`hf auth login`), or pass token="
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"'{repo}' is neither a local folder nor a repository that can be read on the Hub; if it is private, "
            "log in (`hf auth login`) or pass token="
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"'{repo}' has no revision '{revision}'") from error
    except LocalEntryNotFoundError as error:
        if not required and filename != "config.json" and fetch_file(repo, "config.json", options):
            return None
        raise CheckpointError(
            f"'{filename}' of '{repo}' is not in the local cache, and the Hub is offline; there is no folder '{repo}'"
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise CheckpointError(f"'{repo}' is neither a local folder nor a valid Hub id (owner/name)") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"'{filename}' of '{repo}' could not be fetched: {error}") from error


def pinned(repo: str, options: HubOptions) -> HubOptions:
    """The options with the commit that their revision stands for now, so that all files are of the same one.

    A local folder has none, and neither has a repository without a config.json: the options come back as they are.
    """
    config = None if os.path.isdir(repo) else fetch_file(repo, "config.json", options)
    if config is None:
        return options
    # The cache keeps files under snapshots/COMMIT, which also answers without a network.
    return replace(options, revision=config.parents[len(Path(options.subfolder).parts)].name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        CheckpointError: if it does not.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def fetch_config(repo: str, options: HubOptions) -> tuple[dict[str, Any], Path]:
    """The content of config.json of a local folder or Hub repository, and the folder where its files lie.

    Raises:
        CheckpointError: if the repository has none, or cannot be reached or read.
    """
    path = fetch_file(repo, "config.json", options)
    if path is None:
        raise CheckpointError(f"'{repo}' has no config.json: it is not a transformers checkpoint or delta repository")
    return read_json(path), path.parent


def repository_kind(repo: str, options: HubOptions) -> RepositoryKind:
    """The kind of model that a local folder or Hub repository holds; errors as `fetch_config`."""
    return kind_of(fetch_config(repo, options)[0])


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # `aminmax` hands NaN on, and takes a tenth of the time of `isfinite().all()`.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all())


class Checkpoint:
    """The tensors of one checkpoint, by name.

    Attributes:
        source, options: the folder or Hub id it was opened from, and how.
        config: its config.json.
        folder: where its files lie, in the Hub's cache if need be.
        tied: whether the output projection shares the input embeddings.
        weight_bytes: size on disk of its weight files, in bytes.
    """

    def __init__(self, source: str, options: HubOptions, tied: bool | None = None):
        """Open a checkpoint; only JSON files and headers are read.

        Args:
            source: local folder or Hub id.
            options: revision, token and cache.
            tied: whether the output projection shares the input embeddings, in which case a stored copy of it is
                passed over; None takes it from config.json.

        Raises:
            CheckpointError: if it cannot be reached or read, or holds no weights.
        """
        self.source, self.options = source, options
        self.config, self.folder = fetch_config(source, options)
        if kind_of(self.config) is RepositoryKind.DELTA:
            raise CheckpointError(f"'{source}' is a delta repository; make it dense with `impart-hf reconstruct` first")
        if self.config.get("quantization_config"):
            raise CheckpointError(f"'{source}' is a quantised checkpoint; only float weights have a delta")
        self._files, self._index = self._find_weights()
        self._handles: dict[Path, Any] = {}
        self._lock = threading.Lock()
        self.tied = _ties_embeddings(self.config) if tied is None else tied
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
            raise CheckpointError(f"'{self.source}' names the weight file {filename}, but does not have it")
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
                raise CheckpointError(f"{path} holds no valid weight_map")
            return [self._fetch(name) for name in sorted(set(index.values()))], index
        fetch_file(self.source, "model.safetensors", self.options, required=True)  # for its error, if offline
        raise CheckpointError(f"'{self.source}' has none of the weight files {', '.join(WEIGHT_FILES)}")

    def _list_tensors(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in self._files:
            for name in self._open(path).keys():
                if name in found:
                    raise CheckpointError(f"'{self.source}': tensor {name} stands in two weight files")
                found[name] = path
        if lost := sorted(set(self._index) - set(found)):
            raise CheckpointError(f"'{self.source}': the index names {lost[0]}, which no weight file holds")
        return found

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
        """The tensors' names, sorted."""
        return list(self._names)

    def has_untied_output(self) -> bool:
        """Whether the output projection that a tied checkpoint stores is none of its other tensors after all."""
        if not self.tied or TIED_OUTPUT not in self._locations:
            return False
        stored, shape = self.tensor(TIED_OUTPUT), self.shape(TIED_OUTPUT)
        return not any(self.shape(name) == shape and torch.equal(self.tensor(name), stored) for name in self._names)

    def _look_up(self, name: str, on_slice: Callable[[Any], Any], on_tensor: Callable[[torch.Tensor], Any]) -> Any:
        handle = self._open(self._locations[name])
        return on_tensor(handle[name]) if isinstance(handle, dict) else on_slice(handle.get_slice(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._look_up(name, lambda s: s.get_shape(), lambda t: t.shape))

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header alone.

        Raises:
            CheckpointError: if it is none that a delta can be made of.
        """

        def from_slice(view: Any) -> torch.dtype:
            if view.get_dtype() not in SAFETENSORS_DTYPES:
                raise CheckpointError(f"'{self.source}': {name} has the unsupported dtype {view.get_dtype()}")
            return SAFETENSORS_DTYPES[view.get_dtype()]

        return self._look_up(name, from_slice, lambda t: t.dtype)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor on a device; on the CPU mapped from the file, if the format allows it.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        try:
            stored: torch.Tensor = self._look_up(name, lambda s: s[...], lambda t: t)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"'{self.source}': {name} cannot be read: {error}") from error
        return stored.to(device)


def _ties_embeddings(config: dict[str, Any]) -> bool:
    # Some architectures tie them unless config.json says otherwise, and then it says nothing.
    model_type = str(config.get("model_type"))
    default = (
        getattr(CONFIG_MAPPING[model_type], "tie_word_embeddings", False) if model_type in CONFIG_MAPPING else False
    )
    return bool(config.get("tie_word_embeddings", default))


def config_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says, for transformers: a copy, as it rewrites nested fields, its own notation for infinities
    resolved."""
    return json.loads(json.dumps(content), object_hook=_special_float)


def _special_float(field: dict[str, Any]) -> Any:
    """What {"__float__": "Infinity"} means; other objects as they are."""
    return float(field["__float__"]) if field.keys() == {"__float__"} else field


def text_config(content: Mapping[str, Any]) -> PreTrainedConfig:
    """What a config.json says of the decoder, under transformers' own names whatever the architecture calls them.

    Args:
        content: the whole config.json; of a model that transformers does not know, names are taken as they are.
    """
    fields = config_fields(content)
    model_type = str(fields.pop("model_type", None))
    kind = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else PreTrainedConfig
    return kind.from_dict(fields).get_text_config(decoder=True)


def is_plain_name(value: object) -> bool:
    """Whether a value from a JSON file is the name of a file in the same folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and os.path.basename(value) == value


def _open_bin(path: Path) -> dict[str, torch.Tensor]:
    """A pytorch_model*.bin as a dict of mapped tensors; nothing in it can execute (weights_only)."""
    try:
        # Files from before torch 1.6 are not zip archives and cannot be mapped: such a shard is read whole.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a pickle that is damaged or refused can raise anything
        raise ValueError(str(error).split("\n")[0]) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in tensors.items()
    ):
        raise ValueError("it does not hold a dictionary of dense tensors")
    return {name: tensor.detach() for name, tensor in tensors.items()}
