"""What a callback's settings are checked for before the first step of a training."""

import copy
import os
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..common.names import is_on_hub, recorded_base
from ..modeling.model_files import HubOptions, fetch_config
from ..modeling.modeling_delta_compressed import inner_class
from ..modeling.repository_kind import RepositoryKind, kind_of

# A chain may have 32 deltas, one of which the training may have started from.
MOST_LINKS = 31


def trained_model(model: Any) -> PreTrainedModel:
    """Return the model that the Trainer trains, without wrappers.

    Raises:
        ValueError: if no delta of its checkpoints can be made.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(inner, "peft_config") or getattr(inner, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model is trained by an adapter, whose checkpoints hold only that and are small already: leave "
            "DeltaCheckpointCallback out"
        )
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"the model is a {type(inner).__name__}, no model of transformers, and has no base")
    config: Any = copy.copy(inner.config)
    config.architectures = [cls.__name__ for cls in type(inner).__mro__]
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the model is quantised; only float weights have a delta")
    try:
        fitting = isinstance(inner, inner_class(config))
    except ValueError:
        fitting = False
    if not fitting:
        raise ValueError(
            f"the model is a {type(inner).__name__}: only causal language models, and sequence classifiers of the same "
            "types, have deltas"
        )
    return inner


def check_training(args: TrainingArguments, is_search: bool, of: str) -> None:
    """Check that the Trainer's settings leave the checkpoints to the callback.

    Args:
        is_search: whether this is a trial of a search for hyperparameters.
        of: the callback's setting.

    Raises:
        ValueError: naming the setting that does not.
    """
    if is_search:
        raise ValueError("a search for hyperparameters has folders of its own for each trial: train without it")
    if args.save_on_each_node:
        raise ValueError("save_on_each_node: one process writes a delta; use one file system, and leave it out")
    strategy = HubStrategy(args.hub_strategy)
    if args.push_to_hub and strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy '{strategy.value}' uploads a checkpoint while it becomes a delta: give the "
            "callback push_to instead, or take hub_strategy 'end'"
        )
    if of == "last" and args.save_total_limit is not None:
        raise ValueError(
            f"save_total_limit {args.save_total_limit} would remove checkpoints that others rest on (of='last'): give "
            "the callback keep instead"
        )
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None) if is_initialized() else None
    kind = getattr(plugin, "state_dict_type", None)
    if kind is not None and "FULL_STATE_DICT" not in str(kind):
        raise ValueError(
            f"FSDP's state dict type is {getattr(kind, 'name', kind)}, with which no process has the weights: set "
            "FULL_STATE_DICT (accelerate's fsdp_state_dict_type)"
        )


def check_base(
    base: str, options: HubOptions, base_name: str | None, model: PreTrainedModel, output_dir: Path, push_to: str | None
) -> None:
    """Check that a base can be that of the model's checkpoints.

    Raises:
        CheckpointError: if it cannot be reached.
        ValueError: if it is another model, or will be removed or overwritten.
    """
    if not base:
        raise ValueError("the model's configuration does not say what it was loaded from: give the base")
    content, _ = fetch_config(base, options)
    content = content["text_config"] if kind_of(content) is RepositoryKind.DELTA else content
    if content.get("model_type") != model.config.model_type:
        raise ValueError(
            f"the base '{base}' is a '{content.get('model_type')}' model, the trained one a "
            f"'{model.config.model_type}' model"
        )
    output = os.path.realpath(output_dir)
    if os.path.isdir(base) and output in (os.path.realpath(base), *map(str, Path(os.path.realpath(base)).parents)):
        raise ValueError(
            f"the base '{base}' is in the Trainer's output folder, where it may be replaced or removed: give the model "
            "that the training started from as the base"
        )
    if push_to is not None and not is_on_hub(recorded_base(base, options.revision, base_name)[0]):
        raise ValueError(
            f"push_to: others do not have the base '{base}', a local folder: give its Hub id as base or base_name"
        )
