"""Calibration: second moments of every linear layer's inputs, computed on the outputs of compressed layers."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common import processes
from ..common.expert_stacks import ExpertStack
from ..common.progress import Progress
from ..modeling.checkpoints import all_finite
from ..modeling.precision import full_float32
from .hidden_states import HiddenStates, Write
from .shared_sums import Sums, own_batches, shared_sums
from .streamed_model import LayerArguments, LinearLayer, StreamedModel

BATCH_SIZE = 4  # sequences run at a time, unless a caller asks for others
# The second moments of this many bytes of experts are computed in one run of their layer.
_MOMENT_BYTES = 1 << 30
# An expert's inputs are not trusted if there are fewer than this share of their size.
_FEW_TOKENS = 0.25

# Second moments of a matrix's inputs; of a stack of matrices, those of each; None where they are not known.
Moments = Tensor | Sequence[Tensor | None] | None


@torch.no_grad()
def stream_layers(
    model: StreamedModel,
    tokens: Tensor,
    compressed: Callable[[str, Moments], Tensor],
    folder: Path,
    *,
    prepare: Callable[[Mapping[str, Moments]], None] = lambda moments: None,
    is_kept: Callable[[str], bool] = lambda name: True,
    batch_size: int = BATCH_SIZE,
    progress: Progress,
) -> set[str]:
    """Run a fine-tuned model over calibration text, layer by layer, and compress its tensors on the way.

    `compressed(name, hessian)` is called once for each floating-point tensor that the checkpoint and the model share,
    and returns the weight to continue with, in any floating-point dtype. The tensors outside the decoder layers come
    first; then, for each layer in order, all tensors except the weights of its linear layers and experts; then these
    weights, in the order in which they are used. Only for these is `hessian` not None: float32, (in_features,
    in_features), on the device, the mean of x xᵀ over all inputs x of the linear layer or expert, with everything
    before it compressed. For a tensor that holds all experts it is a sequence of these, computed when they are asked
    for in order. Weights with the same input, such as query, key and value, get the same tensor, which must not be
    written to. A linear layer that no token reaches gets None, and so does an expert that is reached by fewer tokens
    than a quarter of its inputs.

    The processes of a job share the batches: all must call this, with one folder that all see. Only a tensor that
    holds all experts is left to the process that asks for its second moments.

    The model runs in its own dtype; second moments are summed in float32. Memory holds one decoder layer and one
    Hessian at a time (of experts, up to a gigabyte of them), before the first layer the embeddings. The hidden states
    of all tokens are in a file, and stay there: a second call with the same arguments begins with the layer that the
    first one did not finish, and calls `compressed` for what comes from there on, besides the tensors outside layers.

    Args:
        model: from `streamed_model`, for the same tokens.
        tokens: int64, (sequences, length), without padding.
        compressed: see above.
        folder: for hidden states; of this model and text alone.
        prepare: called, in all processes of a job, with all names and second moments with which `compressed` is called
            next; may share the work out.
        is_kept: told the name of a tensor of a layer that an earlier call finished, returns whether its result is
            still there. If one is not, this call begins with the first layer.
        batch_size: sequences run at a time.
        progress: for a bar over the layers.

    Returns:
        The names of all tensors that the checkpoint and the model share.

    Raises:
        ValueError: as soon as a layer's activations are found not to be finite.
    """
    states = HiddenStates(folder, model.states_shape(tokens), model.dtype)
    first, count = processes.in_first(lambda: _first_unfinished(states, model, is_kept)), len(model.layers)
    if first == count:
        return set(model.names)

    def put(moments: Mapping[str, Moments]) -> None:
        prepare(moments)
        for name, hessian in moments.items():
            model.put(name, compressed(name, hessian))

    prepare(dict.fromkeys(model.outside_layers))
    for name in model.outside_layers:
        weight = compressed(name, None)
        if name in model.embedding_names:
            model.put(name, weight)
    batches = tokens.split(batch_size)
    own = own_batches(len(batches))
    if first is None:
        first = 0
        with states.replace(0) as write:
            arguments = processes.each(lambda: _first_inputs(model, batches, own, batch_size, write))
    else:
        arguments = processes.each(lambda: _first_inputs(model, batches, [], batch_size, lambda *_: None))
    model.release(model.embedding_names)
    for number, prefix in enumerate(progress.track(list(model.layers), "Calibrating")):
        if number < first:
            continue
        own_arguments = {rows: of_layers[number] for rows, of_layers in arguments.items()}
        run = _LayerRun(model, number, prefix, list(states.read().split(batch_size)), own_arguments)
        names = model.names_in(prefix)
        model.load(names)
        _compress_layer(run, names, put)
        with states.replace(number + 1) as write:
            processes.each(partial(_write_outputs, run, own if number + 1 < count else [], batch_size, write))
        model.release(names)
    return set(model.names)


def _first_unfinished(states: HiddenStates, model: StreamedModel, is_kept: Callable[[str], bool]) -> int | None:
    """Return the number of the layer to begin with, whose inputs are stored; None if there are none.

    After a power cut they may be there, and results of earlier layers may not. Inputs are then discarded.
    """
    number = states.layer()
    if number is not None and not all(
        is_kept(n) for prefix in list(model.layers)[:number] for n in model.names_in(prefix)
    ):
        states.discard()
        return None
    return number


def _first_inputs(
    model: StreamedModel, batches: Sequence[Tensor], own: list[int], batch_size: int, write: Write
) -> dict[int, list[LayerArguments]]:
    """Write the first layer's inputs in some batches, and return the layers' other arguments for all."""
    needed = sorted({0, len(batches) - 1, *own})
    numbers = iter(needed)

    def keep(states: Tensor) -> None:
        number = next(numbers)
        if number in own:
            write(number * batch_size, states)

    return model.layer_inputs([batches[number] for number in needed], keep)


def _write_outputs(run: "_LayerRun", batches: list[int], batch_size: int, write: Write) -> None:
    for index in batches:
        write(index * batch_size, run.output(index))


def _compress_layer(run: "_LayerRun", names: list[str], put: Callable[[Mapping[str, Moments]], None]) -> None:
    parts = processes.each(run.parts)
    known = {name for part in parts for name in part.names}
    put({name: None for name in names if name not in known})
    for part in parts:
        if isinstance(part, _LinearGroup):
            put(dict.fromkeys(part.names, run.second_moment(part)))
            continue
        moments = _ExpertMoments(run, part)
        if part.fused is not None:
            put({part.fused: moments})
            continue
        for numbers in moments.parts():
            put({name: moments[number] for number in numbers for name in part.of_expert(number)})


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
        model: the model, in which the layer has its parameters.
        number: index of the layer.
        prefix: its name in the model.
        hidden: input hidden states of every batch, on the CPU.
        arguments: the layer's other arguments, by the number of sequences in a batch.
    """

    model: StreamedModel
    number: int
    prefix: str
    hidden: list[Tensor]
    arguments: dict[int, LayerArguments]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def linear_layers(self) -> dict[str, LinearLayer]:
        """Its linear layers, by the names of their weights."""
        return {n: self.model.linear[n] for n in self.model.names_in(self.prefix) if n in self.model.linear}

    @property
    def stacks(self) -> dict[str, ExpertStack]:
        """Its stacks of experts, by the parameters' names."""
        return {key: stack for key, stack in self.model.stacks.items() if key.startswith(f"{self.prefix}.")}

    def output(self, index: int) -> Tensor:
        """Return the layer's output for a batch, on the device."""
        hidden = self.hidden[index]
        positional, named = self.arguments[len(hidden)]
        # The layer gets a copy, because it may write to its input and the next run needs it unchanged.
        result = self.model.layers[self.prefix](hidden.to(self.device, copy=True), *positional, **dict(named))
        return self._finite(result[0] if isinstance(result, tuple | list) else result)

    def _finite(self, values: Tensor) -> Tensor:
        if not all_finite(values):
            raise ValueError(
                f"calibration: activations of layer {self.number} are not finite: check the model's weights"
            )
        return values

    def parts(self) -> list["_LinearGroup | ExpertStack"]:
        """Return the decoder layer's linear layers, grouped by input, and its experts in the order of their calls.

        One batch is enough, unless it leaves some linear layers unreached; then further batches are run.
        """
        unseen = self.linear_layers
        order: dict[str, int] = {}
        groups: list[_LinearGroup] = []
        for index in range(len(self.hidden)):
            # The tensors stay alive while their ids are compared, so that every id is unique.
            inputs = self._linear_inputs(unseen, index, order)
            alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
            for name, tensors in inputs.items():
                alike[tuple(map(id, tensors))].append(name)
            groups += [_LinearGroup(names, unseen[names[0]], len(ids) == 1) for ids, names in alike.items()]
            unseen = {name: module for name, module in unseen.items() if name not in inputs}
            if not unseen:
                break
        stacks = [stack for key, stack in self.stacks.items() if key in order]
        return sorted([*groups, *stacks], key=lambda part: order[_first(part)])

    def _linear_inputs(
        self, linears: dict[str, LinearLayer], index: int, order: dict[str, int]
    ) -> dict[str, list[Tensor]]:
        """Return the linear layers' inputs in a batch, and note what is called for the first time, experts included."""
        inputs: dict[str, list[Tensor]] = defaultdict(list)

        def see(name: str, values: Tensor) -> None:
            order.setdefault(name, len(order))
            inputs[name].append(values)

        def see_expert(key: str, *_: object) -> None:
            order.setdefault(key, len(order))

        with _watched(linears, see), self.model.watched_experts(self.stacks, see_expert):
            self.output(index)
        return inputs

    def expert_moments(self, stack: ExpertStack, numbers: range, alone: bool) -> Mapping[int, Tensor]:
        """Return the mean of x xᵀ over the inputs x of some of a stack's experts: float32, on the device.

        Args:
            alone: whether only this process asks.
        """

        def sums_of(batches: range) -> Sums:
            totals: dict[int, Tensor] = {}
            counts: dict[int, int] = defaultdict(int)

            def add(_: str, number: int, rows: Tensor, inputs_first: bool) -> None:
                if number in numbers:
                    if number not in totals:
                        totals[number] = torch.zeros(rows.shape[1], rows.shape[1], device=self.device)
                    counts[number] += len(rows)
                    _add_products(totals[number], rows)

            with self.model.watched_experts([stack.parameter], add):
                for index in batches:
                    self.output(index)
            return {number: (total, counts[number]) for number, total in totals.items()}

        sums = shared_sums(len(self.hidden), sums_of, self.device, alone)
        return {n: self._finite(sum_ / count) for n, (sum_, count) in sums.items() if count >= _FEW_TOKENS * len(sum_)}

    def second_moment(self, group: _LinearGroup) -> Tensor:
        """Return the mean of x xᵀ over a group's inputs x: float32, (in_features, in_features), on the device."""
        size = group.module.nx if isinstance(group.module, Conv1D) else group.module.in_features

        def sums_of(batches: range) -> Sums:
            total = torch.zeros(size, size, device=self.device)
            count = 0

            def add(_: str, values: Tensor) -> None:
                nonlocal count
                rows = values.reshape(-1, size)
                _add_products(total, rows)
                count += len(rows)
                if group.once:
                    raise _InputSeen

            with _watched({group.names[0]: group.module}, add):
                for index in batches:
                    with suppress(_InputSeen):
                        self.output(index)
            return {0: (total, count)}

        total, count = shared_sums(len(self.hidden), sums_of, self.device)[0]
        return self._finite(total.div_(max(count, 1)))


class _ExpertMoments(Sequence[Tensor | None]):
    """The second moments of the inputs of a stack's experts, computed for a few of them at a time, in order."""

    def __init__(self, run: _LayerRun, stack: ExpertStack):
        self._run, self._stack = run, stack
        # The one process that encodes a stack asks for its moments.
        self._alone = stack.fused is not None
        _, rows, columns = stack.shape
        turned = run.model.is_transposed(stack)
        self._at_once = max(1, _MOMENT_BYTES // (4 * (rows if turned else columns) ** 2))
        self._numbers, self._known = range(0), dict[int, Tensor | None]()

    def __len__(self) -> int:
        return self._stack.shape[0]

    def parts(self) -> Iterator[range]:
        """Return the numbers of experts whose moments are computed at once."""
        return (range(start, min(len(self), start + self._at_once)) for start in range(0, len(self), self._at_once))

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        if number not in self._numbers:
            self._known = {}  # before the next ones are made
            self._numbers = range(number, min(len(self), number + self._at_once))
            self._known = dict(self._run.expert_moments(self._stack, self._numbers, self._alone))
        return self._known.get(number)


def _first(part: _LinearGroup | ExpertStack) -> str:
    """Return the name by which a part's first call is noted."""
    return part.parameter if isinstance(part, ExpertStack) else part.names[0]


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add the sum of x xᵀ over rows x."""
    rows = rows.float()
    with full_float32():
        total.addmm_(rows.T, rows)


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
