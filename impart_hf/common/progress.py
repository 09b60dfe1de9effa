"""Progress bars that can be switched off."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Makes progress bars on standard error; silent if `enabled` is False."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def track(self, items: Sequence[T], title: str) -> Iterator[T]:
        """Iterate over items with a bar; strings and things with a `name` are shown beside it."""
        with self.bar(len(items), title) as bar:
            for item in items:
                bar.set_postfix_str(str(getattr(item, "name", item)), refresh=False)
                yield item
                bar.update()

    def bar(self, total: int, title: str, unit: str = "it") -> tqdm:
        """A bar to be advanced by hand; "B" as its unit counts bytes."""
        return tqdm(
            total=total, desc=title, unit=unit, unit_scale=unit == "B", disable=not self.enabled, dynamic_ncols=True
        )
