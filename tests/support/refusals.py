"""Compressions that must be refused, with a look at what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from impart_hf import LowRankConfig, compress
from impart_hf.methods import MethodConfig
from support.tiny_models import Pair

METHOD = LowRankConfig(compression_ratio=3)


def run(pair: Pair, output: Path | None = None, method: MethodConfig = METHOD, **kwargs: Any) -> Any:
    return compress(str(pair.base), str(pair.finetuned), output or pair.base.parent / "out" / "delta", method, **kwargs)


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refuses(
    pair: Pair,
    error: type[Exception],
    match: str,
    output: Path | None = None,
    *,
    root: Path | None = None,
    **kwargs: Any,
) -> str:
    """The message of the error, after a look that the run left everything in `root`, by default the pair's folder, as
    it was."""
    root = root or pair.base.parent
    before = tree(root)
    with pytest.raises(error, match=match) as caught:
        run(pair, output, **kwargs)
    assert tree(root) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)
