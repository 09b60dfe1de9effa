"""Progress bars that can be switched off."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Progress bars on standard error, shown if `enabled`."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def track(self, items: Sequence[T], title: str) -> Iterator[T]:
        """Iterate over items with a bar that also shows the current item, or its `name` if it has one."""
        with self.bar(len(items), title) as bar:
            for item in items:
                bar.set_postfix_str(str(getattr(item, "name", item)), refresh=False)
                yield item
                bar.update()

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def bar(self, total: int, title: str, unit: str = "it") -> tqdm:
        """Return a bar that the caller advances; the unit "B" counts bytes."""
        return tqdm(
            total=total, desc=title, unit=unit, unit_scale=unit == "B", disable=not self.enabled, dynamic_ncols=True
        )
