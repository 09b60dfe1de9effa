"""Loading a delta repository into one of vLLM's models: base + decoded delta, tensor by tensor."""

import time
from collections.abc import Iterable, Iterator

import torch
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ..modeling.delta_repository import DeltaRepository
from .completeness import check_complete
from .engine_files import EngineFiles

_LOAD_FORMATS = ("auto", "hf", "safetensors", "dummy")


class DeltaWeights:
    """What stands before a model class of vLLM in the bases of its delta class: another source of its weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        load_format = vllm_config.load_config.load_format
        if load_format not in _LOAD_FORMATS:
            raise ValueError(
                f"a delta repository cannot be loaded with --load-format {load_format}: leave it out, or write the "
                "dense checkpoint with `impart-hf reconstruct` and serve that"
            )
        if vllm_config.model_config.runner_type != "generate":
            raise ValueError(
                f"a delta repository can generate only, not serve --runner {vllm_config.model_config.runner_type}: "
                "write the dense checkpoint with `impart-hf reconstruct` and serve that"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._vllm_config = vllm_config

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load fine-tuned tensors; vLLM's stream of the repository's files means those that the repository stands for.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError: if delta or base are not as they should be.
        """
        # Weights from anywhere else (a swap, a trainer) are the model's own already. The files are not read here: the
        # stream is a generator that nothing has started.
        if getattr(weights, "gi_code", None) is DefaultModelLoader.get_all_weights.__code__:
            # vLLM logs the time since then, which the stream would have set when it was started
            weights.gi_frame.f_locals["self"].counter_before_loading_weights = time.perf_counter()  # type: ignore[attr-defined]
            repository = EngineFiles(self._vllm_config).open_model()
            check_complete(repository, repository.text_config)
            weights = decoded_tensors(repository, next(self.parameters()).device)  # type: ignore[attr-defined]
        return super().load_weights(weights)  # type: ignore[misc]


def decoded_tensors(repository: DeltaRepository, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Every fine-tuned tensor with its name, one at a time, checked, decoded on `device` (on the CPU for meta)."""
    for name in repository.names():
        yield name, repository.tensor(name, "cpu" if device.type == "meta" else device)
