"""Dense copies in scratch space: which stay, and which go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.delta_tenants import Tenants, make_tenants
from support.messages import naming
from support.tiny_models import load_tensors, tiny_config

from impart_hf.modeling.delta_repository import DeltaRepository
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository
from impart_hf.serving.scratch import Scratch


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return make_tenants(tmp_path_factory.mktemp("tenants"), tiny_config("llama", num_hidden_layers=1))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMPART_HF_SCRATCH", str(tmp_path))
    return tmp_path


def opened(tenants: Tenants, name: str) -> DeltaRepository:
    return open_repository(str(tenants.deltas[name]), HubOptions())


def dense_bytes(tenants: Tenants) -> int:
    return sum(tensor.nbytes for tensor in load_tensors(tenants.base).values())


def test_without_a_limit_the_copy_goes_after_the_swap(tenants: Tenants, place: Path) -> None:
    scratch = Scratch()
    copy = Path(scratch.prepare(opened(tenants, "one")) or "")
    assert set(load_tensors(copy)) == set(load_tensors(tenants.base))
    scratch.clear()
    assert not copy.exists()


def test_copies_stay_within_the_limit(tenants: Tenants, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPART_HF_SCRATCH_LIMIT", str(2 * dense_bytes(tenants)))
    scratch = Scratch()
    copies = {}
    for name in ("one", "two", "one"):
        copies[name] = Path(scratch.prepare(opened(tenants, name)) or "")
        made = copies["one"].stat().st_mtime_ns
        scratch.clear()
    assert all(copy.exists() for copy in copies.values()) and copies["one"] != copies["two"]
    assert copies["one"].stat().st_mtime_ns == made, "it was not decoded again"
    expected = opened(tenants, "one")
    assert all(torch.equal(tensor, expected.tensor(name)) for name, tensor in load_tensors(copies["one"]).items())


def test_the_least_recently_used_goes(tenants: Tenants, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPART_HF_SCRATCH_LIMIT", str(dense_bytes(tenants) * 3 // 2))
    scratch = Scratch()
    one = Path(scratch.prepare(opened(tenants, "one")) or "")
    scratch.clear()
    assert one.exists()
    two = Path(scratch.prepare(opened(tenants, "two")) or "")
    assert two.exists() and not one.exists()
    scratch.clear()
    assert two.exists()


def test_a_copy_larger_than_the_limit_is_for_one_swap(
    tenants: Tenants, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMPART_HF_SCRATCH_LIMIT", "1KB")
    scratch = Scratch()
    copy = Path(scratch.prepare(opened(tenants, "one")) or "")
    assert copy.exists()
    scratch.clear()
    assert not copy.exists()


def test_settings(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPART_HF_SCRATCH_LIMIT", "much")
    with pytest.raises(ValueError, match=naming("IMPART_HF_SCRATCH_LIMIT", "much")):
        Scratch()
    monkeypatch.setenv("IMPART_HF_SCRATCH", str(place / "none"))
    monkeypatch.delenv("IMPART_HF_SCRATCH_LIMIT")
    with pytest.raises(ValueError, match=naming("IMPART_HF_SCRATCH")):
        Scratch()
