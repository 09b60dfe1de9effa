"""A delta repository that holds an adapter too: loading applies it, so nothing may pass over it without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.adapters import lora, save_adapter
from support.loaded_models import captured_log
from support.messages import naming
from support.tiny_models import Pair

from impart_hf.lora.export import export_lora
from impart_hf.modeling.model_files import CheckpointError, HubOptions
from impart_hf.repository.inspection import Inspection
from impart_hf.repository.open import open_repository
from impart_hf.repository.reconstruct import reconstruct
from impart_hf.repository.verify import verify


@pytest.fixture
def with_adapter(repository: Path, tiny_pair: Pair, tmp_path: Path) -> str:
    for path in save_adapter(tiny_pair.base, lora(), tmp_path / "adapter").glob("adapter_*"):
        path.rename(repository / path.name)
    return str(repository)


def test_what_is_written_would_lack_it(with_adapter: str, tmp_path: Path) -> None:
    opened = open_repository(with_adapter, HubOptions())
    with pytest.raises(CheckpointError, match=naming(with_adapter, "adapter_config.json")):
        reconstruct(opened, tmp_path / "out")
    with pytest.raises(CheckpointError, match=naming(with_adapter, "adapter_config.json")):
        export_lora(opened, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


def test_what_is_printed_is_without_it(with_adapter: str) -> None:
    with captured_log() as lines:
        Inspection(with_adapter, HubOptions())
    assert len(lines) == 1 and "adapter_config.json" in lines[0] and with_adapter in lines[0]
    with captured_log() as lines:
        verify(open_repository(with_adapter, HubOptions()))
    assert len(lines) == 1 and "adapter_config.json" in lines[0]
