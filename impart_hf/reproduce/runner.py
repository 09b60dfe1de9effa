"""Running what is missing: each model is made once, scored on its tasks, and removed; each score is kept at once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import OutputError, atomic_write, write_json
from ..evaluation.journal import Journal
from ..storage.folder_lock import FolderLock
from .planning import Conditions, Entry
from .tables import Task

if TYPE_CHECKING:
    from ..evaluation.task_scores import TaskScore
    from .scoring import Scorer

_FACTS = "facts.json"  # beside a model that is complete


def results_in(folder: Path) -> Journal:
    """Return the scores in an output folder, one JSON line each, by the keys of entries.

    Raises:
        OutputError: if the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--output: '{folder}' is not a folder")
    return Journal(folder / "results.jsonl")


class Runner:
    """Runs entries that have no result.

    Attributes:
        results: those there are.
        failed: why an entry failed, by its key.
        unreachable: why an entry cannot be run with this model, by its key.
    """

    def __init__(
        self, conditions: Conditions, results: Journal, *, keep: bool = False, say: Callable[[str], None] = print
    ):
        """Prepare; nothing is run yet.

        Args:
            keep: keep the models that are made.
            say: prints a line on what is being done.
        """
        self.results = results
        self.failed: dict[str, str] = {}
        self.unreachable: dict[str, str] = {}
        self._conditions, self._keep, self._say = conditions, keep, say

    def run(self, entries: Sequence[Entry]) -> None:
        """Run all entries that have no result and lack nothing.

        A killed run is continued by the same call: scores are kept one by one, a compression resumes, and a model that
        was complete is not made again.

        Raises:
            OutputError: if another process works in the output folder.
        """
        waiting: dict[str, list[Entry]] = {}
        for entry in entries:
            known = entry.key in self.results or entry.key in self.failed or entry.key in self.unreachable
            if not entry.needs and not known:
                same = waiting.setdefault(entry.making_key, [])
                if all(other.key != entry.key for other in same):
                    same.append(entry)
        if not waiting:
            return
        output = self._conditions.output
        output.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(output)
        if not lock.take():
            raise OutputError(f"another process runs tables in '{output}': wait for it, or give another --output")
        try:
            for number, same in enumerate(waiting.values(), start=1):
                self._say(f"{number} of {len(waiting)}: {same[0].row.line.label} on {same[0].row.model.name}")
                self._run_model(same)
        finally:
            lock.release()

    def _run_model(self, entries: list[Entry]) -> None:
        """Make a model, and score it for each of these entries, which all have it."""
        from ..compression.plan import UnreachableRatioError

        scorable = [entry for entry in entries if self._can_be_scored(entry)]
        if not scorable:
            return
        making = entries[0].making
        folder = self._conditions.output / "models" / entries[0].making_key
        with self._failures_of(scorable):
            try:
                facts = {} if making.stored else self._made(entries[0], folder)
            except UnreachableRatioError as error:
                self.unreachable |= {entry.key: str(error) for entry in scorable}
            else:
                with self._scorer.of(making, folder) as score:
                    for entry in scorable:
                        with self._failures_of([entry]):
                            self._keep_score(entry, score, facts)
        # What failed is tried again by the next run, which goes on with the model.
        if not self._keep and not any(entry.key in self.failed for entry in entries):
            shutil.rmtree(folder, ignore_errors=True)

    def _can_be_scored(self, entry: Entry) -> bool:
        """Load an entry's task, whose errors are to come before a model is made for hours."""
        with self._failures_of([entry]):
            self._scorer.load(entry.task)
        return entry.key not in self.failed

    @contextmanager
    def _failures_of(self, entries: Sequence[Entry]) -> Iterator[None]:
        """Within this context, an error is why these entries failed, if they have no result."""
        try:
            yield
        except Exception as error:  # models and tasks run code of third parties; other rows can still be run
            reason = " ".join(str(error).split()) or type(error).__name__
            known = self.results, self.failed
            self.failed |= {entry.key: reason for entry in entries if not any(entry.key in one for one in known)}
            self._say(f"  failed: {reason}")

    @cached_property
    def _scorer(self) -> Scorer:
        from .scoring import Scorer

        return Scorer(self._conditions)

    def _made(self, entry: Entry, folder: Path) -> dict[str, Any]:
        """Make an entry's model, unless it is complete, and return the facts about it."""
        from ..modeling.model_files import read_json

        if (folder / _FACTS).is_file():
            return read_json(folder / _FACTS)
        if folder.is_dir():  # what a killed run left; the workspace of a compression is hidden, and resumes
            for path in folder.iterdir():
                if path.is_file():
                    path.unlink()
                elif not path.name.startswith("."):
                    shutil.rmtree(path)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        facts = entry.making.build(folder, self._conditions.device)
        facts["seconds"] = round(time.perf_counter() - started, 2)
        with atomic_write(folder / _FACTS) as temporary:
            write_json(temporary, facts)
        return facts

    def _keep_score(self, entry: Entry, score_on: Callable[[Task], TaskScore], facts: Mapping[str, Any]) -> None:
        """Score the entry's model, and keep the result."""
        from ..common.machine import machine

        started = time.perf_counter()
        score = score_on(entry.task)
        self.results.add(
            entry.key,
            {
                "row": entry.row.id,
                "value": score.value,
                "stderr": score.stderr,
                "samples": score.samples,
                "num_fewshot": score.num_fewshot,
                "task_version": score.version,
                "seconds": round(time.perf_counter() - started, 2),
                "model": dict(facts),
                "identity": entry.identity(),
                "machine": machine(self._conditions.device),
                "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        )
