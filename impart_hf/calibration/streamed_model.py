"""A model whose decoder layers are loaded and run one at a time."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from ..common.attention import with_capped_attention
from ..common.checkpoint_layout import CheckpointLayout, TensorGroup
from ..common.configs import model_config
from ..common.expert_stacks import ExpertStack, expert_stack
from ..common.meta_model import meta_model, reads_text, text_decoder
from ..modeling.checkpoints import all_finite
from ..modeling.tensors import Model
from ..modeling.transfer import to_device
from .expert_inputs import ExpertInputs
from .text import check_vocabulary

# Arguments of a decoder layer besides the hidden states: positional ones, and (name, value) pairs.
LayerArguments = tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]

LinearLayer = nn.Linear | Conv1D  # Conv1D, GPT-2's, stores its weight transposed


class StreamedModel:
    """A model whose parameters are on the meta device, except for those in use.

    Tensors are named as in the checkpoint; transformers may give their parameters other names, and may make one
    parameter of several tensors: of the experts of a mixture, which are run one after the other.

    Attributes:
        device: device of the parameters in use and of all buffers.
        dtype: floating-point dtype in which it runs.
        layers: the decoder layers in order, by their names in the model.
        parameters: by a tensor's name, that of the first parameter or buffer that transformers makes of it.
        names: the floating-point tensors in `parameters`, sorted.
        outside_layers: the names that are in no decoder layer.
        embedding_names: the names in `outside_layers` that the decoder needs to run: all of its own.
        output_names: the names in `outside_layers` that the logits need besides: the output projection.
        linear: the linear layers in decoder layers, by the names of their weights.
        stacks: the parameters in decoder layers that hold a matrix for each expert, by their names in the model.
        matrices: the tensors whose inputs are known as the model runs: those of linear layers and of experts.
        transposed: those of them that are stored as (in_features, out_features).
        vocabulary: number of tokens in the vocabulary.
        model: the transformers model.
    """

    def __init__(self, finetuned: Model, device: torch.device, purpose: str, dtype: torch.dtype):
        """Make the model; no weights are read yet.

        Args:
            purpose: what the model is needed for, for messages.
            dtype: see the attribute.
        """
        self._finetuned, self.device, self._purpose, self.dtype = finetuned, device, purpose, dtype
        self._tuples = False  # whether the decoder layers return tuples
        model_type = str(finetuned.config.get("model_type"))
        if model_type not in CONFIG_MAPPING:
            raise self.unsupported("transformers knows no language model of this type")
        config = model_config(finetuned.config)
        try:
            self.model: Any = meta_model(config, real_buffers=True, dtype=dtype, experts_implementation="eager").eval()
        except ValueError as error:
            raise self.unsupported(str(error)) from error
        with_capped_attention(self.model)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._decoder = text_decoder(self.model)
        self.vocabulary = self._decoder.get_input_embeddings().num_embeddings
        prefix = next(name for name, module in self.model.named_modules() if module is self._decoder)
        self.layers = self._find_layers(prefix, getattr(config.get_text_config(), "num_hidden_layers", None))
        layout = CheckpointLayout(finetuned, self.model)
        self._groups = {member.name: group for group in layout.groups.values() for member in group.members}
        self._made = {name: group for group in layout.groups.values() for name in group.parameters}
        self._pending: dict[str, dict[str, Tensor]] = {}  # of tensors that become one parameter, by the group's key
        self.parameters = {name: group.key for name, group in self._groups.items()}
        output = self.model.get_output_embeddings()
        self._output = next((f"{name}.weight" for name, module in self.model.named_modules() if module is output), "")
        self._output_is_tied = self._output in layout.tied and self._output not in self._made
        self._check_parameters(prefix)
        self.names = sorted(name for name in self.parameters if finetuned.dtype(name).is_floating_point)
        inside = {name for layer in self.layers for name in self.names_in(layer)}
        self.outside_layers = [name for name in self.names if name not in inside]
        own, needed = set(self.names_in(prefix)), reads_text(self.model)
        self.embedding_names = [name for name in self.outside_layers if name in own]
        self.output_names = [n for n in self.outside_layers if n not in own and needed(self.parameters[n])]
        self.linear = {
            self._made[weight].members[0].name: module
            for layer in self.layers
            for name, module in self.model.get_submodule(layer).named_modules()
            if isinstance(module, LinearLayer) and self._made[weight := f"{layer}.{name}.weight"].converter is None
        }
        self.stacks = self._find_stacks()
        experts = {name for stack in self.stacks.values() for name in stack.names}
        self.matrices = frozenset(self.linear.keys() | experts)
        self.transposed = frozenset(name for name, module in self.linear.items() if isinstance(module, Conv1D))

    def another(self) -> "StreamedModel":
        """Return a model like this one, without any values."""
        model = StreamedModel(self._finetuned, self.device, self._purpose, self.dtype)
        model._tuples, model.transposed = self._tuples, self.transposed
        return model

    def names_in(self, module: str) -> list[str]:
        """Return the names of the tensors in a module of the model; "" is the model itself."""
        return [name for name in self.names if self.parameters[name].startswith(module and f"{module}.")]

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

    def _find_stacks(self) -> dict[str, ExpertStack]:
        found: dict[str, ExpertStack] = {}
        for key, group in self._made.items():
            if key.startswith(tuple(f"{layer}." for layer in self.layers)):
                stack = expert_stack(group, self._finetuned, self.model.get_submodule(key.rpartition(".")[0]))
                found |= {} if stack is None else {key: stack}
        return found

    def _check_parameters(self, prefix: str) -> None:
        for name, parameter in self._decoder.named_parameters(prefix):
            group = self._made.get(name)
            if group is None or group.parameters[name].shape != parameter.shape:
                raise self.unsupported(f"its checkpoint has no {name} of shape {list(parameter.shape)}")

    def group(self, name: str) -> TensorGroup:
        """Return the tensors with which a tensor becomes parameters, itself among them."""
        return self._groups[name]

    def put(self, name: str, tensor: Tensor) -> None:
        """Set the values of a tensor; of several that become a parameter together, the last one given sets it."""
        group = self._groups[name]
        tensor = to_device(tensor, self.device).to(self._dtype_of(group.key) if tensor.is_floating_point() else None)
        if group.converter is None:
            self._set(group.key, tensor)
            return
        pending = self._pending.setdefault(group.key, {})
        pending[name] = tensor
        if len(pending) == len(group.members):
            for parameter, values in group.to_parameters(self._pending.pop(group.key)).items():
                self._set(parameter, values)

    def _dtype_of(self, parameter: str) -> torch.dtype:
        """Return the dtype in which transformers would keep a parameter."""
        exceptions = self.model._keep_in_fp32_modules_strict or ()
        return torch.float32 if any(part in exceptions for part in parameter.split(".")) else self.dtype

    def _set(self, parameter: str, tensor: Tensor) -> None:
        owner, _, attribute = parameter.rpartition(".")
        module = self.model.get_submodule(owner)
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
        for group in {self._groups[name].key: self._groups[name] for name in names}.values():
            self._pending.pop(group.key, None)
            for parameter, empty in group.parameters.items():
                self._set(parameter, torch.empty(empty.shape, dtype=empty.dtype, device="meta"))

    def layer_inputs(
        self, batches: Iterable[Tensor], keep: Callable[[Tensor], None]
    ) -> dict[int, list[LayerArguments]]:
        """Run the model up to the first decoder layer.

        Args:
            keep: called with the first layer's input for every batch, (sequences, length, size) in `dtype`.

        Returns:
            Every layer's other arguments, by the number of sequences in a batch.
        """
        arguments: dict[int, list[LayerArguments]] = {}
        for batch in batches:
            first, recorded = self._record(batch.to(self.device))
            if not all_finite(first):
                raise ValueError("calibration: activations of the embeddings are not finite: check the model's weights")
            if not all(map(_same, arguments.setdefault(len(batch), recorded), recorded)):
                raise self.unsupported("its layers share a state, or depend on the text not only through hidden states")
            if first.shape != self.states_shape(batch):
                raise self.unsupported(f"its layers pass on {list(first.shape)} for {list(batch.shape)} tokens")
            keep(first)
        return arguments

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

    def look_at_experts(self, hidden: Tensor, arguments: list[LayerArguments]) -> None:
        """Find out how stacks of experts are multiplied, on the first layer that has each kind of stack.

        Args:
            hidden: any hidden states of the model, (1, length, size).
            arguments: every layer's other arguments for one sequence.

        Raises:
            ValueError: if the inputs of a stack's matrices cannot be seen.
        """
        oriented: dict[str, bool] = {}
        for number, layer in enumerate(self.layers):
            own = {key: stack for key, stack in self.stacks.items() if key.startswith(f"{layer}.")}
            kinds = {key: key.removeprefix(f"{layer}.") for key in own}
            if set(kinds.values()) - oriented.keys():
                names = self.names_in(layer)
                self.load(names)
                seen = self._orientations(layer, list(own), hidden, arguments[number])
                self.release(names)
                if unseen := sorted(own.keys() - seen.keys()):
                    raise self.unsupported(f"it multiplies the experts in {unseen[0]} in a way that is not known")
                oriented |= {kinds[key]: seen[key] for key in own}
            turned = {key for key, kind in kinds.items() if oriented[kind] != own[key].flipped}
            self.transposed |= {name for key in turned for name in own[key].names}

    def _orientations(
        self, layer: str, stacks: list[str], hidden: Tensor, arguments: LayerArguments
    ) -> dict[str, bool]:
        """Run a layer, and return which of its stacks are multiplied as (in_features, out_features), by name."""
        seen: dict[str, bool] = {}
        positional, named = arguments
        with self.watched_experts(stacks, lambda key, _, rows, inputs_first: seen.update({key: inputs_first})):
            self.layers[layer](hidden.to(self.device, copy=True), *positional, **dict(named))
        return seen

    def is_transposed(self, stack: ExpertStack) -> bool:
        """Return whether a parameter's matrices are (in_features, out_features)."""
        return (stack.names[0] in self.transposed) != stack.flipped

    def states_shape(self, tokens: Tensor) -> tuple[int, int, int]:
        """Return the shape of the hidden states between two layers for tokens (sequences, length)."""
        return (*tokens.shape, self.model.config.get_text_config().hidden_size)

    def watched_experts(self, stacks: Iterable[str], see: Callable[[str, int, Tensor, bool], None]) -> ExpertInputs:
        """Return a context in which `see` is called with the inputs of these stacks' experts, see `ExpertInputs`."""
        return ExpertInputs({key: self.model.get_parameter(key) for key in stacks}, see)

    def check_run(self, tokens: Tensor) -> None:
        """Check that `run` works: for the first layer, and for the last with the logits. Only these are loaded.

        Args:
            tokens: int64 (1, length), on the device.

        Raises:
            ValueError: if it does not, or if the output projection is neither in the checkpoint nor tied.
        """
        self._check_output()
        names, hidden = list(self.layers), None
        last = len(names) - 1
        try:
            for number in sorted({0, last}):
                needed = [*self.embedding_names, *self.names_in(names[number]), *self.output_names]
                self.load(needed)
                hidden = self.run(tokens, hidden, range(number, number + 1))
                self.release(needed)
                if hidden.shape[:-1] != tokens.shape:
                    raise ValueError(f"a layer gives {list(hidden.shape)} for {list(tokens.shape)} tokens")
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            raise self.unsupported(f"its layers cannot be run one after the other ({error})") from error

    def _check_output(self) -> None:
        if not self._output_is_tied and self._output not in self._made:
            raise self.unsupported("its output projection is stored under another name than transformers uses")

    def run(self, tokens: Tensor, hidden: Tensor | None, window: range) -> Tensor:
        """Run successive layers within the model, so that they get all the arguments that the model passes to them.

        Args:
            tokens: int64 (sequences, length), on the device.
            hidden: input of the first of these layers, (sequences, length, size), on the device; None for the model's
                own input of its first layer.
            window: indices of the layers. They and the tensors of `embedding_names` must be loaded; so must those of
                `output_names`, if the last layer is among them.

        Returns:
            The input of the next layer; after the last layer, the logits.
        """
        if self._output_is_tied:
            self.model.get_output_embeddings().weight = self._decoder.get_input_embeddings().weight

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
    finetuned: Model,
    tokens: Tensor,
    device: str | torch.device,
    purpose: str = "calibration",
    dtype: torch.dtype | None = None,
) -> StreamedModel:
    """Make a `StreamedModel`, and check on the first and last sequence that it can be run layer by layer.

    Of a mixture of experts, one layer is run, to see how its experts are multiplied.

    Args:
        finetuned: the fine-tuned model.
        tokens: int64, (sequences, length), without padding.
        device: where the model is to run.
        purpose: what the model is needed for, for messages.
        dtype: dtype in which the model is to run; None for the fine-tune's own if that is bfloat16, otherwise float32.

    Raises:
        ValueError: if the architecture cannot be run layer by layer, or a token is not in the vocabulary.
    """
    model = StreamedModel(finetuned, torch.device(device), purpose, dtype or _own_dtype(finetuned))
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"calibration needs tokens of shape (sequences, length), not {list(tokens.shape)}")
    check_vocabulary(tokens, model.vocabulary, finetuned.source)
    model.load(model.embedding_names)
    hidden: list[Tensor] = []
    arguments = model.layer_inputs([tokens[:1], tokens[-1:]], hidden.append)
    model.release(model.embedding_names)
    model.look_at_experts(hidden[0], arguments[1])
    return model


def _own_dtype(finetuned: Model) -> torch.dtype:
    """Return the dtype to run a model in: bfloat16 if most of its tensors are, otherwise float32.

    float16 would overflow in some models.
    """
    dtypes = Counter(finetuned.dtype(name) for name in finetuned.names())
    return torch.bfloat16 if dtypes.most_common(1)[0][0] == torch.bfloat16 else torch.float32


def _same(one: Any, other: Any) -> bool:
    """Return whether arguments are equal; False for anything but tensors and plain values, as it may change later."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(_same, one, other))
    return one is None or (isinstance(one, bool | int | float | str) and one == other)
