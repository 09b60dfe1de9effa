"""The plugin that vLLM calls in each of its processes, to register delta repositories and pruned models."""

import os
from logging import getLogger

_TRANSFER_BACKEND = "impart_hf"  # for --weight-transfer-config


def register() -> None:
    """Register our configurations, model classes and swaps with vLLM (entry point `vllm.general_plugins`).

    vLLM calls this in the API server, the engine core, every worker, and in helper processes; calling it again changes
    nothing.

    If this version of vLLM does not fit, vLLM continues without the plugin and still serves all other models.
    """
    try:
        _register()
    except (ImportError, AttributeError, KeyError, TypeError):
        getLogger("vllm.impart_hf").exception(
            "impart-hf does not fit this version of vLLM, so no delta can be served: install a version that fits"
        )


def _register() -> None:
    import vllm
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry
    from vllm.config import model as vllm_model
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform
    from vllm.transformers_utils import config as vllm_config
    from vllm.v1.worker.worker_base import WorkerBase

    from ..modeling.configuration_pruned import pruned_config_class
    from ..registration import register_with_transformers
    from . import model_classes
    from .config_parser import DeltaConfigParser
    from .delta_loader import delta_settings
    from .engine_files import PACKED_VARIABLE
    from .pruned_models import PRUNED_ARCHITECTURES
    from .worker import load_delta

    register_with_transformers()  # the import of impart_hf leaves it to the command line, which vLLM may run in
    # Set directly, because `register_config_parser` would warn of the replacement at every start of any model.
    vllm_config._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = DeltaConfigParser

    def register_class(name: str) -> None:
        # vLLM caches a class's properties on disk, by this string and the hash of the class's file. Our classes have
        # the properties of vLLM's own, so the string includes vLLM's version.
        ModelRegistry.register_model(name, f"{model_classes.__name__}:{name}@{vllm.__version__}")

    for name in PRUNED_ARCHITECTURES:
        register_class(name)
    # vLLM's table of model types that are unsound in float16; pruned models are as their families. It is private.
    no_float16 = getattr(vllm_model, "_FLOAT16_NOT_SUPPORTED_MODELS", {})
    for family, reason in list(no_float16.items()):
        if pruned := pruned_config_class(family):
            no_float16[pruned.model_type] = reason
    inner = {*PRUNED_ARCHITECTURES, "TransformersForCausalLM", "TransformersMoEForCausalLM"}
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        inner.update([names] if isinstance(names, str) else names)
    for name in sorted(inner & set(ModelRegistry.get_supported_archs())):
        register_class(model_classes.DELTA_PREFIX + name)
        MODELS_CONFIG_MAP[model_classes.DELTA_PREFIX + name] = delta_settings(MODELS_CONFIG_MAP.get(name))

    WorkerBase.impart_hf_load_delta = load_delta
    if _TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            _TRANSFER_BACKEND, "impart_hf.serving.weight_transfer", "DeltaTransferEngine"
        )
    if current_platform.is_cpu():
        from .cpu_adapters import leave_rows_without_adapter

        leave_rows_without_adapter()
    if os.environ.get(PACKED_VARIABLE) == "1":
        from .packed_batches import register_packed_batches

        register_packed_batches()
