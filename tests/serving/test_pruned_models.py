"""Which pruned models vLLM gets a class for; what the classes do is tested in test_vllm_models.py."""

from impart_hf.modeling.configuration_pruned import PRUNED_CONFIGS
from impart_hf.serving.pruned_models import PRUNED_ARCHITECTURES


def test_every_family_has_a_class() -> None:
    assert set(PRUNED_ARCHITECTURES) == {config.model_classes()[1] for config in PRUNED_CONFIGS.values()}
