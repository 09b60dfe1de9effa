"""A reference whose logits are computed once says what one says that is run every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import VOCABULARY, fine_tune, make_model, tiny_config

from impart_hf.common import token_losses
from impart_hf.evaluation.metrics import evaluate
from impart_hf.evaluation.reference import Reference

TOKENS = torch.randint(VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("most_logits", [1 << 25, 1 << 10], ids=["whole", "in parts"])
@pytest.mark.parametrize("room", [1 << 30, 0], ids=["kept", "computed again"])
def test_what_is_kept(room: int, most_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_losses, "CHUNK_ENTRIES", most_logits)
    tuned = make_model(tiny_config("llama"), dtype=torch.float32)
    others = [fine_tune(tuned, seed) for seed in (1, 2)]
    runs: list[Any] = []
    tuned.get_input_embeddings().register_forward_hook(lambda *_: runs.append(_))
    reference = Reference(tuned, TOKENS, 2, room)
    for other in others:
        perplexity, divergence = evaluate(other, tuned, TOKENS, 2)
        runs.clear()
        found = reference.compare(other)
        assert found == pytest.approx((torch.tensor(perplexity).log().item(), divergence), rel=1e-5)
        assert len(runs) == (0 if room else 3)
    perplexity, _ = evaluate(tuned, None, TOKENS, 2)
    assert reference.loss == pytest.approx(torch.tensor(perplexity).log().item(), rel=1e-5)
    assert reference.tokens == 5 * 11
    assert reference.compare(tuned)[1] == pytest.approx(0, abs=1e-6)
