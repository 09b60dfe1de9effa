"""vLLM's adapters on CPUs: rows without one stay as they are."""

from __future__ import annotations

import pytest
import torch

lora_ops = pytest.importorskip("vllm.lora.ops.torch_ops.lora_ops")


def test_rows_without_an_adapter() -> None:
    from vllm.lora.punica_wrapper import punica_cpu

    from impart_hf.serving.cpu_adapters import leave_rows_without_adapter

    leave_rows_without_adapter()
    leave_rows_without_adapter()
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(5, 3, generator=generator), torch.randn(2, 1, 4, 3, generator=generator)
    slots = torch.tensor([-1, 0, 1, -1, 0])
    added = torch.einsum("bi,boi->bo", inputs, weights[slots, 0]) * (slots >= 0)[:, None]
    for module in (lora_ops, punica_cpu):
        outputs = torch.ones(5, 6)
        module.bgmv_expand_slice(inputs, weights, outputs, slots, 1, 4, True)
        assert torch.allclose(outputs[:, 1:5], 1 + added, atol=1e-6) and (outputs[:, [0, 5]] == 1).all()
        outputs = torch.ones(5, 4)
        module.bgmv_expand(inputs, weights, outputs, slots, True)
        assert torch.allclose(outputs, 1 + added, atol=1e-6)
    outputs = torch.ones(5, 4)
    lengths = torch.tensor([1, 2, 2])
    lora_ops.sgmv_expand(inputs, weights, outputs, lengths, lengths, torch.tensor([-1, 1, 0]), 3, 2, 5, True)
    of_row = torch.tensor([-1, 1, 1, 0, 0])
    wanted = torch.einsum("bi,boi->bo", inputs, weights[of_row, 0]) * (of_row >= 0)[:, None]
    assert torch.allclose(outputs, 1 + wanted, atol=1e-6)
