"""Models whose weights transformers spreads over processes: by a tensor-parallel plan, FSDP or a pipeline."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled


def values_are_dropped(quantised: bool) -> bool:
    """Return whether transformers drops the values that this process loads, as FSDP sends it those of another one.

    That is so with accelerate's FSDP and `FSDP_CPU_RAM_EFFICIENT_LOADING`, in all processes of a machine but the first.

    Args:
        quantised: whether the model is quantised while it is loaded.
    """
    return is_fsdp_enabled() and os.environ.get("LOCAL_RANK") != "0" and not quantised


def is_spread(model: PreTrainedModel) -> bool:
    """Return whether each of several processes has a part of the model."""
    if getattr(model.config, "distributed_config", None) is None or not distributed.is_available():
        return False
    return distributed.is_initialized() and distributed.get_world_size() > 1


def true_in_any(model: PreTrainedModel, answer: bool) -> bool:
    """Return whether any process that has a part of the model answers yes; all must ask."""
    if not is_spread(model):
        return answer
    answers = torch.tensor([int(answer)], device=model.device)
    distributed.all_reduce(answers, distributed.ReduceOp.MAX)
    return bool(answers.item())


@contextmanager
def one_process_writes(model: PreTrainedModel) -> Iterator[bool]:
    """Yield whether this process works for all that have a part of the model; the others wait for it at the end."""
    if not is_spread(model):
        yield True
        return
    try:
        yield distributed.get_rank() == 0
    finally:  # also after an error, or the others would wait for ever
        distributed.barrier()


__all__ = ["is_spread", "one_process_writes", "true_in_any", "values_are_dropped"]
