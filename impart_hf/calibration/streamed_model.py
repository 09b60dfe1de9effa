"""A model whose decoder layers are loaded and run one at a time."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ..common.meta_model import meta_model
from ..modeling.checkpoints import all_finite, config_fields
from ..modeling.tensors import Model
from .text import check_vocabulary

# Arguments of a decoder layer besides the hidden states: positional ones, and (name, value) pairs.
LayerArguments = tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]


class StreamedModel:
    """A model in float32 whose parameters are on the meta device, except for those in use.

    Attributes:
        device: device of the parameters in use and of all buffers.
        layers: the decoder layers in order, by their names in the model.
        names: the floating-point tensors that checkpoint and model share, sorted.
        outside_layers: the names that are in no decoder layer.
        embedding_names: the names in `outside_layers` that the decoder needs to run: all except the output projection.
        vocabulary: number of tokens in the vocabulary.
        model: the transformers model.
    """

    def __init__(self, finetuned: Model, device: torch.device, purpose: str):
        """Make the model; no weights are read yet.

        Args:
            purpose: what the model is needed for, for messages.
        """
        self._finetuned, self.device, self._purpose = finetuned, device, purpose
        self._tuples = False  # whether the decoder layers return tuples
        model_type = str(finetuned.config.get("model_type"))
        if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in AutoModelForCausalLM._model_mapping:
            raise self.unsupported("transformers knows no causal language model of this type")
        config = CONFIG_MAPPING[model_type].from_dict(config_fields(finetuned.config))
        try:
            self.model: Any = meta_model(config, real_buffers=True, dtype=torch.float32).eval()
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{purpose} needs accelerate: pip install 'impart-hf[calibration]'") from error
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._decoder = self.model.get_decoder()
        self.vocabulary = self._decoder.get_input_embeddings().num_embeddings
        prefix = next(name for name, module in self.model.named_modules() if module is self._decoder)
        self.layers = self._find_layers(prefix, getattr(config.get_text_config(), "num_hidden_layers", None))
        self._check_parameters(prefix)
        known = self.model.state_dict()
        self.names = [n for n in finetuned.names() if n in known and finetuned.dtype(n).is_floating_point]
        inside = tuple(f"{name}." for name in self.layers)
        self.outside_layers = [name for name in self.names if not name.startswith(inside)]
        self.embedding_names = [name for name in self.outside_layers if name.startswith(prefix and f"{prefix}.")]

    def unsupported(self, why: str) -> ValueError:
        model_type = self._finetuned.config.get("model_type")
        return ValueError(
            f"{self._purpose} is not available for models of type '{model_type}': {why}; compress without it"
        )

    def _find_layers(self, prefix: str, count: int | None) -> dict[str, nn.Module]:
        lists = [
            (name, module)
            for name, module in self._decoder.named_children()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if len(lists) != 1:
            raise self.unsupported("its decoder is not a single list of layers")
        name, modules = lists[0]
        path = f"{prefix}.{name}" if prefix else name
        return {f"{path}.{number}": layer for number, layer in enumerate(modules)}

    def _check_parameters(self, prefix: str) -> None:
        stored = set(self._finetuned.names())
        for name, parameter in self._decoder.named_parameters(prefix):
            if name not in stored or self._finetuned.shape(name) != tuple(parameter.shape):
                raise self.unsupported(
                    f"its checkpoint has no {name} of shape {list(parameter.shape)}, which transformers makes from "
                    "other tensors"
                )

    def put(self, name: str, tensor: Tensor) -> None:
        """Set the values of a parameter or buffer; a tensor on the meta device frees them."""
        owner, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(owner)
        tensor = tensor if tensor.is_meta else tensor.to(self.device, torch.float32)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
        else:
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)

    def load(self, names: list[str]) -> None:
        """Load the fine-tune's values into parameters."""
        for name in names:
            self.put(name, self._finetuned.tensor(name))

    def release(self, names: list[str]) -> None:
        """Free the values of parameters."""
        for name in names:
            self.put(name, torch.empty(self._finetuned.shape(name), device="meta"))

    def layer_inputs(self, batches: Iterable[Tensor]) -> tuple[list[Tensor], dict[int, list[LayerArguments]]]:
        """Run the model up to the first decoder layer.

        Returns:
            The first layer's input for every batch, on the CPU, and every layer's other arguments, by the number of
            sequences in a batch.
        """
        hidden: list[Tensor] = []
        arguments: dict[int, list[LayerArguments]] = {}
        for batch in batches:
            first, recorded = self._record(batch.to(self.device))
            if not all_finite(first):
                raise ValueError("calibration: activations of the embeddings are not finite: check the model's weights")
            if not all(map(_same, arguments.setdefault(len(batch), recorded), recorded)):
                raise self.unsupported("its layers share a state, or depend on the text not only through hidden states")
            hidden.append(first.to("cpu"))
        return hidden, arguments

    def _record(self, batch: Tensor) -> tuple[Tensor, list[LayerArguments]]:
        """Return the first layer's input, and the other arguments of every layer."""
        failures: list[Exception] = []
        for tuples in (False, True):  # in some architectures, decoder layers return a tuple
            try:
                recorded = self._record_as(batch, tuples)
                self._tuples = tuples
                return recorded
            except (_NotPassedOn, TypeError, ValueError, AttributeError) as error:
                failures.append(error)
        raise self.unsupported(
            f"its decoder does more than pass each layer's output to the next ({failures[0]})"
        ) from failures[0]

    def _record_as(self, batch: Tensor, tuples: bool) -> tuple[Tensor, list[LayerArguments]]:
        """Run the decoder with layers that record their arguments and return the hidden states unchanged."""
        arguments: list[LayerArguments] = []
        first: list[Tensor] = []

        def recorder(number: int) -> Callable[..., Any]:
            def forward(hidden: Tensor, *positional: Any, **named: Any) -> Any:
                if number != len(arguments) or (first and hidden is not first[0]):
                    raise _NotPassedOn(f"layer {number} is not called with the output of the layer before it")
                first.append(hidden)
                arguments.append((positional, tuple(named.items())))
                return (hidden,) if tuples else hidden

            return forward

        for number, layer in enumerate(self.layers.values()):
            layer.forward = recorder(number)
        try:
            self._decoder(input_ids=batch, use_cache=False)
        finally:
            for layer in self.layers.values():
                del layer.forward
        if len(arguments) != len(self.layers):
            raise _NotPassedOn(f"{len(arguments)} of {len(self.layers)} layers are called")
        return first[0], arguments

    def check_output(self) -> None:
        """Check that the model can compute logits: that its output projection is in the checkpoint, or tied.

        Raises:
            ValueError: if not.
        """
        output = self.model.get_output_embeddings()
        names = {name for name, module in self.model.named_modules() if module is output}
        if not self._finetuned.tied and not any(f"{name}.weight" in self.names for name in names):
            raise self.unsupported("its output projection is stored under another name than transformers uses")

    def run(self, tokens: Tensor, hidden: Tensor | None, window: range) -> Tensor:
        """Run successive layers within the model, so that they get all the arguments that the model passes to them.

        Args:
            tokens: int64 (sequences, length), on the device.
            hidden: input of the first of these layers, (sequences, length, size), on the device; None for the model's
                own input of its first layer.
            window: indices of the layers. They and the tensors of `embedding_names` must be loaded; so must the rest of
                the model, if the last layer is among them.

        Returns:
            The input of the next layer; after the last layer, the logits.
        """
        output = self.model.get_output_embeddings()
        if output is not None and output.weight.is_meta and self._finetuned.tied:
            output.weight = self._decoder.get_input_embeddings().weight

        def skipped(states: Tensor, *_: Any, **__: Any) -> Any:
            output = states if hidden is None else hidden
            return (output,) if self._tuples else output

        def reached(states: Tensor, *_: Any, **__: Any) -> Any:
            raise _LayerReached(states)

        layers = list(self.layers.values())
        replaced = layers[: window.start] + layers[window.stop : window.stop + 1]
        for layer in replaced:
            layer.forward = reached if layer is replaced[-1] and window.stop < len(layers) else skipped
        try:
            return self.model(input_ids=tokens, use_cache=False).logits
        except _LayerReached as reached_layer:
            return reached_layer.states
        finally:
            for layer in replaced:
                del layer.forward


class _LayerReached(Exception):
    """Raised to end a run at the layer whose input is the result."""

    def __init__(self, states: Tensor):
        super().__init__()
        self.states = states


class _NotPassedOn(Exception):
    """A layer was not called with the output of the layer before it."""


@torch.no_grad()
def streamed_model(
    finetuned: Model, tokens: Tensor, device: str | torch.device, purpose: str = "calibration"
) -> StreamedModel:
    """Make a `StreamedModel`, and check on the first and last sequence that it can be run layer by layer.

    Args:
        finetuned: the fine-tuned model.
        tokens: int64, (sequences, length), without padding.
        device: where the model is to run.
        purpose: what the model is needed for, for messages.

    Raises:
        ValueError: if the architecture cannot be run layer by layer, or a token is not in the vocabulary.
        ModuleNotFoundError: if accelerate is not installed.
    """
    model = StreamedModel(finetuned, torch.device(device), purpose)
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"calibration needs tokens of shape (sequences, length), not {list(tokens.shape)}")
    check_vocabulary(tokens, model.vocabulary, finetuned.source)
    model.load(model.embedding_names)
    model.layer_inputs([tokens[:1], tokens[-1:]])
    model.release(model.embedding_names)
    return model


def _same(one: Any, other: Any) -> bool:
    """Return whether arguments are equal; False for anything but tensors and plain values, as it may change later."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(_same, one, other))
    return one is None or (isinstance(one, bool | int | float | str) and one == other)
