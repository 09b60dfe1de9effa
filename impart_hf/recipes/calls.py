"""The function that each stage calls, and its arguments from the recipe: checked against the function's signature.

The settings of a stage are the keyword arguments of its function, and for `compress` also the method's own settings.
There is no other list of them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator

from .. import hub
from ..calibration.text import AUTOMATIC, CalibrationSource, TextField
from ..common.validation import byte_budget, shard_bytes
from ..compression.compress import checked_method, compress, exact_names
from ..evaluation.compare import compare_models
from ..methods import ExactConfig, ImPartRdConfig, method_class, method_names, settings_of
from ..pruning.importance import compute_importance, importance_arguments
from ..pruning.layers import check_layers, prune_layers
from ..pruning.lora import require_training
from ..pruning.recovery import recover, recovery_arguments
from ..pruning.width import check_width, prune_width
from .recipe import Recipe, RecipeError, Stage, errors_of

# The function of each kind of stage, and which of its arguments are not for the recipe to set.
_OWN = frozenset({"model", "output_dir", "importance", "revision", "base_name", "device", "progress"})
_FUNCTIONS: Mapping[str, tuple[Callable, frozenset[str]]] = {
    "importance": (compute_importance, _OWN),
    "layers": (prune_layers, _OWN),
    "width": (prune_width, _OWN),
    "recover": (recover, _OWN),
    "compress": (
        compress,
        _OWN | {"base", "finetuned", "base_revision", "finetuned_revision", "token", "cache_dir"},
    ),
    "push": (hub.push, frozenset({"folder", "repo_id", "token"})),
}
_OWN_OF_EVAL = frozenset({"models", "device", "dtype", "revision", "base_model", "results", "progress"})
_PUSH_KEYS = ("repo", "base_repo")  # checked with the order of the stages


@dataclasses.dataclass(frozen=True)
class Call:
    """What a stage calls.

    Attributes:
        function: the function.
        arguments: its arguments, except those that are known when it is called: models, reports and folders.
        texts: those of the arguments that are texts, by their names.
    """

    function: Callable
    arguments: Mapping[str, Any]
    texts: Mapping[str, CalibrationSource]

    def taken_by(self, other: Callable) -> dict[str, Any]:
        """Return the arguments that another function takes too, with the defaults of this one."""
        parameters = inspect.signature(self.function).parameters
        names = [name for name in inspect.signature(other).parameters if name in parameters]
        return {name: self.arguments.get(name, parameters[name].default) for name in names}


def call_of(stage: Stage, recipe: Recipe, device: str | None) -> Call:
    """Return what a stage calls.

    Args:
        device: where to compute; None for the function's default.

    Raises:
        RecipeError: naming stage and setting, if a setting is unknown, or its value has the wrong type or is invalid.
    """
    function, own = _FUNCTIONS[stage.kind]
    settings = dict(stage.settings)
    with errors_of(stage.name):
        others: Sequence[str] = ()
        if stage.kind == "push":
            settings, others = {name: value for name, value in settings.items() if name not in _PUSH_KEYS}, _PUSH_KEYS
        if stage.kind == "compress":
            settings, others = _with_method(settings)
        signature = inspect.signature(function)
        if "data" in signature.parameters and recipe.data is not None:
            settings = {"data": recipe.data, **settings}
        arguments = _arguments(function, settings, own, others)
        if "data" in signature.parameters and arguments.get("data") is None:
            raise RecipeError("data is missing: give the text to train on here, or for all stages at the top")
        if device is not None and "device" in signature.parameters:
            arguments["device"] = device
        missing = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty and name not in own and name not in arguments
        ]
        if missing:
            raise RecipeError(f"{missing[0]} is missing")
        call = Call(function, arguments, _texts(function, arguments))
        _check(stage.kind, call)
    return call


def eval_call(recipe: Recipe, device: str | None) -> Call:
    """Return how the recipe's models are measured; errors as for `call_of`."""
    with errors_of("eval"):
        arguments = _arguments(compare_models, dict(recipe.eval), _OWN_OF_EVAL)
        if device is not None:
            arguments["device"] = device
    return Call(compare_models, arguments, _texts(compare_models, arguments))


def _with_method(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of `compress` with the method's own in its configuration, and the names of these."""
    name = settings.pop("method", ImPartRdConfig.name)
    known = [*method_names(), ExactConfig.name]
    if name not in known:
        raise RecipeError(f"method: there is no method {name!r:.80}; choose one of {', '.join(known)}")
    if name == ExactConfig.name:
        return settings | {"method": ExactConfig()}, []
    fields = {setting.option.replace("-", "_"): setting.name for setting in settings_of(method_class(name))}
    hints = get_type_hints(method_class(name))
    given = {}
    for option in [option for option in settings if option in fields]:
        value = settings.pop(option)
        given[fields[option]] = _value(
            option, tuple(value) if isinstance(value, list) else value, hints[fields[option]]
        )
    return settings | {"method": method_class(name)(**given)}, list(fields)


def _arguments(
    function: Callable, settings: Mapping[str, Any], own: frozenset[str], others: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a function's arguments, after checking their names and types.

    Args:
        own: arguments that are not for the recipe to set.
        others: settings of the stage that are no arguments.
    """
    known = [name for name in inspect.signature(function).parameters if name not in own]
    hints = get_type_hints(function)
    arguments = {}
    for name, value in settings.items():
        if name in own and name in inspect.signature(function).parameters:
            raise RecipeError(f"{name} is not for the recipe to set here: leave it out")
        if name not in known:
            raise RecipeError(f"unknown setting {name!r}; choose one of {', '.join([*known, *others])}")
        arguments[name] = value if name == "method" else _value(name, value, hints[name])
    return arguments


def _value(name: str, value: Any, hint: Any) -> Any:
    """Return a setting's value, with mappings made the objects that they describe.

    Raises:
        RecipeError: if it has the wrong type.
    """
    kinds = [kind for kind in _members(hint) if dataclasses.is_dataclass(kind) and isinstance(kind, type)]
    if isinstance(value, Mapping) and kinds:
        with errors_of(name):
            return kinds[0](**value)
    if not any(_fits(value, kind) for kind in _members(hint)):
        raise RecipeError(f"{name} must be {_described(hint)}, got {value!r:.80}")
    return value


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types that a type hint allows."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value of a YAML file has a type."""
    if get_origin(kind) is Mapping:
        return isinstance(value, dict)
    if get_origin(kind) is Sequence and isinstance(value, str):  # to Python a text is a sequence, of its letters
        return False
    try:
        type_validator("value", value, float | int if kind is float else kind)
    except TypeError:
        return False
    return True


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _described(hint: Any) -> str:
    """Return the types that a type hint allows in words, as far as a YAML file has values of them."""
    words = [
        "a mapping" if get_origin(kind) is Mapping else "a list" if get_origin(kind) else _WORDS.get(kind)
        for kind in _members(hint)
    ]
    return " or ".join(dict.fromkeys(word for word in words if word)) or "of another type"


def _check(kind: str, call: Call) -> None:
    """Check the values of a stage's settings, as its function will."""
    if kind in ("importance", "recover"):
        require_training()
        check = importance_arguments if kind == "importance" else recovery_arguments
        with check(**call.taken_by(check)):
            pass
    elif kind == "layers":
        check_layers(**call.taken_by(check_layers))
    elif kind == "width":
        check_width(**call.taken_by(check_width))
    elif kind == "compress":
        method = checked_method(**call.taken_by(checked_method))
        exact_names(method, call.arguments.get("exact", ()))
        shard_bytes(call.arguments.get("max_shard_size", 1))
        byte_budget(call.arguments.get("max_bytes"))


def _texts(function: Callable, arguments: Mapping[str, Any]) -> dict[str, CalibrationSource]:
    """Return the arguments that are texts to be read, by name."""
    hints = get_type_hints(function)
    texts = {
        name: value
        for name, value in arguments.items()
        if TextField in get_args(hints[name]) and value not in (None, AUTOMATIC)
    }
    if (target := arguments.get("target")) is not None:
        texts["target"] = target.validation
    return texts
