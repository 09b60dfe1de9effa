"""The worker's side of a swap: a method that the plugin gives to vLLM's workers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..modeling.checkpoints import Checkpoint
from ..modeling.model_files import HubOptions
from ..modeling.tensors import Tensors
from .engine_files import EngineFiles, decoded_tensors

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase


Weights = Iterator[tuple[str, torch.Tensor]]


@dataclass
class _State:
    """The state of swaps that a worker keeps.

    Attributes:
        files: files of the model that its engine was started on.
        served: delta repository and revision of its present weights; (None, None) for the base's own.
    """

    files: EngineFiles
    served: tuple[str | None, str | None]


def load_delta(worker: "WorkerBase", delta: str | None, revision: str | None, dense: str | None) -> dict[str, Any]:
    """Replace the worker's weights by those of a delta on the engine's base, on all workers or on none.

    No request may be running. This never raises: if one of several workers raised, the others' answers to this call
    would be taken for their answers to the next one.

    Args:
        worker: one of the engine's workers; all of them must be called.
        delta: folder or Hub id of a checked delta repository; None for the base's own weights.
        revision: its commit.
        dense: folder of its weights, if they are already decoded.

    Returns:
        {"error": None} if the new weights were loaded. Otherwise "error" is the error of the first worker that failed,
        "sound" says whether all workers have the old weights again, and "undoing" why not.
    """
    weights: list[Weights] = []
    error = _first_error(_message(lambda: weights.append(_open(worker, delta, revision, dense))))
    if error is not None:
        return {"error": error, "sound": True}
    error = _first_error(_message(lambda: _load(worker, weights[0])))
    if error is None:
        _state(worker).served = (delta, revision)
        return {"error": None, "sound": True}
    undone = _first_error(_message(lambda: _load(worker, _open(worker, *_state(worker).served))))
    return {"error": error, "sound": undone is None, "undoing": undone}


_STATE = "_impart_hf_state"


def _state(worker: "WorkerBase") -> _State:
    if not hasattr(worker, _STATE):
        files = EngineFiles(worker.vllm_config)
        started_on = (files.model, files.options.revision) if files.is_delta else (None, None)
        setattr(worker, _STATE, _State(files, started_on))
    return getattr(worker, _STATE)


def _open(worker: "WorkerBase", delta: str | None, revision: str | None, dense: str | None = None) -> Weights:
    """Open the tensors to load; none is read yet."""
    files = _state(worker).files
    if delta is None:
        return _tensors(files.open_base())
    if dense is not None:
        return _tensors(Checkpoint(dense, HubOptions()))
    return decoded_tensors(files.open_delta(delta, revision), worker.device or torch.device("cpu"))


def _load(worker: "WorkerBase", weights: Weights) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    try:
        worker.reload_weights(weights_iterator=weights)
    except BaseException:
        # Unfinished layers are on the meta device with wrapped loaders; without this, no later load would work.
        finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_config)
        raise
    _repack_output(worker.model_runner.get_model())


def _repack_output(model: torch.nn.Module) -> None:
    """Pack the output projection again, from the weight that it has now.

    On CPUs vLLM packs a copy of the weight of every layer. Its reload renews the copy of the layer that a weight is
    loaded into, which for tied embeddings is the input embedding alone.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            layer.quant_method.process_weights_after_loading(layer)


def _tensors(model: Tensors) -> Weights:
    return ((name, model.tensor(name)) for name in model.names())


def _message(work: Callable[[], object]) -> str | None:
    """Call a function, and return its error as a message; None if there is none."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _first_error(error: str | None) -> str | None:
    """Return the first error among all workers of the engine."""
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return error
    errors: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(errors, error, group=group.cpu_group)
    return next((one for one in errors if one is not None), None)
