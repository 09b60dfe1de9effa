"""What several modules of tests of serving share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tenants(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the family's deltas, which a module's tests may change and must restore."""
    tenants = tmp_path_factory.mktemp("tenants")
    for name in ("one", "two", "three"):
        shutil.copytree(family / name, tenants / name)
    return tenants
