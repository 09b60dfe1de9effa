"""Writing safetensors files entry by entry, with one entry in memory at a time."""

import itertools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.serialization import split_state_dict_into_shards_factory

from ..common.validation import shard_bytes

_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        dtype: safetensors name of its dtype, such as "BF16".
        size: size of its data, in bytes.
        data: returns the data; called once, when the entry is written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    data: Callable[[], bytes]


def header_bytes(entries: Iterable[Entry], metadata: dict[str, str]) -> bytes:
    """Return the length word and JSON header of a file that holds these entries in this order."""
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for entry in entries:
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + entry.size]}
        at += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, entries: list[Entry], metadata: dict[str, str]) -> None:
    """Write a file and flush it to disk. Entries keep their order: wide dtypes must come first to be aligned.

    Raises:
        ValueError: if an entry's data has another size than stated.
        OSError: if the disk is full or cannot be written.
    """
    file = SafetensorsFile(path, entries, metadata)
    file.make()
    file.fill(entries)


class SafetensorsFile:
    """A file to be written by one process or by several, each of which writes other entries.

    The first one calls `make`, then all call `fill` with their entries.
    """

    def __init__(self, path: Path, entries: list[Entry], metadata: dict[str, str]):
        """Lay the file out; arguments as for `write_safetensors`."""
        self._path, self._header = path, header_bytes(entries, metadata)
        ends = itertools.accumulate((entry.size for entry in entries), initial=len(self._header))
        self._starts = dict(zip([entry.name for entry in entries], ends, strict=False))

    def make(self) -> None:
        """Write the header."""
        self._path.write_bytes(self._header)

    def fill(self, entries: Iterable[Entry]) -> None:
        """Write the data of entries to their places, and flush it to disk; errors as for `write_safetensors`."""
        with self._path.open("r+b") as file:
            for entry in entries:
                data = entry.data()
                if len(data) != entry.size:
                    raise ValueError(f"the data of {entry.name} has {len(data)} bytes instead of {entry.size}")
                file.seek(self._starts[entry.name])
                file.write(data)
            file.flush()
            os.fsync(file.fileno())


def shard_entries(
    entries: list[Entry], filename: str, max_shard_size: int | str
) -> tuple[dict[str, list[Entry]], dict | None]:
    """Spread entries over files, as transformers does.

    Args:
        filename: name of the file if one is enough, such as "model.safetensors".
        max_shard_size: bytes, or a string such as "5GB".

    Returns:
        The entries of each file, and the index's content, or None if there is one file.
    """
    by_name = {entry.name: entry for entry in entries}
    stem, suffix = os.path.splitext(filename)
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.size,
        filename_pattern=f"{stem}{{suffix}}{suffix}",
        max_shard_size=shard_bytes(max_shard_size),
    )
    files = {name: [by_name[n] for n in members] for name, members in split.filename_to_tensors.items()}
    if not split.is_sharded:
        return files, None
    return files, {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
