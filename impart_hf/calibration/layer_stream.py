"""Calibration: the second moments of every linear layer's inputs, every layer after the compressed ones before it."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.progress import Progress
from ..modeling.checkpoints import all_finite
from .streamed_model import LayerArguments, StreamedModel


@torch.no_grad()
def stream_layers(
    model: StreamedModel,
    tokens: Tensor,
    compressed: Callable[[str, Tensor | None], Tensor],
    *,
    batch_size: int = 4,
    progress: Progress,
) -> set[str]:
    """Run a fine-tuned model over calibration text, layer by layer, and let its tensors be compressed on the way.

    `compressed(name, hessian)` is called once for each floating-point tensor that the checkpoint and the model share,
    and returns the weight to go on with, in any floating-point dtype. The tensors outside the decoder layers come
    first; then, layer after layer, all but the weights of its `torch.nn.Linear`s; then these, in the order in which
    they are used. `hessian` is None except for these: float32, (in_features, in_features), on the device, the mean of
    x xᵀ over all inputs x of the linear layer, everything before it being compressed. Linear layers with the same
    input, such as query, key and value, are handed the same object: it must not be written to. A linear layer that no
    token reaches has None too.

    All is computed in float32. Memory holds one decoder layer and one Hessian at a time, before the first layer the
    embeddings, and on the CPU the hidden states of all tokens.

    Args:
        model: from `streamed_model`, for the same tokens.
        tokens: int64, (sequences, length), without padding.
        compressed: see above.
        batch_size: how many sequences run at a time.
        progress: for a bar over the layers.

    Returns:
        The names that `compressed` was called with.

    Raises:
        ValueError: before a layer's first call, or as soon as it shows, if the layer's activations are not finite.
    """
    for name in model.outside:
        weight = compressed(name, None)
        if name in model.entrance:
            model.put(name, weight)
    hidden, arguments = model.layer_inputs(tokens.split(batch_size))
    model.release(model.entrance)
    last = len(model.layers) - 1
    for number, prefix in enumerate(progress.track(list(model.layers), "Calibrating")):
        own_arguments = {rows: of_layers[number] for rows, of_layers in arguments.items()}
        run = _LayerRun(number, prefix, model.layers[prefix], hidden, own_arguments, model.device)
        names = [name for name in model.names if name.startswith(prefix + ".")]
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
    """The input that a run is for has come; what follows in the layer need not be run."""


@dataclass(frozen=True)
class _LinearGroup:
    """Linear layers that are called with the same tensors.

    Attributes:
        names: of their weights.
        module: one of them, the first to be called.
        once: whether it is called once in a run of the decoder layer.
    """

    names: list[str]
    module: nn.Linear
    once: bool


@dataclass(frozen=True)
class _LayerRun:
    """One decoder layer, to be run again and again over its inputs.

    Attributes:
        number: of the layer.
        prefix: its name in the model.
        layer: with parameters on `device`.
        hidden: its input for every batch, on the CPU.
        arguments: its further arguments, by the number of sequences in a batch.
        device: where it runs.
    """

    number: int
    prefix: str
    layer: nn.Module
    hidden: list[Tensor]
    arguments: dict[int, LayerArguments]
    device: torch.device

    def output(self, index: int) -> Tensor:
        """The layer's output for a batch, on the device."""
        hidden = self.hidden[index]
        positional, named = self.arguments[len(hidden)]
        # A copy, should the layer write to it: the next run needs it as it is.
        result = self.layer(hidden.to(self.device, copy=True), *positional, **dict(named))
        return self._finite(result[0] if isinstance(result, tuple | list) else result)

    def _finite(self, values: Tensor) -> Tensor:
        if not all_finite(values):
            raise ValueError(f"calibration: activations of layer {self.number} are not finite")
        return values

    def linear_groups(self) -> list[_LinearGroup]:
        """The layer's linear layers in the order of their calls, those with the same input together.

        One batch shows them, unless some are experts that it does not reach; then further ones are run.
        """
        waiting = {
            f"{self.prefix}.{name}.weight": module
            for name, module in self.layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        groups: list[_LinearGroup] = []
        for index in range(len(self.hidden)):
            # Kept while ids are compared, so that no two inputs can have the same one.
            inputs = self._linear_inputs(waiting, index)
            alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
            for name, tensors in inputs.items():
                alike[tuple(map(id, tensors))].append(name)
            groups += [_LinearGroup(names, waiting[names[0]], len(ids) == 1) for ids, names in alike.items()]
            waiting = {name: module for name, module in waiting.items() if name not in inputs}
            if not waiting:
                break
        return groups

    def _linear_inputs(self, linears: dict[str, nn.Linear], index: int) -> dict[str, list[Tensor]]:
        inputs: dict[str, list[Tensor]] = defaultdict(list)
        with _watched(linears, lambda name, values: inputs[name].append(values)):
            self.output(index)
        return inputs

    def second_moment(self, group: _LinearGroup) -> Tensor:
        """The mean of x xᵀ over the inputs x of a group: float32, (in_features, in_features), on the device."""
        size = group.module.in_features
        total = torch.zeros(size, size, device=self.device)
        count = 0

        def add(_: str, values: Tensor) -> None:
            nonlocal count
            rows = values.reshape(-1, size)
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
def _watched(linears: dict[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it lasts, `see` is called with the name and the input of every linear layer that is called with any row."""

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
