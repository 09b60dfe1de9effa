"""The entries of a delta repository's weight files, and what they are for (docs/FORMAT.md, "Tensors")."""

import hashlib
import zlib
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .checkpoints import all_finite, is_plain_name
from .checksums import tensor_bytes
from .delta_record import DeltaFormatError
from .model_files import CheckpointError, HubOptions, fetch_file, read_json

DELTA_FILE = "delta_model.safetensors"
DELTA_INDEX = DELTA_FILE + ".index.json"
RECORD_SUFFIX = ".delta"  # entry with a tensor's records
EXACT_SUFFIX = ".exact"  # entry with a tensor's exact record
ROWS_SUFFIX = ".added_rows"  # entry with the rows that the fine-tune adds to the base's
BASE_CHECKSUMS = "base_checksums"
CRC_ENTRY = "crc32"

Buffer: TypeAlias = bytes | memoryview


def entry_crc(name: str, dtype: str, shape: tuple[int, ...], data: Buffer) -> int:
    """Return the CRC-32 of an entry: of its name, safetensors dtype and shape, and its data."""
    line = f"{name} {dtype} {'x'.join(map(str, shape))}\n"
    return zlib.crc32(data, zlib.crc32(line.encode()))


@dataclass(frozen=True)
class TensorParts:
    """The delta file's entries for one fine-tuned tensor; all None if it equals the base's."""

    records: str | None = None
    exact: str | None = None
    replacement: str | None = None
    added_rows: str | None = None

    @property
    def holds_values(self) -> bool:
        """Whether the entry is the tensor's own values, whole or exact, and not a delta that is added."""
        return self.replacement is not None or self.exact is not None


class DeltaFile:
    """The entries of one or more delta_model*.safetensors, each checked against its CRC-32 as it is read."""

    def __init__(self, paths: list[Path]):
        """Open the files and read their headers and checksum tables.

        Raises:
            DeltaFormatError: if a file is truncated, has duplicate or overlapping entries, or no checksum table.
        """
        self._handles: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._crcs: dict[str, int] = {}
        for path in paths:
            try:
                handle = safe_open(str(path), framework="pt")
                names = sorted(handle.keys())
                if CRC_ENTRY not in names:
                    raise DeltaFormatError(f"{path} has no '{CRC_ENTRY}' table: it is not a delta file of impart-hf")
                names.remove(CRC_ENTRY)
                crcs = handle.get_tensor(CRC_ENTRY)
            except (SafetensorError, OSError, RuntimeError) as error:
                raise DeltaFormatError(f"{path} is damaged or not a safetensors file: {error}") from error
            if crcs.dtype != torch.uint32 or crcs.shape != (len(names),):
                raise DeltaFormatError(f"{path}: the '{CRC_ENTRY}' table does not cover the file's entries")
            for name, crc in zip(names, crcs.tolist(), strict=True):
                if name in self._handles:
                    raise DeltaFormatError(f"{path}: entry {name} is in two files")
                self._handles[name], self._paths[name], self._crcs[name] = handle, path, crc

    def names(self) -> list[str]:
        return sorted(self._handles)

    def checksums(self) -> dict[str, int]:
        """Return the CRC-32 of every entry."""
        return dict(self._crcs)

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype_name(self, name: str) -> str:
        return self._handles[name].get_slice(name).get_dtype()

    def read(self, name: str) -> torch.Tensor:
        """Read one entry.

        Raises:
            DeltaFormatError: if it cannot be read, or its CRC-32 differs.
        """
        try:
            tensor = self._handles[name].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise DeltaFormatError(f"{self._paths[name]}: delta entry {name} cannot be read: {error}") from error
        crc = entry_crc(name, self.dtype_name(name), self.shape(name), tensor_bytes(tensor).data)
        if crc != self._crcs[name]:
            raise DeltaFormatError(
                f"{self._paths[name]}: delta entry {name} is damaged (its CRC-32 differs); download the file again"
            )
        return tensor

    def start(self, name: str, count: int) -> np.ndarray:
        """Return the first bytes of an entry that has one axis of bytes, without checking its CRC-32.

        Raises:
            DeltaFormatError: if it cannot be read.
        """
        try:
            return self._handles[name].get_slice(name)[:count].numpy()
        except (SafetensorError, RuntimeError) as error:
            raise DeltaFormatError(f"{self._paths[name]}: delta entry {name} cannot be read: {error}") from error

    def read_finite(self, name: str) -> torch.Tensor:
        """Read one entry and check that it is free of NaN and infinity; errors as for `read`."""
        tensor = self.read(name)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise DeltaFormatError(f"{self._paths[name]}: delta entry {name} holds NaN or infinity")
        return tensor

    def read_records(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor's records."""
        return tensor_bytes(self.read(name + RECORD_SUFFIX))

    def read_exact(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor's exact record."""
        return tensor_bytes(self.read(name + EXACT_SUFFIX))


def find_delta_files(repo: str, options: HubOptions) -> tuple[list[Path], Path | None]:
    """Return the paths of a repository's delta files, and of their index if they are sharded.

    Raises:
        CheckpointError: if it has none, or lacks one that the index names.
    """
    single = fetch_file(repo, DELTA_FILE, options)
    if single is not None:
        return [single], None
    index_path = fetch_file(repo, DELTA_INDEX, options)
    if index_path is None:
        fetch_file(repo, DELTA_FILE, options, required=True)  # raises if the Hub is offline
        raise CheckpointError(f"'{repo}' has no {DELTA_FILE}: it is not a delta repository")
    paths = []
    for name in sorted(set(weight_map(index_path).values())):
        path = fetch_file(repo, name, options)
        if path is None:
            raise CheckpointError(f"'{repo}' lacks {name}, which {DELTA_INDEX} names: download it")
        paths.append(path)
    return paths, index_path


def weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json(index_path).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(is_plain_name(n) for n in weight_map.values()):
        raise DeltaFormatError(f"{index_path} has no valid weight_map from entries to files in its folder")
    return weight_map


def names_checksum(names: list[str]) -> int:
    """Return the 64-bit checksum of a sorted list of tensor names, the last number of the checksum table."""
    return int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:8], "little")


def entry_kind(entry: str, names: Container[str]) -> tuple[str, str]:
    """Return the tensor that an entry belongs to, and the field of its `TensorParts`."""
    if entry in names:
        return entry, "replacement"
    for suffix, kind in ((RECORD_SUFFIX, "records"), (EXACT_SUFFIX, "exact"), (ROWS_SUFFIX, "added_rows")):
        if entry.endswith(suffix):
            return entry[: -len(suffix)], kind
    return entry, "replacement"
