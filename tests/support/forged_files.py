"""Delta files written by hand, with checksums that hold.

forge_record(folder, lambda data: data[:-1])
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

DELTA = "delta_model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"

Entries = dict[str, tuple[str, list[int], bytes]]


def read_entries(path: Path) -> Entries:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    body = data[8 + size :]
    return {name: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for name, e in header.items()}


def with_checksums(entries: Entries) -> Entries:
    covered = sorted(name for name in entries if name != "crc32")
    described = [
        f"{name} {entries[name][0]} {'x'.join(map(str, entries[name][1]))}\n".encode() + entries[name][2]
        for name in covered
    ]
    table = b"".join(zlib.crc32(entry).to_bytes(4, "little") for entry in described)
    return {**{n: entries[n] for n in covered}, "crc32": ("U32", [len(covered)], table)}


def header_of(entries: Entries) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    return header


def replace(path: Path, data: bytes | bytearray) -> None:
    """A new file of that name: the old one may still be mapped, by threads of a load that has failed already."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def write_file(path: Path, header: bytes, body: bytes) -> None:
    replace(path, len(header).to_bytes(8, "little") + header + body)


def write_entries(path: Path, entries: Entries) -> None:
    header = json.dumps(header_of(entries)).encode()
    write_file(path, header + b" " * (-len(header) % 8), b"".join(data for _, _, data in entries.values()))


def forge(folder: Path, edit: Callable[[Entries], Any], checksums: bool = True) -> None:
    """Change the entries of the delta file, so that every checksum holds (or not, for edits of the table itself)."""
    entries = read_entries(folder / DELTA)
    edit(entries)
    write_entries(folder / DELTA, with_checksums(entries) if checksums else entries)


def forge_record(
    folder: Path, edit: Callable[[bytes], bytes], name: str = UP, kind: Literal["delta", "exact"] = "delta"
) -> None:
    def put(entries: Entries) -> None:
        data = edit(entries[f"{name}.{kind}"][2])
        entries[f"{name}.{kind}"] = ("U8", [len(data)], data)

    forge(folder, put)


def of_another_base(entries: Entries) -> None:
    """Change the recorded checksums of the base."""
    dtype, shape, data = entries["base_checksums"]
    entries["base_checksums"] = (dtype, shape, bytes(byte ^ 1 for byte in data[:-8]) + data[-8:])
