"""Which delta applies to which row of a call, and the forward methods that ask for it.

A call's choice is in a context variable: calls in several threads at once do not see each other's, and a delta that is
deleted meanwhile lives as long as the calls that use it.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .effects import Addition, Effect, Replacement, linear_input

_ONE_A_BATCH = "so that a batch cannot have several deltas; use set_adapter"
_MANY_IN_A_LAYER = re.compile(r"\.\d+\..*\.\d+\.")
_NO_TEXT = re.compile("pixel|image|video|audio|input_features|input_values")


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
class _Pass:
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
        known = count in (self.batch, self.batch * self.length) and not count % len(owners)
        if not known or calls_some_tokens(module):
            raise ValueError(
                f"{module} gets {count} rows of a batch of {self.batch} x {self.length} tokens: this model's layers do "
                f"not keep rows apart, {_ONE_A_BATCH}"
            )
        if (count, device) not in self.divided:
            whose = torch.tensor(owners, device=device).repeat_interleave(count // len(owners))
            self.divided[count, device] = [
                (owner, (whose == owner).nonzero().view(-1)) for owner in sorted(set(owners))
            ]
        return self.divided[count, device]

    @contextmanager
    def of_one(self, owner: int) -> Iterator[Mapping[str, Effect]]:
        """Within this context, modules that are called get the rows of one owner; its effects are returned."""
        effects: Mapping[str, Effect] = self.choice.effects[owner] if owner >= 0 else {}
        token = _pass.set(_Pass(Choice(self.choice.model, (effects,)), self.batch, self.length))
        try:
            yield effects
        finally:
            _pass.reset(token)


_choice: ContextVar[Choice | None] = ContextVar("choice", default=None)
_pass: ContextVar[_Pass | None] = ContextVar("pass", default=None)


@contextmanager
def chosen(choice: Choice | None) -> Iterator[None]:
    """Within this context and thread, calls of the choice's model are by it; with None, by the base alone."""
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def batch_inputs(arguments: Sequence[Any], options: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens or embeddings that a model's call or its `generate` gets, (batch, length, …); None if none."""
    given = (*arguments[:1], *(options.get(name) for name in ("input_ids", "inputs", "inputs_embeds")))
    return next((value for value in given if isinstance(value, Tensor)), None)


def calls_some_tokens(module: str) -> bool:
    """Return whether a module, by its name, is one of several in a layer, of which each gets some tokens: an expert."""
    return _MANY_IN_A_LAYER.search(f"{module}.") is not None


class _Watcher:
    """In the place of a forward method; a copy of the module gets one of its own."""

    def __init__(self, root: nn.Module, module: nn.Module):
        watcher: Any = self
        functools.update_wrapper(watcher, module.forward, updated=())  # transformers reads the signature
        self.root, self.original = root, module.forward


class _ModelWatcher(_Watcher):
    """Notes the shape of a model's batch."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        choice = _choice.get()
        if choice is None or choice.model is not self.root:
            return self.original(*arguments, **options)
        inputs = batch_inputs(arguments, options)
        if inputs is None or inputs.dim() < 2:
            raise ValueError("a model with deltas takes input_ids or inputs_embeds of shape (batch, length, …)")
        if choice.owners is not None:
            for name, value in options.items():
                if value is not None and _NO_TEXT.search(name):  # a row may have several images, or none
                    raise ValueError(f"{name} cannot be divided by rows, {_ONE_A_BATCH}")
        token = _pass.set(_Pass(choice, *inputs.shape[:2]))
        try:
            return self.original(*arguments, **options)
        finally:
            _pass.reset(token)


class _ModuleWatcher(_Watcher):
    """Applies what the deltas of a call do to a module."""

    def __init__(self, root: nn.Module, module: nn.Module, name: str):
        super().__init__(root, module)
        self.name = name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        current = _pass.get()
        if current is None or current.choice.model is not self.root:
            return self.original(*arguments, **options)
        effects = [delta.get(self.name) for delta in current.choice.effects]
        if not any(effects):
            return self.original(*arguments, **options)
        if current.choice.owners is None:
            return _of_all(effects[0], self.original, arguments, options)
        return _of_rows(current, self.name, effects, self.original, arguments, options)


def watch(root: nn.Module, names: Sequence[str]) -> None:
    """Let a model, and modules in it, apply the deltas of a call.

    Args:
        names: of modules below the model; those that are watched already are left alone.
    """
    if not watched(root):
        root.forward = _ModelWatcher(root, root)
    for name in names:
        module = root.get_submodule(name)
        if not watched(module):
            module.forward = _ModuleWatcher(root, module, name)


def watched(module: nn.Module) -> bool:
    """Return whether a module applies deltas."""
    return isinstance(vars(module).get("forward"), _Watcher)


def unwatch(root: nn.Module) -> None:
    """Give a model and the modules in it their own forward methods again."""
    for module in root.modules():
        if not watched(module):
            continue
        watcher: Any = module.forward
        original = watcher.original
        del module.forward
        if getattr(original, "__func__", None) is not type(module).forward:  # another library's, as accelerate's
            module.forward = original


def _of_all(
    effect: Effect | None, original: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]
) -> Any:
    if effect is None:
        return original(*arguments, **options)
    if isinstance(effect, Replacement):
        return effect.run(arguments, options)
    return effect.added(original(*arguments, **options), linear_input(arguments, options))


def _of_rows(
    current: _Pass,
    name: str,
    effects: Sequence[Effect | None],
    original: Callable[..., Any],
    arguments: Sequence[Any],
    options: Mapping[str, Any],
) -> Any:
    first = next((value for value in (*arguments, *options.values()) if isinstance(value, Tensor)), None)
    if first is None:
        raise ValueError(f"{name} gets no tensor, {_ONE_A_BATCH}")
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
        with current.of_one(owner) as own:
            parts.append((rows, _of_all(own.get(name), original, own_arguments, own_options)))
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
    raise ValueError(f"{module} gets a {type(value).__name__}, which cannot be divided by rows, {_ONE_A_BATCH}")


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
        raise ValueError(f"{module} returns a {type(some).__name__}, {_ONE_A_BATCH}")
    width = max(value.shape[-1] for _, value in parts)
    joined = some.new_full((count, *some.shape[1:-1], width), float("-inf") if some.is_floating_point() else 0)
    for rows, value in parts:
        joined[rows, ..., : value.shape[-1]] = value
    return joined
