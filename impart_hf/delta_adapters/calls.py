"""Which delta applies to which row of a call, and the forward methods that ask for it.

A call's choice is in a context variable: calls in several threads at once do not see each other's, and a delta that is
deleted meanwhile lives as long as the calls that use it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .effects import Addition, Effect, Replacement, linear_input


@dataclass(frozen=True)
class Choice:
    """What applies to a call of a model.

    Attributes:
        model: the model that was called.
        effects: of each delta that takes part, the effects by module.
        owners: for each row of the batch, an index into `effects`, or -1 for the base; None if the only delta applies
            to every row.
    """

    model: nn.Module
    effects: tuple[Mapping[str, Effect], ...]
    owners: tuple[int, ...] | None = None


@dataclass
class _Forward:
    """One forward pass: a choice, and the batch's shape.

    Attributes:
        batch: rows, a multiple of the choice's: a beam search repeats each of them.
        length: tokens of a row.
        divided: by number of rows, and device, the rows of each owner; kept because every module asks for them.
    """

    choice: Choice
    batch: int
    length: int
    divided: dict[tuple[int, torch.device], list[tuple[int, Tensor]]] = field(default_factory=dict)

    def rows(self, count: int, device: torch.device, module: str) -> list[tuple[int, Tensor]]:
        """Return the owners of `count` rows, with the rows of each: int64.

        Raises:
            ValueError: if they are not the batch's rows or tokens.
        """
        owners = self.choice.owners
        assert owners is not None
        if count not in (self.batch, self.batch * self.length) or count % len(owners):
            raise ValueError(
                f"{module} gets {count} rows of a batch of {self.batch} x {self.length} tokens: this model's layers do "
                "not keep rows apart, so that a batch cannot have several deltas; use set_adapter"
            )
        if (count, device) not in self.divided:
            whose = torch.tensor(owners, device=device).repeat_interleave(count // len(owners))
            self.divided[count, device] = [
                (owner, (whose == owner).nonzero().view(-1)) for owner in sorted(set(owners))
            ]
        return self.divided[count, device]


_choice: ContextVar[Choice | None] = ContextVar("choice", default=None)
_forward: ContextVar[_Forward | None] = ContextVar("forward", default=None)


@contextmanager
def chosen(choice: Choice | None) -> Iterator[None]:
    """Within this context and thread, calls of the choice's model are by it; with None, by the base alone."""
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def watch_model(model: nn.Module) -> None:
    """Let a model's forward method note the shape of its batch."""
    original: Any = model.forward

    @functools.wraps(original)
    def forward(*arguments: Any, **options: Any) -> Any:
        choice = _choice.get()
        if choice is None or choice.model is not model:
            return original(*arguments, **options)
        inputs = next(
            (
                value
                for value in (*arguments[:1], options.get("input_ids"), options.get("inputs_embeds"))
                if isinstance(value, Tensor)
            ),
            None,
        )
        if inputs is None or inputs.dim() < 2:
            raise ValueError("a model with deltas takes input_ids or inputs_embeds of shape (batch, length, …)")
        token = _forward.set(_Forward(choice, *inputs.shape[:2]))
        try:
            return original(*arguments, **options)
        finally:
            _forward.reset(token)

    model.forward = forward


def watch_module(model: nn.Module, name: str) -> None:
    """Let a module's forward method apply what the deltas of a call do to it."""
    module = model.get_submodule(name)
    original: Any = module.forward

    @functools.wraps(original)
    def forward(*arguments: Any, **options: Any) -> Any:
        current = _forward.get()
        if current is None or current.choice.model is not model:
            return original(*arguments, **options)
        effects = [delta.get(name) for delta in current.choice.effects]
        if not any(effects):
            return original(*arguments, **options)
        if current.choice.owners is None:
            return _of_all(effects[0], original, arguments, options)
        return _of_rows(current, name, effects, original, arguments, options)

    module.forward = forward


def watched(module: nn.Module) -> bool:
    """Return whether a module has been given to one of these functions."""
    return "forward" in vars(module) and hasattr(module.forward, "__wrapped__")


def unwatch(module: nn.Module) -> None:
    """Give a module its own forward method again."""
    watching: Any = module.forward
    original = watching.__wrapped__
    if getattr(original, "__func__", None) is type(module).forward:
        del module.forward
    else:
        module.forward = original


def _of_all(
    effect: Effect | None, original: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]
) -> Any:
    if effect is None:
        return original(*arguments, **options)
    if isinstance(effect, Replacement):
        return effect.run(original, arguments, options)
    return effect.added(original(*arguments, **options), linear_input(arguments, options))


def _of_rows(
    current: _Forward,
    name: str,
    effects: Sequence[Effect | None],
    original: Callable[..., Any],
    arguments: Sequence[Any],
    options: Mapping[str, Any],
) -> Any:
    first = next((value for value in (*arguments, *options.values()) if isinstance(value, Tensor)), None)
    if first is None:
        raise ValueError(f"{name} gets no tensor: a batch cannot have several deltas here; use set_adapter")
    count = len(first)
    if count == 1 < current.batch and first.dim() > 1:  # positions, which all rows share
        count = current.batch
        arguments = [_shared(value, count) for value in arguments]
        options = {key: _shared(value, count) for key, value in options.items()}
    divided = current.rows(count, first.device, name)
    if all(effect is None or isinstance(effect, Addition) for effect in effects):
        outputs, inputs = original(*arguments, **options), linear_input(arguments, options)
        for owner, rows in divided:
            effect = effects[owner] if owner >= 0 else None
            if isinstance(effect, Addition):
                outputs[rows] = effect.added(outputs[rows], inputs[rows])
        return outputs
    parts = []
    for owner, rows in divided:
        own_arguments = [_selected(value, rows, count, name) for value in arguments]
        own_options = {key: _selected(value, rows, count, name) for key, value in options.items()}
        effect = effects[owner] if owner >= 0 else None
        parts.append((rows, _of_all(effect, original, own_arguments, own_options)))
    return _joined(parts, count, name)


def _shared(value: Any, count: int) -> Any:
    return value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) and len(value) == 1 else value


def _selected(value: Any, rows: Tensor, count: int, module: str) -> Any:
    """Return the rows of an argument that has them, or the argument itself."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == count else value
    if isinstance(value, tuple | list):
        return type(value)(_selected(part, rows, count, module) for part in value)
    if value is None or isinstance(value, bool | int | float | str | torch.Size | torch.dtype):
        return value
    raise ValueError(
        f"{module} gets a {type(value).__name__}, which cannot be divided by rows, so that a batch cannot have several "
        "deltas; use set_adapter"
    )


def _joined(parts: Sequence[tuple[Tensor, Any]], count: int, module: str) -> Any:
    """Put outputs together by their rows. Logits of a smaller vocabulary are filled up with minus infinity."""
    some = parts[0][1]
    if some is None:
        return None
    if isinstance(some, tuple | list):
        return type(some)(
            _joined([(rows, values[i]) for rows, values in parts], count, module) for i in range(len(some))
        )
    if not isinstance(some, Tensor):
        raise ValueError(f"{module} returns a {type(some).__name__}: a batch cannot have several deltas here")
    width = max(value.shape[-1] for _, value in parts)
    joined = some.new_full((count, *some.shape[1:-1], width), float("-inf") if some.is_floating_point() else 0)
    for rows, value in parts:
        joined[rows, ..., : value.shape[-1]] = value
    return joined
