"""Looking at repositories and at the hidden folders in which they grow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from impart_hf.compression.writer import CARD_BYTES, json_bytes
from impart_hf.storage.workspace import Workspace


def differing(one: Path, other: Path) -> list[str]:
    """Names of the files that are not the same in both folders.

    The reader's files are copies of this source tree, whatever the models; who edits it during a test is not punished.
    """
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".py"} for folder in (one, other))
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def counted_bytes(repository: Path) -> int:
    """What counts towards the ratio: delta files, their index, config.json, and a constant for a short model card.

    The forecast in config.json counts with the card.
    """
    counted = [*repository.glob("*.safetensors"), *repository.glob("*.index.json")]
    config = json.loads((repository / "config.json").read_text("utf-8"))
    config["method"].pop("kl_forecast", None)
    return CARD_BYTES + sum(path.stat().st_size for path in counted) + json_bytes(config)


def hidden(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


def finished(output: Path) -> dict[str, int]:
    """The finished records in the hidden folder, and when they were written."""
    folder = hidden(output) / "records"
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*") if not p.suffix} if folder.exists() else {}


def file_name(tensor: str) -> str:
    """The name of the file of a tensor's records."""
    return hashlib.sha256(tensor.encode()).hexdigest()[:32]


class Stop(BaseException):
    """A run that is interrupted."""


def break_off(compression: Callable[[], object], output: Path, after: int) -> dict[str, int]:
    """Leave the workspace as a compression to `output` leaves it that stops after some tensors."""
    put_record, count = Workspace.put_record, iter(range(after))

    def stopping(*args: Any) -> None:
        if next(count, None) is None:
            raise Stop
        put_record(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Workspace, "put_record", stopping)
        compression()
    assert len(finished(output)) == after and not output.exists()
    return finished(output)
