"""Deltas beside a base that is quantised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.delta_tenants import IDS, MIXED, Tenants, largest_difference, load_dense, make_tenants, says
from support.messages import naming
from support.tiny_models import tiny_config
from transformers import BitsAndBytesConfig, PreTrainedModel

from impart_hf import load_delta
from impart_hf.modeling.delta_repository import WrongBaseError

BITS = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    wide = tiny_config("llama", hidden_size=128, intermediate_size=256)
    return make_tenants(tmp_path_factory.mktemp("tenants"), wide)


@pytest.fixture(params=list(BITS))
def quantised(tenants: Tenants, request: pytest.FixtureRequest) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    return tenants.load_base(quantization_config=BitsAndBytesConfig(**BITS[request.param]))


def with_deltas_by_hand(quantised: PreTrainedModel, tenants: Tenants, name: str) -> list[Any]:
    """Add what the delta gives to a quantised base by hooks, from the dense models' weights; returns the handles."""
    before, after = (dict(load_dense(folder).named_parameters()) for folder in (tenants.base, tenants.deltas[name]))
    handles = []
    for path, module in quantised.named_modules():
        weight = f"{path}.weight"
        if isinstance(module, torch.nn.Linear):
            delta = (after[weight] - before[weight]).detach()
            handles.append(module.register_forward_hook(lambda m, a, out, delta=delta: out + a[0] @ delta.t()))
        elif weight in after:
            module.weight.data = after[weight].detach()
    return handles


@pytest.mark.parametrize("factors", ["dense", "packed"])
def test_the_delta_of_the_full_precision_base(quantised: PreTrainedModel, tenants: Tenants, factors: str) -> None:
    model = load_delta(quantised, tenants.deltas["one"], "one", allow_quantized_base=True, factors=factors)
    model.load_adapter(tenants.deltas["two"], "two", factors=factors)
    found = {name: says(model, adapter_names=[name] * len(IDS)) for name in ("one", "two", "__base__")}
    mixed = says(model, adapter_names=MIXED)
    effect = (found["one"] - found["__base__"]).norm() / len(IDS) ** 0.5
    # bitsandbytes rounds the inputs of its layers, to float16 or less, so that the last digits of a sum are magnified.
    for number, name in enumerate(MIXED):
        assert (mixed[number] - found[name][number]).norm() <= 0.05 * effect
    with pytest.raises(ValueError, match=naming("quantised")):
        model.merge_and_unload()
    base = model.unload()
    assert largest_difference(says(base), found["__base__"]) <= 1e-4
    with_deltas_by_hand(base, tenants, "one")
    assert (says(base) - found["one"]).norm() <= 0.05 * len(IDS) ** 0.5 * effect


def test_only_if_it_is_allowed_and_of_the_recorded_name(quantised: PreTrainedModel, tenants: Tenants) -> None:
    with pytest.raises(ValueError, match=naming("allow_quantized_base")):
        load_delta(quantised, tenants.deltas["one"])
    quantised.name_or_path = "someone/else"
    with pytest.raises(WrongBaseError, match=naming("someone/else")):
        load_delta(quantised, tenants.deltas["one"], allow_quantized_base=True)
