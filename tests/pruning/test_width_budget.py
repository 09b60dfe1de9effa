"""The budget of width pruning: what layers lose, and how exactly it is met."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import naming

from impart_hf.pruning.decoder_shape import CHANNELS, FAMILIES, DecoderShape, LayerWidth
from impart_hf.pruning.width_budget import head_unit, width_budget

LLAMA_3_8B = DecoderShape("llama", 4096, 128, 128256, False, (), (LayerWidth(32, 8, 14336),) * 32)
LLAMA_2_7B = DecoderShape("llama", 4096, 128, 32000, False, (), (LayerWidth(32, 32, 11008),) * 32)
SMALL = DecoderShape("llama", 320, 32, 4096, True, (), (LayerWidth(10, 5, 864),) * 8)


def removed_by_formula(shape: DecoderShape, budget, query_heads: bool) -> int:
    """The difference of the parameter counts of the shapes before and after."""
    layers = []
    for width, heads, channels in zip(shape.layers, budget.heads, budget.channels, strict=True):
        per_group = width.num_attention_heads // width.num_key_value_heads
        groups = width.num_key_value_heads if query_heads else width.num_key_value_heads - heads
        queries = groups * (per_group - heads) if query_heads else groups * per_group
        layers.append(LayerWidth(queries, groups, width.intermediate_size - channels))
    return shape.parameters - dataclasses.replace(shape, layers=tuple(layers)).parameters


@given(
    shape=st.sampled_from([LLAMA_3_8B, LLAMA_2_7B, SMALL]),
    ratio=st.floats(0.01, 0.8),
    exponent=st.sampled_from([0.0, 0.5, 1.0, 10.0]),
    multiple_of=st.sampled_from([1, 8, 64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_budget_is_met_within_half_a_unit(
    shape: DecoderShape, ratio: float, exponent: float, multiple_of: int, seed: int
) -> None:
    scores = torch.rand(len(shape.layers), generator=torch.Generator().manual_seed(seed)).double() + 0.01
    budget = width_budget(shape, scores, ratio, exponent=exponent, multiple_of=multiple_of)
    assert budget.parameters == removed_by_formula(shape, budget, query_heads=False)
    missed = abs(budget.parameters - ratio * shape.decoder_parameters)
    assert missed <= multiple_of * shape.unit_parameters(CHANNELS) / 2
    for width, heads, channels in zip(shape.layers, budget.heads, budget.channels, strict=True):
        assert 0 <= heads < width.num_key_value_heads and 0 <= channels < width.intermediate_size
        assert channels == 0 or (width.intermediate_size - channels) % multiple_of == 0


@pytest.mark.parametrize("query_heads", [False, True])
@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.15])
def test_attention_alone_is_met_within_half_a_unit_of_heads(query_heads: bool, ratio: float) -> None:
    scores = torch.arange(1, 33).double()
    budget = width_budget(LLAMA_3_8B, scores, ratio * 0.7, exponent=0.5, parts=("attention",), query_heads=query_heads)
    unit = head_unit(LLAMA_3_8B, LLAMA_3_8B.layers[0], query_heads).parameters
    assert budget.channels == [0] * 32
    assert budget.parameters == removed_by_formula(LLAMA_3_8B, budget, query_heads)
    assert abs(budget.parameters - 0.7 * ratio * LLAMA_3_8B.decoder_parameters) <= unit / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_count(family: str) -> None:
    biased = tuple(linear.name for linear in FAMILIES[family].linears)
    shape = DecoderShape(family, 64, 16, 320, False, biased, (LayerWidth(4, 2, 128),) * 3)
    budget = width_budget(shape, torch.ones(3).double(), 0.4, exponent=0.5)
    assert budget.parameters == removed_by_formula(shape, budget, query_heads=False)
    assert abs(budget.parameters - 0.4 * shape.decoder_parameters) <= shape.unit_parameters(CHANNELS) / 2


def test_important_layers_lose_less() -> None:
    scores = torch.tensor([8.0, 1.0, 4.0, 2.0] * 2).double()
    budget = width_budget(SMALL, scores, 0.3, exponent=0.5, parts=("mlp",))
    order = sorted(range(8), key=lambda n: (-budget.channels[n], n))
    assert {*order[:2]} == {1, 5} and {*order[2:4]} == {3, 7} and {*order[-2:]} == {0, 4}
    # In proportion to score^-1/2, where no layer has reached its limit.
    assert budget.channels[1] / budget.channels[0] == pytest.approx(8**0.5, rel=0.05)
    same = width_budget(SMALL, scores, 0.3, exponent=0.0, parts=("mlp",))
    assert max(same.channels) - min(same.channels) <= 1


def test_layers_without_any_gradient_do_not_take_all() -> None:
    """Five layers' worth goes; what one layer can give is an eighth of it all."""
    budget = width_budget(SMALL, torch.tensor([0.0] + [1.0] * 7).double(), 0.6, exponent=0.5, parts=("mlp",))
    others = budget.channels[1:]
    assert budget.channels[0] == 863 and max(others) - min(others) <= 1 and min(others) > 400
    same = width_budget(SMALL, torch.zeros(8).double(), 0.6, exponent=0.5, parts=("mlp",))
    assert max(same.channels) - min(same.channels) <= 1


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0, 0.995, float("nan")])
def test_ratios_that_leave_a_layer_without_heads_or_are_none(ratio: float) -> None:
    with pytest.raises(ValueError, match=naming("ratio", f"{ratio:g}") + r".*\b0\.9"):
        width_budget(SMALL, torch.ones(8).double(), ratio, exponent=0.5)


def test_one_part_has_not_enough() -> None:
    with pytest.raises(ValueError, match=naming("ratio", 0.5, "attention") + r".*\b0\.2"):
        width_budget(SMALL, torch.ones(8).double(), 0.5, exponent=0.5, parts=("attention",))
