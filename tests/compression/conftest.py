"""Fixtures that several test modules of compression use."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.tiny_models import Pair


@pytest.fixture
def pair(tiny_pair: Pair, tmp_path: Path) -> Pair:
    """A copy of the tiny pair in a folder of its own, that a test may spoil."""
    for folder in (tiny_pair.base, tiny_pair.finetuned):
        shutil.copytree(folder, tmp_path / "pair" / folder.name)
    return Pair(tmp_path / "pair" / tiny_pair.base.name, tmp_path / "pair" / tiny_pair.finetuned.name)
