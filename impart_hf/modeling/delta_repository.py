"""A delta repository with its base model: the fine-tuned tensors, decoded one at a time."""

import hashlib
import zlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from .base_tensors import BaseTensors, finite_where_base_is
from .checkpoints import DTYPE_NAMES, SAFETENSORS_DTYPES, Checkpoint, all_finite, is_plain_name
from .checksums import tensor_bytes, tensor_checksum
from .configuration_delta_compressed import DeltaCompressedConfig
from .deferred_tensor import Index, part_ranges
from .delta_decode import add_delta, add_delta_part
from .delta_record import DeltaFormatError
from .model_files import CheckpointError, HubOptions, fetch_file, read_json
from .tensors import LazyTensor
from .transfer import ahead, to_device

DELTA_FILE = "delta_model.safetensors"
DELTA_INDEX = DELTA_FILE + ".index.json"
RECORD_SUFFIX = ".delta"  # entry with a tensor's records
ROWS_SUFFIX = ".added_rows"  # entry with the rows that the fine-tune adds to the base's
BASE_CHECKSUMS = "base_checksums"
CRC_ENTRY = "crc32"
# Most bytes of a base tensor that waits on an accelerator: a layer's matrices may, the largest vocabularies' may not.
_MOST_AHEAD = 512 << 20


Buffer: TypeAlias = bytes | memoryview


class WrongBaseError(ValueError):
    """The base model is not the one that the delta was made against."""


def entry_crc(name: str, dtype: str, shape: tuple[int, ...], data: Buffer) -> int:
    """Return the CRC-32 of an entry: of its name, safetensors dtype and shape, and its data."""
    line = f"{name} {dtype} {'x'.join(map(str, shape))}\n"
    return zlib.crc32(data, zlib.crc32(line.encode()))


@dataclass(frozen=True)
class TensorParts:
    """The delta file's entries for one fine-tuned tensor; all None if it equals the base's."""

    records: str | None = None
    replacement: str | None = None
    added_rows: str | None = None


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

    def read_finite(self, name: str) -> torch.Tensor:
        """Read one entry and check that it is free of NaN and infinity; errors as for `read`."""
        tensor = self.read(name)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise DeltaFormatError(f"{self._paths[name]}: delta entry {name} holds NaN or infinity")
        return tensor

    def read_records(self, name: str) -> np.ndarray:
        return tensor_bytes(self.read(name + RECORD_SUFFIX))


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
    for name in sorted(set(_weight_map(index_path).values())):
        path = fetch_file(repo, name, options)
        if path is None:
            raise CheckpointError(f"'{repo}' lacks {name}, which {DELTA_INDEX} names: download it")
        paths.append(path)
    return paths, index_path


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json(index_path).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(is_plain_name(n) for n in weight_map.values()):
        raise DeltaFormatError(f"{index_path} has no valid weight_map from entries to files in its folder")
    return weight_map


class DeltaRepository:
    """The fine-tuned tensors of a delta repository, decoded with its base.

    Attributes:
        source: folder or Hub id of the delta repository.
        config: its configuration.
        text_config: the fine-tuned model's configuration.
        options: how its files are found on the Hub.
        base: the base's tensors, by the names of the fine-tuned ones that rest on them.
        base_checksums: checksums of the whole tensors of the base that the delta was made against, by these names.
        file: the delta file's entries.
    """

    def __init__(
        self,
        source: str,
        config: DeltaCompressedConfig,
        options: HubOptions,
        base_model: str | None = None,
    ):
        """Open repository and base, reading and comparing headers but no weights.

        Args:
            source: folder or Hub id of the delta repository.
            config: its configuration.
            options: how files are found on the Hub; the revision is the delta repository's.
            base_model: folder or Hub id of the base, instead of the recorded one.

        Raises:
            CheckpointError: if a file or the base is missing or cannot be accessed.
            DeltaFormatError: if the delta file is damaged or does not fit the base's tensors.
            WrongBaseError: if the base has other tensors than the delta was made against.
        """
        self.source, self.config, self.options = source, config, options
        if not isinstance(config.text_config, PreTrainedConfig) or config.text_config.model_type == config.model_type:
            raise DeltaFormatError(f"config.json of '{source}' has no text_config of a fine-tuned model")
        self.text_config = config.text_config
        paths, index = find_delta_files(source, options)
        self.file = DeltaFile(paths)
        if index and sorted(_weight_map(index)) != self.file.names():
            # Without this check, a tensor whose entry is missing would be taken to equal the base's.
            raise DeltaFormatError(f"{index} names other entries than its files hold: download them again")
        self.base = self._open_base(base_model, options)
        self.base_checksums = self._read_checksums()
        self._check_row_counts()
        self.parts = self._match_entries()
        for name, part in self.parts.items():
            self._check_parts(name, part)

    def _open_base(self, base_model: str | None, options: HubOptions) -> BaseTensors:
        recorded = self.config.base_model_name_or_path
        revision = self.config.base_model_revision if base_model is None else None
        tied = bool(self.config.tie_word_embeddings)
        try:
            base = Checkpoint(base_model or recorded, replace(options, revision=revision, subfolder=""), tied)
        except CheckpointError as error:
            where = f" at commit {revision}" if revision else ""
            raise CheckpointError(
                f"the base model of '{self.source}' ('{base_model or recorded}'{where}) cannot be opened: {error}. "
                "A local copy can be given with base_model= (load_delta: base_files=; commands: --base-model; vLLM: "
                "IMPART_HF_BASE_MODEL)"
            ) from error
        others = self.config.base_tensors or {}
        if missing := sorted(set(others.values()) - set(base.stored_names())):
            raise WrongBaseError(self._other_tensors(base, f": it has no {missing[0]}"))
        return BaseTensors(base, self.config.absent_tensors or (), self.config.row_counts, others)

    def _other_tensors(self, base: BaseTensors | Checkpoint, detail: str = "") -> str:
        return (
            f"'{base.source}' is not the base of '{self.source}': it has other tensors than "
            f"'{self.config.base_model_name_or_path}'{self._base_revision()}, which the delta was made against{detail}"
        )

    def _check_row_counts(self) -> None:
        for name, rows in self.base.row_counts.items():
            shape = self.base.checkpoint.shape(self.base.stored_name(name)) if name in self.base_checksums else ()
            if not shape or not 0 <= rows < shape[0]:
                raise DeltaFormatError(
                    f"row_counts in config.json of '{self.source}' gives {name} {rows} rows, which is not a part of a "
                    f"tensor of the base '{self.base.source}'"
                )

    def _match_entries(self) -> dict[str, TensorParts]:
        """Assign the file's entries to fine-tuned tensors, with an error for any that belongs to none."""
        parts = dict.fromkeys(self.base.names(), TensorParts())
        for entry in self.file.names():
            if entry == BASE_CHECKSUMS:
                continue
            name, kind = _entry_kind(entry, parts)
            if name not in parts:
                raise DeltaFormatError(f"delta entry {entry} belongs to no tensor of the base '{self.base.source}'")
            dtype = self.file.dtype_name(entry)
            if kind == "records" and (dtype != "U8" or len(self.file.shape(entry)) != 1):
                raise DeltaFormatError(f"delta entry {entry} must be one-dimensional bytes (U8)")
            if kind != "records" and dtype not in SAFETENSORS_DTYPES:
                raise DeltaFormatError(f"delta entry {entry} has the unknown dtype {dtype}")
            if self.base.dtype(name).is_floating_point != (kind == "records" or _is_float(dtype)):
                raise DeltaFormatError(f"delta entry {entry} does not fit {name}, which is {self.base.dtype(name)}")
            parts[name] = replace(parts[name], **{kind: entry})
        return parts

    def _check_parts(self, name: str, part: TensorParts) -> None:
        base_shape, dtype = self.base.shape(name), self.dtype(name)
        if part.replacement and part.records:
            raise DeltaFormatError(f"{name} is both replaced and changed by records in the delta file")
        if part.replacement and self.file.shape(part.replacement) != base_shape:
            raise DeltaFormatError(f"{name} has shape {self.file.shape(part.replacement)}, the base has {base_shape}")
        if part.records and len(base_shape) not in (2, 3):
            raise DeltaFormatError(f"{name} has records, but its shape {base_shape} is not of 2 or 3 axes")
        if part.added_rows:
            rows = self.file.shape(part.added_rows)
            if self.file.dtype_name(part.added_rows) != DTYPE_NAMES[dtype]:
                raise DeltaFormatError(f"the rows added to {name} have another dtype than the tensor, {dtype}")
            if len(base_shape) not in (1, 2) or len(rows) != len(base_shape) or rows[1:] != base_shape[1:]:
                raise DeltaFormatError(f"rows of shape {rows} cannot be added to {name}, the base has {base_shape}")

    def _read_checksums(self) -> dict[str, int]:
        names = self.base.names()
        if (
            BASE_CHECKSUMS not in self.file
            or self.file.dtype_name(BASE_CHECKSUMS) != "U64"
            or len(self.file.shape(BASE_CHECKSUMS)) != 1
        ):
            raise DeltaFormatError(f"the delta file of '{self.source}' has no checksums of its base")
        table = self.file.read(BASE_CHECKSUMS).tolist()
        if len(table) != len(names) + 1 or table[-1] != names_checksum(names):
            raise WrongBaseError(self._other_tensors(self.base))
        return dict(zip(names, table, strict=False))

    def _base_revision(self) -> str:
        revision = self.config.base_model_revision
        return f" at commit {revision}" if revision else ""

    def names(self) -> list[str]:
        """Return the names of the fine-tuned tensors, sorted."""
        return self.base.names()

    def is_changed(self, name: str) -> bool:
        """Return whether the delta file has an entry for a tensor."""
        return self.parts[name] != TensorParts()

    def shape(self, name: str) -> tuple[int, ...]:
        shape, rows = self.base.shape(name), self.parts[name].added_rows
        return (shape[0] + self.file.shape(rows)[0], *shape[1:]) if rows else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the fine-tuned tensor was published."""
        if replacement := self.parts[name].replacement:
            return SAFETENSORS_DTYPES[self.file.dtype_name(replacement)]
        if not self.base.dtype(name).is_floating_point:
            return self.base.dtype(name)
        stated = (self.config.tensor_dtype_exceptions or {}).get(name, self.config.tensor_dtype)
        dtype = getattr(torch, stated, None)
        if dtype not in DTYPE_NAMES or not dtype.is_floating_point:
            raise DeltaFormatError(f"config.json states the unknown dtype '{stated}' for {name}")
        return dtype

    def base_tensor(self, name: str) -> torch.Tensor:
        """Return the part of the base's tensor that base and fine-tune share, on the CPU, after checking its checksum.

        Raises:
            WrongBaseError: if it is not the tensor that the delta was made against.
        """
        tensor = self.base.whole(name)
        if tensor_checksum(tensor) != self.base_checksums[name]:
            raise WrongBaseError(
                f"'{self.base.source}' is not the base of '{self.source}': its tensor {self.base.stored_name(name)} "
                "differs from that of "
                f"'{self.config.base_model_name_or_path}'{self._base_revision()}"
            )
        return self.base.shared(name, tensor)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the fine-tuned tensor, decoded on `device`, in the dtype in which it was published.

        Raises:
            WrongBaseError: if the base's tensor is not the one that the delta was made against.
            DeltaFormatError: if the delta's entries are damaged or do not fit.
        """
        return self._decoded(name, self._checked_base(name, device))

    def tensors(
        self, device: torch.device | str = "cpu", names: Sequence[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Return fine-tuned tensors with their names, as `tensor` returns them, one at a time.

        On an accelerator, each tensor of the base is read and goes over while the one before is decoded and used, if it
        is not so large that memory for both could be short.

        Args:
            names: in which order; None for all, sorted.
        """
        names = self.names() if names is None else names
        bases = ahead(names, self._checked_base, device, lambda name: self.base.size(name) <= _MOST_AHEAD)
        return map(lambda pair: (pair[0], self._decoded(*pair)), bases)  # a loop would keep the base's tensor

    def _checked_base(self, name: str, device: torch.device | str) -> torch.Tensor:
        return to_device(self.base_tensor(name), device)  # always read, so that a wrong base is detected

    def _decoded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the fine-tuned tensor, on the device of its base's tensor."""
        part, dtype, device = self.parts[name], self.dtype(name), tensor.device
        if part.replacement:
            stored = to_device(self.file.read(part.replacement), device)
            if stored.is_floating_point() and not finite_where_base_is(stored, tensor):
                raise DeltaFormatError(f"delta entry {part.replacement} holds NaN or infinity")
            tensor = stored
        elif part.records:
            tensor = add_delta(tensor, self.file.read_records(name), name, dtype)
        else:
            tensor = tensor.to(dtype)
        if part.added_rows:
            tensor = torch.cat([tensor, self.file.read_finite(part.added_rows).to(device)])
        return tensor

    def part(self, name: str, index: Index, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return a part of a fine-tuned tensor, decoded on `device`; errors as for `tensor`.

        Only the part is decoded and goes over to the device, except of tensors that are replaced, have added rows or
        are stacks of matrices.

        Args:
            index: what selects the part, as in `tensor(name)[index]`.
        """
        entries, shape = self.parts[name], self.shape(name)
        ranges = part_ranges(index, shape)
        as_a_whole = entries.replacement or entries.added_rows or (entries.records and len(shape) != 2)
        if ranges is None or as_a_whole or ranges == [range(size) for size in shape]:
            whole = self.tensor(name, device)
            part = whole[index]
            return part if part.numel() == whole.numel() else part.clone()  # the rest is not kept
        wanted = tuple(slice(chosen.start, chosen.stop) for chosen in ranges)
        part_of_base = to_device(self.base_tensor(name)[wanted], device)
        if not entries.records:
            return part_of_base.to(self.dtype(name))
        data = self.file.read_records(name)
        return add_delta_part(part_of_base, data, name, self.dtype(name), (shape[0], shape[1]), wanted[0], wanted[1])

    def lazy_state_dict(self, decoded: bool = True) -> dict[str, LazyTensor]:
        """Return all fine-tuned tensors as objects that are decoded where transformers puts them.

        Args:
            decoded: False for zeros instead of the values, where those would be dropped.
        """
        return {name: LazyTensor(self, name, self.part if decoded else self._zeros) for name in self.names()}

    def _zeros(self, name: str, index: Index, device: torch.device) -> torch.Tensor:
        part = torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")[index]
        return torch.zeros_like(part, device=device)


def names_checksum(names: list[str]) -> int:
    """Return the 64-bit checksum of a sorted list of tensor names, the last number of the checksum table."""
    return int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:8], "little")


def _is_float(dtype_name: str) -> bool:
    return SAFETENSORS_DTYPES[dtype_name].is_floating_point


def _entry_kind(entry: str, names: Container[str]) -> tuple[str, str]:
    """Return the tensor that an entry belongs to, and the field of its `TensorParts`."""
    if entry in names:
        return entry, "replacement"
    for suffix, kind in ((RECORD_SUFFIX, "records"), (ROWS_SUFFIX, "added_rows")):
        if entry.endswith(suffix):
            return entry[: -len(suffix)], kind
    return entry, "replacement"
