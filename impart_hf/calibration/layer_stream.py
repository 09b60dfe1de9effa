"""Calibration: second moments of every linear layer's inputs, computed on the outputs of compressed layers."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.progress import Progress
from ..modeling.checkpoints import all_finite
from ..modeling.precision import full_float32
from .streamed_model import LayerArguments, LinearLayer, StreamedModel


@torch.no_grad()
def stream_layers(
    model: StreamedModel,
    tokens: Tensor,
    compressed: Callable[[str, Tensor | None], Tensor],
    *,
    batch_size: int = 4,
    progress: Progress,
) -> set[str]:
    """Run a fine-tuned model over calibration text, layer by layer, and compress its tensors on the way.

    `compressed(name, hessian)` is called once for each floating-point tensor that the checkpoint and the model share,
    and returns the weight to continue with, in any floating-point dtype. The tensors outside the decoder layers come
    first; then, for each layer in order, all tensors except the weights of its linear layers; then these weights, in
    the order in which they are used. Only for these is `hessian` not None: float32, (in_features,
    in_features), on the device, the mean of x xᵀ over all inputs x of the linear layer, with everything before it
    compressed. Linear layers with the same input, such as query, key and value, get the same tensor, which must not be
    written to. A linear layer that no token reaches gets None.

    Everything is computed in float32. Memory holds one decoder layer and one Hessian at a time, before the first layer
    the embeddings, and on the CPU the hidden states of all tokens.

    Args:
        model: from `streamed_model`, for the same tokens.
        tokens: int64, (sequences, length), without padding.
        compressed: see above.
        batch_size: sequences run at a time.
        progress: for a bar over the layers.

    Returns:
        The names that `compressed` was called with.

    Raises:
        ValueError: as soon as a layer's activations are found not to be finite.
    """
    for name in model.outside_layers:
        weight = compressed(name, None)
        if name in model.embedding_names:
            model.put(name, weight)
    hidden, arguments = model.layer_inputs(tokens.split(batch_size))
    model.release(model.embedding_names)
    last = len(model.layers) - 1
    for number, prefix in enumerate(progress.track(list(model.layers), "Calibrating")):
        own_arguments = {rows: of_layers[number] for rows, of_layers in arguments.items()}
        names = model.names_in(prefix)
        linear_layers = {name: model.linear[name] for name in names if name in model.linear}
        run = _LayerRun(number, model.layers[prefix], linear_layers, hidden, own_arguments, model.device)
        model.load(names)
        groups = run.linear_groups()
        linear = {name for group in groups for name in group.names}
        for name in names:
            if name not in linear:
                model.put(name, compressed(name, None))
        for group in groups:
            hessian = run.second_moment(group)
            for name in group.names:
                model.put(name, compressed(name, hessian))
            del hessian  # before the next one is made
        if number < last:
            for index in range(len(hidden)):
                hidden[index] = run.output(index).to("cpu")
        model.release(names)
    return set(model.names)


class _InputSeen(Exception):
    """Raised to end a layer's run once the input that was needed has been seen."""


@dataclass(frozen=True)
class _LinearGroup:
    """Linear layers that are called with the same tensors.

    Attributes:
        names: names of their weights.
        module: the first of them to be called.
        once: whether it is called only once in a run of the decoder layer.
    """

    names: list[str]
    module: LinearLayer
    once: bool


@dataclass(frozen=True)
class _LayerRun:
    """One decoder layer with its inputs, to be run repeatedly.

    Attributes:
        number: index of the layer.
        layer: the module, with parameters on `device`.
        linear_layers: its linear layers, by the names of their weights.
        hidden: input hidden states of every batch, on the CPU.
        arguments: the layer's other arguments, by the number of sequences in a batch.
        device: where the layer runs.
    """

    number: int
    layer: nn.Module
    linear_layers: dict[str, LinearLayer]
    hidden: list[Tensor]
    arguments: dict[int, LayerArguments]
    device: torch.device

    def output(self, index: int) -> Tensor:
        """Return the layer's output for a batch, on the device."""
        hidden = self.hidden[index]
        positional, named = self.arguments[len(hidden)]
        # The layer gets a copy, because it may write to its input and the next run needs it unchanged.
        result = self.layer(hidden.to(self.device, copy=True), *positional, **dict(named))
        return self._finite(result[0] if isinstance(result, tuple | list) else result)

    def _finite(self, values: Tensor) -> Tensor:
        if not all_finite(values):
            raise ValueError(
                f"calibration: activations of layer {self.number} are not finite: check the model's weights"
            )
        return values

    def linear_groups(self) -> list[_LinearGroup]:
        """Return the decoder layer's linear layers in the order of their calls, grouped by input.

        One batch is enough, unless it leaves some experts unreached; then further batches are run.
        """
        unseen = dict(self.linear_layers)
        groups: list[_LinearGroup] = []
        for index in range(len(self.hidden)):
            # The tensors stay alive while their ids are compared, so that every id is unique.
            inputs = self._linear_inputs(unseen, index)
            alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
            for name, tensors in inputs.items():
                alike[tuple(map(id, tensors))].append(name)
            groups += [_LinearGroup(names, unseen[names[0]], len(ids) == 1) for ids, names in alike.items()]
            unseen = {name: module for name, module in unseen.items() if name not in inputs}
            if not unseen:
                break
        return groups

    def _linear_inputs(self, linears: dict[str, LinearLayer], index: int) -> dict[str, list[Tensor]]:
        inputs: dict[str, list[Tensor]] = defaultdict(list)
        with _watched(linears, lambda name, values: inputs[name].append(values)):
            self.output(index)
        return inputs

    def second_moment(self, group: _LinearGroup) -> Tensor:
        """Return the mean of x xᵀ over a group's inputs x: float32, (in_features, in_features), on the device."""
        size = group.module.nx if isinstance(group.module, Conv1D) else group.module.in_features
        total = torch.zeros(size, size, device=self.device)
        count = 0

        def add(_: str, values: Tensor) -> None:
            nonlocal count
            rows = values.reshape(-1, size)
            with full_float32():
                total.addmm_(rows.T, rows)
            count += len(rows)
            if group.once:
                raise _InputSeen

        with _watched({group.names[0]: group.module}, add):
            for index in range(len(self.hidden)):
                with suppress(_InputSeen):
                    self.output(index)
        return self._finite(total.div_(max(count, 1)))


@contextmanager
def _watched(linears: dict[str, LinearLayer], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within this context, call `see` with the name and the input of every linear layer whose input is not empty."""

    def hook(name: str) -> Callable[..., None]:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if arguments[0].numel() > 0:
                see(name, arguments[0])

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
