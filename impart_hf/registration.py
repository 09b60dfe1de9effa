"""Registration of our configuration and model classes with transformers' Auto classes."""

import sys
from pathlib import Path

# The programs of the command line, as installers name them on Linux and on Windows.
_PROGRAMS = {
    f"{name}{end}" for name in ("impart-hf", "impart-hf-reproduce", "optimum-cli") for end in ("", ".exe", "-script.py")
}


def register_with_transformers() -> None:
    """Register the reader's classes; this imports transformers, but not the writer."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    from .modeling.configuration_delta_compressed import DeltaCompressedConfig
    from .modeling.configuration_pruned import PRUNED_CONFIGS
    from .modeling.modeling_delta_compressed import DeltaCompressedForCausalLM, DeltaCompressedForSequenceClassification
    from .modeling.modeling_pruned import PRUNED_DECODERS, PRUNED_LANGUAGE_MODELS

    AutoConfig.register("delta_compressed", DeltaCompressedConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeltaCompressedConfig, DeltaCompressedForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(DeltaCompressedConfig, DeltaCompressedForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        DeltaCompressedConfig, DeltaCompressedForSequenceClassification, exist_ok=True
    )
    for model_type, config in PRUNED_CONFIGS.items():
        AutoConfig.register(model_type, config, exist_ok=True)
    for decoder in PRUNED_DECODERS:
        AutoModel.register(decoder.config_class, decoder, exist_ok=True)
    for model in PRUNED_LANGUAGE_MODELS:
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


def is_command_line() -> bool:
    """Return whether this process runs `impart-hf` or `impart-hf-reproduce`, as a module too, or `optimum-cli impart`.

    The command line registers the classes itself when it knows which command to run: importing transformers takes
    seconds of processor time, which `--help` must not need.
    """
    program = (getattr(sys, "argv", None) or [""])[0]  # Python within another program may have no arguments
    if program == "-m":  # Python looks for the module, whose name is before the arguments
        return sys.orig_argv[-len(sys.argv)] in ("impart_hf.cli", "impart_hf.reproduce")
    return Path(program).name in _PROGRAMS
