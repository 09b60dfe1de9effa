"""How a setting of a method is declared: the field of a dataclass that the command line takes as an option."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import MethodConfig

EMBEDDINGS = ("lowrank", "method")
_KINDS = {int: "a whole number", float: "a number", tuple: "whole numbers separated by commas", bool: "true or false"}


def setting(default: Any, help: str, parse: Callable[[str], Any] | None = None, *, option: str | None = None) -> Any:
    """A field of a method's dataclass that is a setting, and an option of the command line.

    A subclass may change the default alone: a field of the same name without `setting` keeps help, parser and option.

    Args:
        default: the value of the field unless it is given. Not a mutable one.
        help: what the option means; the command line adds the methods that have it and their defaults.
        parse: makes the value from the option's text, and raises ValueError if the text stands for none. If None, the
            default's type decides: str, int, float, bool, or a tuple of whole numbers.
        option: the option's name without hyphens in front; the field's name, with hyphens for underscores, if None.

    Raises:
        TypeError: if nothing says how the text is parsed.
    """
    if parse is None and type(default) not in (str, *_KINDS):
        raise TypeError(f"a setting whose default is {default!r} needs `parse`")
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse, "option": option})


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of one method, as the command line knows it.

    Attributes:
        name: of the dataclass's field.
        method: the name of the method.
        option: without hyphens in front.
        help, default: as declared.
        parse: makes the value from the option's text; raises ValueError.
    """

    name: str
    method: str
    option: str
    help: str
    default: Any
    parse: Callable[[str], Any]


def settings_of(method: type[MethodConfig]) -> list[Setting]:
    """The settings of a method's dataclass that are declared by `setting`, in the order of its fields."""
    found = []
    for field in dataclasses.fields(method):
        if metadata := _declaration(method, field.name):
            option = metadata["option"] or field.name.replace("_", "-")
            parse = metadata["parse"] or _parser(field.name, type(field.default))
            found.append(Setting(field.name, method.name, option, metadata["help"], field.default, parse))
    return found


def _declaration(method: type[MethodConfig], name: str) -> Any:
    """The metadata of the nearest class that declares a field by `setting`; empty if none does."""
    for owner in method.__mro__:
        field = vars(owner).get("__dataclass_fields__", {}).get(name)
        if field is not None and "help" in field.metadata:
            return field.metadata
    return {}


def _parser(name: str, kind: type) -> Callable[[str], Any]:
    """Makes values of a type from text."""

    def parse(text: str) -> Any:
        try:
            if kind is tuple:
                return tuple(int(part) for part in text.split(",") if part.strip())
            return {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{name} must be {_KINDS[kind]}, got {text!r}") from error

    return parse
