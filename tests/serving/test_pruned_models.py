"""Which pruned models vLLM gets a class for; what the classes do is tested in test_vllm_models.py."""

import pytest
import torch
from support.messages import naming

from impart_hf.modeling.configuration_pruned import PRUNED_CONFIGS, PrunedQwen3Config
from impart_hf.serving.pruned_models import PRUNED_ARCHITECTURES, check_dtype, check_ignored


def test_every_family_has_a_class() -> None:
    assert set(PRUNED_ARCHITECTURES) == {config.model_classes()[1] for config in PRUNED_CONFIGS.values()}


def test_a_bias_that_vllm_would_leave_out() -> None:
    check_ignored(PrunedQwen3Config(), "PrunedQwen3ForCausalLM")
    with pytest.raises(ValueError, match=naming("attention_bias")):
        check_ignored(PrunedQwen3Config(attention_bias=True), "PrunedQwen3ForCausalLM")


def test_families_that_are_unstable_in_float16() -> None:
    """vLLM knows it of Gemma's own model types."""
    for family in ("Gemma2", "Gemma3"):
        check_dtype(torch.bfloat16, f"Pruned{family}ForCausalLM")
        with pytest.raises(ValueError, match=naming(f"Pruned{family}ForCausalLM", "float16", "bfloat16")):
            check_dtype(torch.float16, f"Pruned{family}ForCausalLM")
    check_dtype(torch.float16, "PrunedLlamaForCausalLM")
