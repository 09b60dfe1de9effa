"""Kept values trained through their rounding."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.distilled import HELD_OUT, distill, encode, held_out_divergence, parsed
from support.tiny_models import Pair, load_tensors

from impart_hf import BitDeltaConfig, DareConfig, DareQtConfig, ImPartConfig, ImPartQtConfig, ImPartRdConfig
from impart_hf.distillation import DistillSettings
from impart_hf.distillation.trained_delta import TrainedDelta
from impart_hf.methods import MethodConfig
from impart_hf.modeling.delta_decode import decode_planes, decode_record
from impart_hf.modeling.delta_record import FACTORED

CODED = {
    "impart-rd": ImPartRdConfig(),
    "impart-qt": ImPartQtConfig(groups=(1, 4)),
    "impart": ImPartConfig(),
    "bitdelta": BitDeltaConfig(),
    "dare-qt": DareQtConfig(),
    "dare": DareConfig(),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", CODED)
def test_values_are_trained_and_cost_no_byte(tiny_pair: Pair, method: str, tmp_path: Path) -> None:
    # So small matrices have too many bits at 24 under impart-rd, and too few entries under DARE-Qt, for a few steps on
    # their values to gain more than those on sizes
    records = encode(tiny_pair, CODED[method], {"impart-rd": 48, "dare-qt": 12}.get(method, 24))
    settings = DistillSettings(steps=60, batch_size=8, validation_share=0.02)
    tokens = torch.cat([torch.randint(4, 320, (112, 24), generator=torch.Generator().manual_seed(1)), HELD_OUT])
    result, report = distill(tiny_pair, records, settings, tokens)
    assert report.after < report.before
    assert report.after == pytest.approx(held_out_divergence(tiny_pair, result, tmp_path / "dense"), rel=1e-3)
    scales = distill(tiny_pair, records, dataclasses.replace(settings, trains="scales"), tokens)[1]
    assert report.after < scales.after and report.before == scales.before
    before, after = load_tensors(tiny_pair.base), load_tensors(tiny_pair.finetuned)
    for name, data in result.items():
        assert len(data) == len(records[name])
        (old,), (new,) = parsed(records)[name], parsed(result)[name]
        assert np.array_equal(old.thresholds, new.thresholds) and old.segments == new.segments
        if old.rank != 0 or old.layout != FACTORED:
            assert not np.array_equal(old.codes, new.codes), name
            delta = after[name].float() - before[name].float()
            error = (decode_record(new, name) - delta).norm() / delta.norm()
            assert new.relative_error == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("method", CODED)
def test_training_begins_with_what_is_stored(tiny_pair: Pair, method: str) -> None:
    """Values lie in the cells of their codes: before the first step nothing has changed."""
    records = encode(tiny_pair, CODED[method], 12)
    for name, data in records.items():
        (record,) = parsed({name: data})[name]
        exact = load_tensors(tiny_pair.finetuned)[name].float() - load_tensors(tiny_pair.base)[name].float()
        delta = TrainedDelta([record], name, exact[None], torch.device("cpu"))
        assert torch.allclose(delta(torch.zeros_like(exact)), decode_record(record, name), atol=1e-7)
        (folded,) = delta.fold()
        assert np.array_equal(folded.codes, record.codes), name


def test_gradients_go_straight_through_the_rounding(tiny_pair: Pair) -> None:
    """That of a latent is that of its stored value, in the latent's unit."""
    name = "model.layers.0.mlp.up_proj.weight"
    (record,) = parsed(encode(tiny_pair, ImPartRdConfig(), 12))[name]
    exact = load_tensors(tiny_pair.finetuned)[name].float() - load_tensors(tiny_pair.base)[name].float()
    delta = TrainedDelta([record], name, exact[None], torch.device("cpu"))
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    (delta(torch.zeros_like(exact)) * weights).sum().backward()
    u, v = (plane.dense().requires_grad_() for plane in decode_planes(record, name))
    sigma = torch.from_numpy(record.sigma.astype(np.float32)) * record.scale
    ((u.t() * sigma) @ v * weights).sum().backward()
    for plane, exact_values in zip(delta.planes, (u, v), strict=True):
        assert torch.allclose(
            plane.latents.grad, torch.cat(plane.in_units(exact_values.grad.flatten())), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("method, ratio", [(BitDeltaConfig(), 48), (DareQtConfig(), 24), (ImPartRdConfig(), 24)])
def test_values_begin_where_they_are_stored(tiny_pair: Pair, method: MethodConfig, ratio: float) -> None:
    """Not at an edge between two codes, under a mask either."""
    before, after = load_tensors(tiny_pair.base), load_tensors(tiny_pair.finetuned)
    for name, stack in parsed(encode(tiny_pair, method, ratio)).items():
        exact = (after[name].float() - before[name].float())[None]
        for plane in TrainedDelta(stack, name, exact, torch.device("cpu")).planes:
            found, stored = torch.cat(plane.in_units(plane.latents.detach())), plane.values().detach()
            assert (found * stored).sum().item() == pytest.approx(stored.square().sum().item(), rel=0.2), name
