"""Files of which many are written, one after the other, and which only a later run reads.

They are not flushed to disk one by one, which takes milliseconds each. After a power cut a file may be empty or cut
off, although its name is there: a checksum tells.
"""

import os
import zlib
from pathlib import Path

_CHECKSUM_BYTES = 4


def write_checked(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all unless the power fails; `read_checked` tells whether it is whole."""
    temporary = path.with_suffix(".writing")
    with temporary.open("wb") as file:
        file.write(zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little"))
        file.write(data)
    os.replace(temporary, path)


def read_checked(path: Path) -> bytes | None:
    """Return what `write_checked` wrote; None if there is no file, or a damaged one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    checksum, data = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    return data if zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little") == checksum else None


def checked_bytes(path: Path) -> int:
    """Return the size of what `read_checked` returns for a whole file, in bytes."""
    return path.stat().st_size - _CHECKSUM_BYTES
