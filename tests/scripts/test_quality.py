"""At equal bytes the repository is no worse than the paper's algorithm, written out naively in float32."""

from pathlib import Path

import pytest
import torch
from support import naive_impart
from support.tiny_models import Pair, fine_tune, load_tensors, make_model, save_model, tiny_config
from transformers import AutoModelForCausalLM

from impart_hf import ImPartConfig, compress

pytestmark = [pytest.mark.scripts, pytest.mark.slow]

ALLOWANCE = 1.25  # for headers and per-column numbers, which weigh at this size
SEEDS = range(3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Larger than the usual tiny pair, so that headers do not rule: 1.6 million parameters."""
    folder = tmp_path_factory.mktemp("quality")
    base = make_model(tiny_config("llama", hidden_size=192, intermediate_size=512, num_attention_heads=6))
    return Pair(save_model(base, folder / "base"), save_model(fine_tune(base), folder / "finetuned"))


@torch.no_grad()
def divergence(reference: torch.nn.Module, model: torch.nn.Module) -> float:
    """KL(reference || model) in nats a token, on fixed random tokens."""
    tokens = torch.randint(4, 320, (16, 64), generator=torch.Generator().manual_seed(0))
    p, q = (torch.log_softmax(m(tokens).logits.float(), -1) for m in (reference, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("ratio", [8, 16])
def test_not_above_the_naive_algorithm_at_a_quarter_more_ratio(pair: Pair, ratio: int, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(pair.finetuned, dtype=torch.float32)
    ours, naive = [], []
    for seed in SEEDS:
        out = tmp_path / str(seed)
        report = compress(str(pair.base), str(pair.finetuned), out, ImPartConfig(compression_ratio=ratio, seed=seed))
        assert not report.shortfall and report.ratio >= ratio
        ours.append(divergence(reference, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)))
        naive.append(divergence(reference, naive_model(pair, ratio * ALLOWANCE, seed)))
    assert sum(ours) <= sum(naive), (ours, naive)


def naive_model(pair: Pair, ratio: float, seed: int) -> torch.nn.Module:
    """The fine-tune with every matrix that the repository compresses replaced by the naive algorithm's."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(pair.finetuned, dtype=torch.float32)
    before, after = load_tensors(pair.base), load_tensors(pair.finetuned)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in after.items():
            if tensor.dim() == 2:
                base = before[name].float()
                parameters[name].copy_(base + naive_impart.impart(tensor.float() - base, ratio, 0.6, 1.0, generator))
    return model
