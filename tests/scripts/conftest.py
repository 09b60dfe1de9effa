"""What tests of several scripts share."""

from __future__ import annotations

import pytest
from support.few_processes import avoid_processes


@pytest.fixture
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a script's first task has a process of its own."""
    avoid_processes(monkeypatch)
