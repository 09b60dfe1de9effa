"""Exact records decoded by the Triton kernel, run by Triton's interpreter or on a device: the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.kernel_bounds import watched_kernels
from support.packed_records import DEVICE, needs_kernels

from impart_hf.coding.exact_encoder import encode_exact
from impart_hf.modeling import exact_record, triton_exact
from impart_hf.modeling.delta_record import DeltaFormatError
from impart_hf.modeling.exact_record import DENSE, SPARSE, restore
from impart_hf.modeling.packed_tables import KERNELS_VARIABLE

pytestmark = [needs_kernels, pytest.mark.gpu]


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels in any case, and none that touches what is not its own."""
    monkeypatch.setenv(KERNELS_VARIABLE, "always")
    monkeypatch.setattr(exact_record, "_all_steps", None)  # the CPU's way
    with watched_kernels():
        yield


def pair(rows: int, columns: int, dtype: torch.dtype, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, columns, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    chosen = torch.rand(rows, columns, generator=generator) < share
    return base.to(dtype), torch.where(chosen, base + noise, base).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
@pytest.mark.parametrize("coding", [DENSE, SPARSE])
@pytest.mark.parametrize("share", [0.0, 0.04, 0.8])
def test_the_same_bits(dtype: torch.dtype, coding: int, share: float) -> None:
    base, finetuned = pair(70, 50, dtype, share)
    finetuned[10:20] = base[10:20]
    data = np.frombuffer(encode_exact(base, finetuned, coding), np.uint8)
    restored = restore(base.to(DEVICE), data, "tensor", dtype).cpu()
    assert torch.equal(restored.view(torch.uint8), finetuned.view(torch.uint8))


def test_several_blocks_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impart_hf.coding.number_encoder._MOST_LANES", 2200)
    monkeypatch.setattr("impart_hf.coding.number_encoder._LANES_SQUARED", 600)
    monkeypatch.setattr("impart_hf.coding.number_encoder._LANE_BYTES", 1)
    monkeypatch.setattr(triton_exact, "_PART", 1000)
    base, finetuned = pair(90, 90, torch.float32, 1.0)
    data = np.frombuffer(encode_exact(base, finetuned, DENSE), np.uint8)
    coded = exact_record.parse_exact(data, (90, 90), 4, "tensor").content
    assert isinstance(coded, exact_record.CodedSteps) and len(coded.numbers.states) > coded.numbers.block_lanes
    assert torch.equal(restore(base.to(DEVICE), data, "tensor", torch.float32).cpu(), finetuned)


@pytest.mark.parametrize("coding", [DENSE, SPARSE])
def test_damage_is_noticed(coding: int) -> None:
    """On a device no checksum of the tensor is compared: lanes and low bits say that a record is damaged."""
    base, finetuned = pair(60, 50, torch.bfloat16, 0.5)
    record = bytearray(encode_exact(base, finetuned, coding))
    refused = 0
    places = range(40, len(record), len(record) // 40)
    for at in places:
        record[at] ^= 0x10
        try:
            restore(base.to(DEVICE), np.frombuffer(bytes(record), np.uint8), "tensor", torch.bfloat16)
        except DeltaFormatError as error:
            assert str(error).startswith("tensor")
            refused += 1
        record[at] ^= 0x10
    assert refused > 0.5 * len(places)
