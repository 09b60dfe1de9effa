"""A base with two deltas of it, and what the models that these stand for say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from impart_hf import DeltaModel, ImPartQtConfig, compress, load_delta
from impart_hf.methods import MethodConfig

from .tiny_models import VOCABULARY, fine_tune, make_model, save_model

IDS = torch.randint(4, 300, (4, 12), generator=torch.Generator().manual_seed(0))
NEW_TOKENS = 6
CLOSE = 1e-4
MIXED = ["one", "__base__", "two", "one"]  # of the rows of IDS


@dataclass(frozen=True)
class Tenants:
    """Folders of a base, and of its deltas by name."""

    base: Path
    deltas: dict[str, Path]

    def load_base(self, **options: object) -> PreTrainedModel:
        return load_dense(self.base, **options)

    def folder(self, name: str) -> Path:
        return self.base if name == "__base__" else self.deltas[name]


def make_tenants(
    folder: Path, config: PreTrainedConfig, method: MethodConfig | None = None, dtype: torch.dtype = torch.float32
) -> Tenants:
    base = make_model(config, dtype=dtype)
    save_model(base, folder / "base")
    deltas = {}
    for seed, name in enumerate(("one", "two"), 1):
        tuned = save_model(fine_tune(base, seed), folder / f"{name}-dense")
        deltas[name] = folder / name
        compress(str(folder / "base"), str(tuned), deltas[name], method or ImPartQtConfig(compression_ratio=4))
    return Tenants(folder / "base", deltas)


def load_dense(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def says(model: torch.nn.Module, ids: torch.Tensor = IDS, **options: object) -> torch.Tensor:
    """Logits."""
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def generates(model: torch.nn.Module, ids: torch.Tensor = IDS, **options: object) -> torch.Tensor:
    """Greedy tokens; with a fixed number of them, so that rows of a batch compare with rows alone."""
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS, **options,
    )  # fmt: skip


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def both(tenants: Tenants, factors: str | None = None, base: PreTrainedModel | None = None) -> DeltaModel:
    """Both deltas beside the base, which may be loaded already; the first is active."""
    model = load_delta(base or tenants.load_base(), tenants.deltas["one"], "one", factors=factors)
    model.load_adapter(tenants.deltas["two"], "two", factors=factors)
    return model


def check_each(model: DeltaModel, tenants: Tenants) -> None:
    """Every delta, active, and the base."""
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        merged = load_dense(tenants.deltas[name])
        assert largest_difference(says(model), says(merged)) <= CLOSE
        assert torch.equal(generates(model), generates(merged))
    base = load_dense(tenants.base)
    with model.disable_adapter():
        assert torch.equal(says(model), says(base))
    assert largest_difference(says(model)[..., :VOCABULARY], says(base)) > 100 * CLOSE
    assert torch.equal(says(model.get_base_model()), says(base)), "the base itself is without deltas"


def check_rows(model: DeltaModel, tenants: Tenants) -> None:
    """A batch of several deltas says what its rows say alone."""
    for number, name in enumerate(MIXED):
        dense = load_dense(tenants.folder(name))
        row = IDS[number : number + 1]
        assert largest_difference(says(model, adapter_names=MIXED)[number], says(dense, row)[0]) <= CLOSE
        assert torch.equal(generates(model, adapter_names=MIXED)[number], generates(dense, row)[0])
