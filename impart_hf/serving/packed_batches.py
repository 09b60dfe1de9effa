"""Requests for different deltas in one batch of vLLM, the deltas packed: for vLLM they are adapters.

An engine with --enable-lora knows for each row of a batch whose it is. A request whose adapter is the folder of a delta
repository gets its rows from here: the modules that a delta changes are watched, and their outputs for the delta's rows
are replaced. vLLM's own adapter layers treat these rows as the base's.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from ..modeling.model_files import HubOptions, read_json
from ..modeling.repository_kind import RepositoryKind, kind_of
from ..repository.open import refuse_chain
from .engine_base import EngineBase, engine_on_base
from .engine_files import PACKED_VARIABLE, EngineFiles
from .packed_effects import ARCHITECTURES, LOGITS, Effect, Effects, read_effects

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest

_log = getLogger("vllm.impart_hf")

Rows = list[tuple[Mapping[str, Effect], Tensor]]


class PackedDelta(LoRAModel):
    """A delta in the place of an adapter: to vLLM, one that changes no layer.

    Attributes:
        effects: what it does to the model.
    """

    def __init__(self, number: int, effects: Effects):
        super().__init__(number, rank=0, loras={})
        self.effects = effects


@dataclass
class Batch:
    """Whose the rows of the present batch are.

    Attributes:
        tokens: for each delta in the batch, its effects and its tokens: int64 indices into them.
        samples: the same for the tokens that are sampled.
        counts: the numbers of tokens and of sampled ones.
    """

    tokens: Rows = field(default_factory=list)
    samples: Rows = field(default_factory=list)
    counts: tuple[int, int] = (0, 0)

    def divide(self, mapping: "LoRAMapping", deltas: Mapping[int, PackedDelta], device: torch.device) -> None:
        """Divide the rows of a new batch, by the numbers of their adapters."""
        self.tokens = _divided(mapping.index_mapping, deltas, device)
        self.samples = _divided(mapping.prompt_mapping, deltas, device)
        self.counts = len(mapping.index_mapping), len(mapping.prompt_mapping)

    def changes(self, module: str, rows: int) -> list[tuple[Effect, Tensor]]:
        """Return the effects on a module in this batch, and the rows of each.

        Args:
            rows: how many the module gets.

        Raises:
            RuntimeError: if these are not the batch's.
        """
        divided, known = (self.samples, self.counts[1]) if module == LOGITS else (self.tokens, self.counts[0])
        found = [(effects[module], own) for effects, own in divided if module in effects]
        if found and (rows != known if module == LOGITS else rows < known):  # tokens may be padded
            raise RuntimeError(f"{module} gets {rows} rows of a batch that has {known}: they cannot be told apart")
        return found


def _divided(numbers: tuple[int, ...], deltas: Mapping[int, PackedDelta], device: torch.device) -> Rows:
    if not deltas:
        return []
    owners = np.asarray(numbers)
    return [
        (deltas[number].effects.by_module, torch.from_numpy(np.flatnonzero(owners == number)).to(device))
        for number in np.unique(owners).tolist()
        if number in deltas
    ]


class _Watcher:
    """In the place of a module's method, whose outputs it changes for the rows of deltas."""

    def __init__(self, original: Callable[..., Any], module: str, batch: Batch):
        self.original, self._module, self._batch = original, module, batch

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        changes = self._batch.changes(self._module, len(tensors[0]))
        # Taken before the call, because norms write to their inputs.
        inputs = [[tensor[rows] for tensor in tensors] for _, rows in changes]
        result = self.original(*arguments, **options)
        outputs = result[0] if isinstance(result, tuple) else result
        for (effect, rows), own in zip(changes, inputs, strict=True):
            outputs[rows] = effect.changed(outputs[rows], *own)
        return result


def _watch(model: nn.Module, names: Mapping[str, Effect], batch: Batch) -> None:
    """Let modules change the rows of deltas; those that do already are left alone."""
    for name in names:
        module: Any = model.get_submodule(name)
        # Logits are scaled and capped after this method.
        method = "_get_logits" if name == LOGITS else "forward"
        if not isinstance(vars(module).get(method), _Watcher):
            setattr(module, method, _Watcher(getattr(module, method), name, batch))


class PackedModelManager(LRUCacheLoRAModelManager):
    """vLLM's manager of a model's adapters, which also tells the rows of deltas.

    Attributes:
        batch: whose the rows are; the watched modules share it.
    """

    def __init__(self, *arguments: Any, **options: Any):
        self.batch = Batch()
        super().__init__(*arguments, **options)

    def set_adapter_mapping(self, mapping: "LoRAMapping") -> None:
        """Take over whose the rows of the next batch are."""
        deltas = {
            number: adapter for number, adapter in self.list_adapters().items() if isinstance(adapter, PackedDelta)
        }
        self.batch.divide(mapping, deltas, self.device)
        if deltas:  # adapter layers would multiply these rows by zeros
            tokens, samples = (
                tuple(0 if number in deltas else number for number in numbers)
                for numbers in (mapping.index_mapping, mapping.prompt_mapping)
            )
            mapping = dataclasses.replace(mapping, index_mapping=tokens, prompt_mapping=samples)
        super().set_adapter_mapping(mapping)

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if not isinstance(lora_model, PackedDelta):  # which has none to merge, which vLLM does not expect
            super()._create_merged_loras_inplace(lora_model)


class PackedWorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's manager of a worker's adapters, which reads delta repositories as well."""

    _manager_cls = PackedModelManager

    def __init__(self, vllm_config: "VllmConfig", *arguments: Any, **options: Any):
        """Check the engine's settings.

        Raises:
            ValueError: if they do not allow deltas in a batch.
        """
        super().__init__(vllm_config, *arguments, **options)
        if problem := _problem(vllm_config):
            raise ValueError(f"{PACKED_VARIABLE} is set, but {problem}")
        self._vllm_config = vllm_config

    def create_lora_manager(self, model: nn.Module, vllm_config: "VllmConfig") -> Any:
        """Let a model have adapters and deltas.

        Raises:
            ValueError: if deltas cannot be placed in a model of this class.
        """
        if type(model).__name__ not in ARCHITECTURES:
            raise ValueError(
                f"{PACKED_VARIABLE} is set, but deltas cannot be placed in a {type(model).__name__}, only in "
                f"{', '.join(ARCHITECTURES)}"
            )
        return super().create_lora_manager(model, vllm_config)

    def _load_adapter(self, lora_request: "LoRARequest") -> LoRAModel:
        folder = get_adapter_absolute_path(lora_request.lora_path)
        if not is_delta(folder):
            return super()._load_adapter(lora_request)
        files, base = self._base
        repository = base.open_delta(files, folder, None)
        refuse_chain(repository)
        model_config = self._vllm_config.model_config
        tied = bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
        manager: Any = self._adapter_manager
        effects = read_effects(repository, manager.model, model_config.dtype, tied)
        _watch(manager.model, effects.by_module, manager.batch)
        _log.info("'%s' takes %.1f MB, packed", folder, effects.nbytes / 1e6)
        for note in files.notes(folder, HubOptions()):
            _log.warning("'%s': %s", folder, note)
        return PackedDelta(lora_request.lora_int_id, effects)

    @functools.cached_property
    def _base(self) -> tuple[EngineFiles, EngineBase]:
        return engine_on_base(self._vllm_config)


def _problem(vllm_config: "VllmConfig") -> str | None:
    """Return what in an engine's settings does not allow deltas in a batch; None if nothing."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if not model.enforce_eager:
        return "a compiled model does not ask whose a row is: add --enforce-eager"
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        return "a delta cannot be divided among several devices: leave out --tensor-parallel-size and the like"
    if vllm_config.speculative_config is not None:
        return "a draft model's rows cannot be told apart: serve without one"
    if model.quantization is not None:
        return f"a delta is not a delta of weights in {model.quantization}: serve the base as it is"
    if model.enable_prompt_embeds:
        return "embeddings of prompts are made outside a batch: leave out --enable-prompt-embeds"
    return None


def is_delta(folder: str) -> bool:
    """Return whether a local folder is a delta repository."""
    path = Path(folder) / "config.json"
    return path.is_file() and kind_of(read_json(path)) is RepositoryKind.DELTA


@functools.cache
def register_packed_batches() -> None:
    """Let vLLM read deltas as adapters, in this process; calling it again changes nothing."""
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker import lora_model_runner_mixin

    if not issubclass(PackedWorkerManager, lora_model_runner_mixin.LRUCacheWorkerLoRAManager):
        raise ImportError("vLLM's workers make another manager of adapters")
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = PackedWorkerManager
    InputProcessor.process_inputs = _without_prompt_logprobs(InputProcessor.process_inputs)


def _without_prompt_logprobs(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what checks a request, so that one for prompt_logprobs is refused, even one for the base.

    vLLM computes a prompt's logits by a call of its own, whose rows are not those of the batch, and which cannot be
    told from the call for sampled tokens.
    """

    @functools.wraps(process_inputs)
    def checked(self: Any, *arguments: Any, **options: Any) -> Any:
        request = process_inputs(self, *arguments, **options)
        asked = request.sampling_params
        if self.lora_config is not None and asked is not None and asked.prompt_logprobs is not None:
            raise ValueError(f"an engine with {PACKED_VARIABLE} cannot give prompt_logprobs: ask one without")
        return request

    return checked
