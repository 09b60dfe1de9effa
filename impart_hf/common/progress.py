"""Progress of a run on standard error: which of its stages it is in, and how long this one and all take from here."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm import tqdm

from . import processes

T = TypeVar("T")

# Times left are told after this many seconds and this share of a stage: the first matrices are no measure of the rest.
_SECONDS, _SHARE = 2.0, 0.03
_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {times}{postfix}"


@dataclass
class _Run:
    """The stages of a run in order, how many of them have begun, and the seconds that those to come are to take."""

    stages: list[str] = field(default_factory=list)
    begun: int = 0
    expected: dict[str, float] = field(default_factory=dict)


class Progress:
    """Progress of a run, shown if `enabled`, in the first process of a job.

    On a terminal every stage has a bar. Elsewhere, as in a log, it has a line when it begins and one when it ends.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled and processes.is_first()
        self._run = _Run()
        self._detail, self._parts_left = "", 0

    @property
    def tells_time(self) -> bool:
        """Whether times left are shown, for which stages' times are to be expected."""
        return self.enabled and sys.stderr.isatty()

    def plan(self, stages: Sequence[str]) -> None:
        """Name the stages that the run has after those that have begun; bars with these titles are numbered."""
        self._run.stages[self._run.begun :] = stages

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Say how long stages will take; the time left of the run is told where it is known of all that follow."""
        self._run.expected |= seconds

    def part(self, detail: str, left: int) -> "Progress":
        """Return the progress of one of a stage's equal parts, each of which has a bar.

        Args:
            detail: the part, for the user.
            left: number of parts after it.
        """
        other = copy(self)
        other._detail, other._parts_left = f" {detail}", left
        return other

    def track(self, items: Sequence[T], title: str, work: Callable[[T], float] = lambda item: 1) -> Iterator[T]:
        """Iterate over items with a bar that also shows the current item, or its `name` if it has one.

        Args:
            work: gives the share of the stage's work that an item is, in any unit.
        """
        with self.bar(sum(map(work, items)), title) as bar:
            for item in items:
                bar.show(str(getattr(item, "name", item)))
                yield item
                bar.update(work(item))

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def bar(self, total: float, title: str, done: float = 0) -> "Bar":
        """Return a bar that the caller advances.

        Args:
            total: the stage's work, in any unit.
            title: the stage.
            done: work that an earlier run has done.
        """
        run, shown = self._run, title + self._detail
        if title not in run.stages:
            return Bar(self.enabled, total, shown, done, self._parts_left)
        number = run.begun = run.stages.index(title) + 1
        # A run of one stage needs no number.
        name = shown if len(run.stages) == 1 else f"{number}/{len(run.stages)} {shown}"
        after = [run.expected.get(stage) for stage in run.stages[number:]]
        known = [seconds for seconds in after if seconds is not None]
        rest = sum(known) if len(known) == len(after) else None
        return Bar(self.enabled, total, name, done, self._parts_left, rest)


class Bar:
    """The progress of one stage, or of one of its parts. As a context it is finished at the end, unless that fails."""

    def __init__(
        self, enabled: bool, total: float, name: str, done: float = 0, parts: int = 0, rest: float | None = None
    ):
        """Begin a stage.

        Args:
            enabled: whether anything is shown.
            total, done: as for `Progress.bar`.
            name: what is written before the bar.
            parts: number of equal parts of the stage after this one.
            rest: seconds that all stages after this one are to take; None if it is not known.
        """
        self._name, self._total, self._done, self._at = name, total, done, done
        self._parts, self._rest, self._started = parts, rest, time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._writes_lines = enabled and not on_terminal
        self._shown: tqdm | None = None
        if enabled and on_terminal:
            # A stage without work is shown as one with a single piece of it.
            self._shown = _Shown(
                self, total=total or 1, initial=done, desc=name, bar_format=_FORMAT, dynamic_ncols=True
            )
        if self._writes_lines:
            print(name, file=sys.stderr, flush=True)

    def update(self, work: float = 1) -> None:
        """Advance by this much work."""
        work = min(work, self._total - self._at)  # of fractions, the sum may be rounded up
        self._at += work
        if self._shown is not None:
            self._shown.update(work)

    def show(self, text: str) -> None:
        """Show what is worked on."""
        if self._shown is not None:
            self._shown.set_postfix_str(text)

    def times(self) -> str:
        """Return the time taken, and, once it can be told, the time left of the stage and of the run."""
        taken = time.monotonic() - self._started
        worked, text = self._at - self._done, tqdm.format_interval(taken)
        if self._at >= self._total or taken < _SECONDS or worked < _SHARE * self._total:
            return text
        left = taken / worked * (self._total - self._at + self._parts * self._total)
        text += f", {tqdm.format_interval(left)} left"
        return text if self._rest is None else f"{text}, {tqdm.format_interval(left + self._rest)} left in all"

    def finish(self) -> None:
        """End the stage, which is done, whether or not all of its work was needed."""
        if self._writes_lines:
            print(f"{self._name}: done in {time.monotonic() - self._started:.1f} s", file=sys.stderr, flush=True)
            self._writes_lines = False
        if self._shown is not None:
            self._at = self._total
            self._shown.set_postfix_str("", refresh=False)
            self._shown.n = self._shown.total
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.finish()
        else:
            self.close()


class _Shown(tqdm):
    """tqdm's bar with the times of ours."""

    def __init__(self, bar: Bar, **arguments: Any):
        self._bar = bar
        super().__init__(**arguments)

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "times": self._bar.times()}
