"""What a folder holds, by its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from impart_hf.modeling.model_files import CheckpointError, HubOptions, fetch_config, repository_kind
from impart_hf.modeling.repository_kind import RepositoryKind


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "delta_compressed", "text_config": {"pruning": {}}}, RepositoryKind.DELTA),
        ({"model_type": "pruned_llama"}, RepositoryKind.PRUNED),
        ({"model_type": "llama", "pruning": {"steps": []}}, RepositoryKind.PRUNED),
        ({"model_type": "llama", "pruning": None}, RepositoryKind.DENSE),
        ({"model_type": ["delta_compressed"]}, RepositoryKind.DENSE),
        ({}, RepositoryKind.DENSE),
    ],
)
def test_kinds(tmp_path: Path, config: dict[str, Any], kind: RepositoryKind) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert repository_kind(str(tmp_path), HubOptions()) is kind
    assert fetch_config(str(tmp_path), HubOptions()) == (config, tmp_path)


@pytest.mark.parametrize("content", [None, "[]", "{", "null"])
def test_no_config(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        repository_kind(str(tmp_path), HubOptions())
