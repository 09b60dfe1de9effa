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
    from .modeling.configuration_pruned_llama import PrunedLlamaConfig
    from .modeling.modeling_delta_compressed import DeltaCompressedForCausalLM, DeltaCompressedForSequenceClassification
    from .modeling.modeling_pruned_llama import PrunedLlamaForCausalLM, PrunedLlamaModel

    AutoConfig.register("delta_compressed", DeltaCompressedConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeltaCompressedConfig, DeltaCompressedForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(DeltaCompressedConfig, DeltaCompressedForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        DeltaCompressedConfig, DeltaCompressedForSequenceClassification, exist_ok=True
    )
    AutoConfig.register("pruned_llama", PrunedLlamaConfig, exist_ok=True)
    AutoModel.register(PrunedLlamaConfig, PrunedLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(PrunedLlamaConfig, PrunedLlamaForCausalLM, exist_ok=True)


def is_command_line() -> bool:
    """Return whether this process runs `impart-hf` or `impart-hf-reproduce`, as a module too, or `optimum-cli impart`.

    The command line registers the classes itself when it knows which command to run: importing transformers takes
    seconds of processor time, which `--help` must not need.
    """
    program = (getattr(sys, "argv", None) or [""])[0]  # Python within another program may have no arguments
    if program == "-m":  # Python looks for the module, whose name is before the arguments
        return sys.orig_argv[-len(sys.argv)] in ("impart_hf.cli", "impart_hf.reproduce")
    return Path(program).name in _PROGRAMS
