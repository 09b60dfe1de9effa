"""A delta is decoded where transformers puts the weights, and only the part of a matrix that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.loaded_models import IDS, load, logits
from support.tiny_models import Pair

from impart_hf import BitDeltaConfig, DareConfig, ImPartRdConfig, compress
from impart_hf.methods import MethodConfig
from impart_hf.modeling import delta_repository
from impart_hf.modeling.deferred_tensor import DeferredTensor, part_ranges
from impart_hf.modeling.delta_repository import DeltaRepository
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository

PARTS: list[Any] = [
    ...,
    slice(None),
    slice(5, 17),
    slice(-7, None),
    (slice(None), slice(3, 40)),
    (slice(8, 9), slice(1, 2)),
    (..., slice(0, 8)),
    (slice(4, 4), slice(None)),
    (slice(0, 1000), slice(-1000, 1000)),
    (slice(None, None, 2), slice(None)),
    3,
]


def made_on(device: torch.device) -> torch.Tensor:
    return torch.arange(6.0, device=device).view(2, 3)


class Watched:
    """A function that makes a tensor, and the devices on which it has made it."""

    def __init__(self) -> None:
        self.devices: list[str] = []

    def __call__(self, device: torch.device) -> torch.Tensor:
        self.devices.append(device.type)
        return made_on(device)


def test_it_is_made_where_it_is_moved() -> None:
    make = Watched()
    deferred = DeferredTensor((2, 3), torch.float32, make)
    assert deferred.shape == (2, 3) and deferred.dtype == torch.float32 and not make.devices
    moved = deferred.to(device="meta", dtype=torch.bfloat16)
    assert type(moved) is torch.Tensor and moved.device.type == "meta" and moved.dtype == torch.bfloat16
    for arguments in ({"device": "cpu", "dtype": torch.float64}, {"device": torch.device("cpu")}, {"device": "cpu"}):
        moved = deferred.to(**arguments)  # type: ignore[call-overload]
        assert type(moved) is torch.Tensor and moved.dtype == arguments.get("dtype", torch.float32)
        assert torch.equal(moved.float(), made_on(torch.device("cpu")))
    assert deferred.to(dtype=torch.float16).dtype == torch.float16
    assert make.devices == ["meta", "cpu", "cpu", "cpu", "cpu"]


def test_any_other_use_makes_it_on_the_cpu() -> None:
    make = Watched()
    deferred, plain = DeferredTensor((2, 3), torch.float32, make), made_on(torch.device("cpu"))
    assert torch.equal(torch.cat([deferred, deferred], dim=1), torch.cat([plain, plain], dim=1))
    assert torch.equal(torch.stack([deferred, plain]), torch.stack([plain, plain]))
    assert torch.equal(deferred[1:], plain[1:]) and torch.equal(deferred.t().contiguous(), plain.t())
    assert set(make.devices) == {"cpu"} and "2, 3" in repr(deferred)


@pytest.mark.parametrize("index", PARTS, ids=str)
def test_ranges_of_a_part(index: Any) -> None:
    tensor = torch.arange(24 * 48).view(24, 48)
    ranges = part_ranges(index, (24, 48))
    if ranges is None:
        assert isinstance(index, int) or (isinstance(index, tuple) and (index[0] is ... or index[0].step == 2))
    else:
        rows, columns = ranges
        assert torch.equal(tensor[rows.start : rows.stop, columns.start : columns.stop], tensor[index])


@pytest.fixture(scope="module", params=[ImPartRdConfig, DareConfig, BitDeltaConfig], ids=lambda method: method.name)
def repository(request: pytest.FixtureRequest, tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("delta") / "delta"
    method: MethodConfig = request.param(compression_ratio=4)
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), folder, method)
    return folder


@pytest.mark.parametrize("index", PARTS, ids=str)
def test_a_part_is_that_of_the_whole(repository: Path, index: Any) -> None:
    opened = open_repository(str(repository), HubOptions())
    for name, lazy in opened.lazy_state_dict().items():
        whole = opened.tensor(name)
        if whole.dim() != 2:
            continue
        part = lazy[index]
        assert part.shape == whole[index].shape and part.dtype == whole.dtype
        # A product of fewer rows may be summed in another order, and be rounded to the next number.
        torch.testing.assert_close(part.to("cpu"), whole[index], rtol=2**-7, atol=1e-6)


def test_only_the_part_is_multiplied(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is not decoded whole for some of its rows or columns."""
    monkeypatch.setattr(delta_repository, "add_delta", None)
    opened = open_repository(str(repository), HubOptions())
    name = "model.layers.0.mlp.up_proj.weight"
    assert opened.part(name, (slice(3, 9), slice(None))).shape == (6, opened.shape(name)[1])
    assert opened.part(name, (slice(None), slice(8, 24))).shape == (opened.shape(name)[0], 16)


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, torch.device("cpu"), "auto"], ids=str)
def test_transformers_moves_what_it_slices(device_map: Any, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded before transformers has said where."""
    places: list[Any] = []
    part = DeltaRepository.part

    def watched(self: DeltaRepository, name: str, index: Any, device: torch.device) -> torch.Tensor:
        places.append((name, device))
        return part(self, name, index, device)

    monkeypatch.setattr(DeltaRepository, "part", watched)
    model = load(repository, device_map=device_map)
    names = [name for name, _ in places]
    assert sorted(names) == sorted(set(names)) == sorted(open_repository(str(repository), HubOptions()).names())
    assert {device for _, device in places} == {torch.device("cpu")}
    assert all(type(parameter.data) is torch.Tensor for parameter in model.parameters())


def test_under_a_default_device(repository: Path) -> None:
    with torch.device("cpu"):
        model = load(repository)
    assert torch.equal(logits(model), logits(load(repository))) and IDS.device.type == "cpu"
