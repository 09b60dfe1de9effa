"""Loading some tensors of a checkpoint into one of vLLM's models that is in use.

vLLM joins tensors of a checkpoint to parameters of its own (query, key and value; gate and up projection), and lays
them out anew once they are loaded, on CPUs always. Its layerwise reload therefore loads whole modules: one that gets
only some of its tensors would keep what was in memory for the others. It leaves modules alone that get none.
"""

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from logging import getLogger
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..modeling.tensors import Tensors

if TYPE_CHECKING:
    from vllm.config import ModelConfig

Weights = Iterable[tuple[str, torch.Tensor]]


class Places:
    """Which modules of a model each tensor of a checkpoint is loaded into.

    The model's own `load_weights` tells: it is given one tensor after the other, without values, while all its weights
    are set aside. The model can be used again when that has been done.

    Attributes:
        names: of the checkpoint's tensors, sorted.
    """

    def __init__(self, model: nn.Module, model_config: "ModelConfig", tensors: Tensors):
        """Find the modules.

        Args:
            model: on the device, loaded; no request may be running.
            tensors: the tensors of a checkpoint; none is read.
        """
        self.names, self._modules = tensors.names(), dict[str, frozenset[nn.Module]]()
        with _recording(model, model_config) as recorder:
            for name in self.names:
                empty = torch.empty(tensors.shape(name), dtype=tensors.dtype(name), device="meta")
                self._modules[name] = recorder.modules_of(name, empty)

    def closed(self, names: Set[str]) -> tuple[list[str], frozenset[nn.Module]] | None:
        """Return the tensors that must be loaded with these, themselves included, and all modules that they go to.

        Returns:
            None if a tensor's modules are not known: it may be loaded only together with others.
        """
        wanted, modules = set(names), frozenset[nn.Module]()
        while True:
            if not all(self._modules.get(name) for name in wanted):
                return None
            reached = frozenset[nn.Module]().union(*(self._modules[name] for name in wanted))
            if reached == modules:
                return sorted(wanted), modules
            modules = reached
            wanted = {name for name, own in self._modules.items() if own & modules}


class _Recorder:
    """Notes which modules a model loads a tensor into.

    Attributes:
        touched: the modules that a tensor was loaded into.
    """

    def __init__(self, model: nn.Module):
        self._model, self.touched = model, set[nn.Module]()

    def modules_of(self, name: str, empty: torch.Tensor) -> frozenset[nn.Module]:
        """Have the model load one tensor, and return the modules that it went to."""
        self.touched.clear()
        self._model.load_weights(iter([(name, empty)]))  # type: ignore[operator]
        return frozenset(self.touched)

    def noting(self, module: nn.Module) -> Callable[..., None]:
        """Return a loader for a module's parameters that loads nothing."""
        return lambda *arguments, **options: self.touched.add(module)


@contextmanager
def _recording(model: nn.Module, model_config: "ModelConfig") -> Iterator[_Recorder]:
    """Set a model's weights aside until the context ends, and note what it would load into which module."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    recorder = _Recorder(model)
    loaders: list[tuple[Any, Any]] = []
    try:
        # Its parameters have the shapes and loaders of a checkpoint again, on the meta device.
        initialize_layerwise_reload(model)
        for module in model.modules():
            for tensor in _tensors_of(module):
                if (loader := getattr(tensor, "weight_loader", None)) is not None:
                    loaders.append((tensor, loader))
                    tensor.weight_loader = recorder.noting(module)
        yield recorder
    finally:
        for tensor, loader in reversed(loaders):  # a shared tensor has several
            tensor.weight_loader = loader
        for module in model.modules():
            info = get_layerwise_info(module)
            if info.can_load():
                info.load_numel_total = 0  # otherwise vLLM warns of each that got no weights
        finalize_layerwise_reload(model, model_config)


def _tensors_of(module: nn.Module) -> Iterator[Any]:
    """Yield a module's own parameters and buffers."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def load_into(
    model: nn.Module, model_config: "ModelConfig", weights: Weights, modules: Set[nn.Module] | None = None
) -> None:
    """Load weights into a model that is in use; no request may be running.

    Args:
        weights: tensors of a checkpoint by name: all that go to the modules.
        modules: the modules that are loaded; None for all.

    Raises:
        Exception: whatever goes wrong. Modules may have other weights then, and must be loaded again.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    if modules is None:
        initialize_layerwise_reload(model)
    else:
        # Attention may keep what it has made of other modules' weights.
        for module in list(model.modules()):
            if module in modules or is_deferred_attention_layer(module):
                initialize_layerwise_reload(module)
    try:
        model.load_weights(weights)  # type: ignore[operator]
    finally:
        # After an error, unfinished layers are on the meta device with wrapped loaders, so that no later load would
        # work without this.
        finalize_layerwise_reload(model, model_config)
    if modules is None or any(isinstance(module, VocabParallelEmbedding) for module in modules):
        _repack_output(model)


def _repack_output(model: nn.Module) -> None:
    """Pack the output projection again, from the weight that it has now.

    On CPUs vLLM packs a copy of the weight of every layer. Its reload renews the copy of the layer that a weight is
    loaded into, which for tied embeddings is the input embedding alone.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            layer.quant_method.process_weights_after_loading(layer)


def places_or_none(model: nn.Module, model_config: "ModelConfig", tensors: Tensors) -> Places | None:
    """Return where a model's tensors go; None if the model does not tell, or its layout is not that of its base.

    A quantised model makes other numbers of what is loaded.
    """
    if model_config.quantization is not None:
        return None
    try:
        return Places(model, model_config, tensors)
    except Exception as error:  # models' own code can raise any type when it gets one tensor alone
        getLogger("vllm.impart_hf").warning(
            "%s cannot load tensors one by one, so every swap loads all of them: %s", type(model).__name__, error
        )
        return None
