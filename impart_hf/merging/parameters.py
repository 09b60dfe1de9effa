"""The parameters of a merge and their values for each tensor, written as in mergekit.

A setting is a scalar; a list of numbers, spread evenly over the layers and interpolated; or a list of
`{filter: TEXT, value: SETTING}`, of which the first entry counts whose text is part of the tensor's name.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_LARGEST = 3.4e38  # float32, in which weights are computed, has no larger numbers


@dataclass(frozen=True)
class Parameter:
    """The values that a parameter can have.

    Attributes:
        kind: float, int or bool.
        default: value if it is not given.
        allowed, range: a test of which numbers are allowed, and the same in words.
        varies: whether the value may differ between tensors.
    """

    name: str
    kind: type
    default: Any
    allowed: Callable[[float], bool] = lambda number: abs(number) < _LARGEST
    range: str = "be finite in float32"
    varies: bool = True

    def value(self, raw: Any, where: str) -> Any:
        """Return a scalar of the configuration as a value of the parameter's kind.

        Raises:
            ValueError: if the parameter cannot have this value.
        """
        if self.kind is bool:
            if not isinstance(raw, bool) and raw not in (0, 1):  # mergekit accepts numbers
                raise ValueError(f"{where}: {self.name} must be true or false, got {raw!r:.80}")
            return bool(raw)
        try:
            # YAML reads 1e-3 as a string
            number = math.nan if isinstance(raw, bool) or not isinstance(raw, int | float | str) else float(raw)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isnan(number):
            raise ValueError(f"{where}: {self.name} must be a number, got {raw!r:.80}")
        if not self.allowed(number):
            raise ValueError(f"{where}: {self.name} must {self.range}, got {raw!r:.80}")
        return self.kind(number)

    def check(self, setting: Any, where: str) -> None:
        """Check that a setting can be evaluated for any tensor.

        Raises:
            ValueError: if it cannot; the message says why.
        """
        if not isinstance(setting, list | dict):
            self.value(setting, where)
            return
        conditions = [setting] if isinstance(setting, dict) else setting
        if not self.varies:
            raise ValueError(f"{where}: {self.name} must be one value for all tensors, got {setting!r}")
        if not conditions:
            raise ValueError(f"{where}: {self.name} is an empty list")
        if not any(isinstance(part, dict) for part in conditions):
            for part in conditions:
                self.value(part, where)
            return
        for part in conditions:
            if not isinstance(part, dict) or "value" not in part or not part.keys() <= {"filter", "value"}:
                raise ValueError(f"{where}: {self.name} must have entries `filter: …, value: …`, got {part!r}")
            if not isinstance(part.get("filter", ""), str | None):
                raise ValueError(f"{where}: a filter of {self.name} must be a part of tensor names, got {part!r}")
            if isinstance(part["value"], list) and any(isinstance(p, dict) for p in part["value"]):
                raise ValueError(f"{where}: a value of {self.name} must be a number or a list of numbers, got {part!r}")
            self.check(part["value"], where)

    def evaluate(self, scopes: Iterable[Mapping[str, Any]], tensor: str, depth: float) -> Any:
        """Return the parameter's value for one tensor: the first scope's that has one for it, or the default.

        Args:
            scopes: settings by name; the first scope takes precedence.
            tensor: name of the tensor.
            depth: position of its layer, from 0 for the first to 1 for the last.
        """
        for scope in scopes:
            if self.name in scope:
                value = self._evaluate(scope[self.name], tensor, depth)
                if value is not None:
                    return value
        return self.default

    def _evaluate(self, setting: Any, tensor: str, depth: float) -> Any:
        if isinstance(setting, dict):
            setting = [setting]
        if not isinstance(setting, list):
            return self.value(setting, tensor)
        if not isinstance(setting[0], dict):
            return self._interpolated([self.value(part, tensor) for part in setting], depth)
        for part in setting:
            text = part.get("filter")
            if text in (None, "*") or text in tensor:
                return self._evaluate(part["value"], tensor, depth)
        return None

    def _interpolated(self, values: list[Any], depth: float) -> Any:
        position = depth * (len(values) - 1)
        first = int(position)
        if self.kind is bool:
            return values[first]
        second = min(len(values) - 1, first + 1)
        return self.kind((1 - position + first) * values[first] + (position - first) * values[second])
