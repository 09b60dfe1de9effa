"""Declaration of a method's settings: dataclass fields that are also options of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import MethodConfig

EMBEDDINGS = ("lowrank", "method")
# How each setting is read. Not in the fields' metadata, which transformers' HfArgumentParser passes on to argparse.
_PARSERS: dict[dataclasses.Field, tuple[Callable[[str], Any] | None, str | None]] = {}
_KINDS = {int: "a whole number", float: "a number", tuple: "whole numbers separated by commas", bool: "true or false"}


def setting(default: Any, help: str, parse: Callable[[str], Any] | None = None, *, option: str | None = None) -> Any:
    """Declare a field of a method's dataclass as a setting, which is also an option of the command line.

    A subclass may change only the default: a field of the same name without `setting` keeps help, parser and option.

    Args:
        default: the default value, not mutable.
        help: the option's meaning; the command line adds the methods that have it and their defaults.
        parse: converts the option's text to the value, and raises ValueError if it is invalid. If None, the default's
            type is used: str, int, float, bool, or a tuple of whole numbers.
        option: the option's name without leading hyphens; if None, the field's name with hyphens for underscores.

    Raises:
        TypeError: if `parse` is None and the default has another type.
    """
    if parse is None and type(default) not in (str, *_KINDS):
        raise TypeError(f"a setting whose default is {default!r} needs `parse`")
    field: Any = dataclasses.field(default=default, metadata={"help": help})
    _PARSERS[field] = parse, option
    return field


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of one method, as the command line uses it.

    Attributes:
        name: name of the dataclass's field.
        method: name of the method.
        option: name of the option, without leading hyphens.
        help, default: as declared.
        parse: converts the option's text to the value; raises ValueError.
    """

    name: str
    method: str
    option: str
    help: str
    default: Any
    parse: Callable[[str], Any]


def settings_of(method: type[MethodConfig]) -> list[Setting]:
    """Return the settings of a method's dataclass that are declared with `setting`, in the order of its fields."""
    settings = []
    for field in dataclasses.fields(method):
        if (declared := _declaration(method, field.name)) is not None:
            parse, option = _PARSERS[declared]
            option, parse = option or field.name.replace("_", "-"), parse or _parser(field.name, type(field.default))
            settings.append(Setting(field.name, method.name, option, declared.metadata["help"], field.default, parse))
    return settings


def _declaration(method: type[MethodConfig], name: str) -> dataclasses.Field | None:
    """Return the field of the nearest class that declares it with `setting`; None if none does."""
    for owner in method.__mro__:
        field = vars(owner).get("__dataclass_fields__", {}).get(name)
        if field in _PARSERS:
            return field
    return None


def _parser(name: str, kind: type) -> Callable[[str], Any]:
    """Return a function that converts text to a value of a type."""

    def parse(text: str) -> Any:
        try:
            if kind is tuple:
                return tuple(int(part) for part in text.split(",") if part.strip())
            return {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{name} must be {_KINDS[kind]}, got {text!r}") from error

    return parse
