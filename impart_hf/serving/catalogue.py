"""The deltas that a server offers by name."""

import os
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from ..modeling.checkpoints import CheckpointError, HubOptions, repository_kind
from ..modeling.repository_kind import RepositoryKind

DELTAS_VARIABLE = "IMPART_HF_DELTAS"
BASE = "base"  # the name of the base's own weights


@dataclass(frozen=True)
class NamedDelta:
    """A delta repository and its name: folder or Hub id, and a revision on the Hub; without `repo` the base itself."""

    name: str
    repo: str | None
    revision: str | None = None

    def __post_init__(self):
        if self.repo and os.path.isdir(self.repo):  # one folder, one spelling
            object.__setattr__(self, "repo", os.path.abspath(self.repo))


class Catalogue:
    """Deltas by name, from a setting like `math=user/math-delta@v1,code=/deltas/code,/deltas/tenants`.

    An entry is NAME=REPO[@REVISION], or a folder in which every delta repository is offered by the name of its own
    folder; such a folder is looked at anew every time, so that deltas can come and go while the server runs.
    """

    def __init__(self, setting: str, started_on: NamedDelta | None = None):
        """Read the setting.

        Args:
            setting: entries, separated by commas; may be empty.
            started_on: the delta that the engine was started on, which is offered too.

        Raises:
            ValueError: if an entry is none of the two, or a name is given twice.
        """
        self._named = [started_on] if started_on else []
        self._folders: list[Path] = []
        for entry in filter(None, (part.strip() for part in setting.split(","))):
            name, equals, repo = (part.strip() for part in entry.partition("="))
            if not equals:
                if not Path(name).is_dir():
                    raise ValueError(f"{DELTAS_VARIABLE}: '{entry}' is neither NAME=REPO[@REVISION] nor a folder")
                self._folders.append(Path(name))
                continue
            # A folder may have an @ in its name.
            place, at, revision = (repo, "", "") if Path(repo).is_dir() else repo.partition("@")
            if not name or not place or (at and not revision):
                raise ValueError(f"{DELTAS_VARIABLE}: '{entry}' is not NAME=REPO[@REVISION]")
            self._named.append(NamedDelta(name, place, revision or None))
        if twice := self._look()[1]:
            raise ValueError(f"{DELTAS_VARIABLE}: {twice[0]}")

    def all(self) -> dict[str, NamedDelta]:
        """What is offered now, by name, the base first. Where a name has come to stand for two, it is the first's."""
        offered, twice = self._look()
        for problem in twice:
            getLogger("vllm.impart_hf").warning("%s: the second is not offered", problem)
        return offered

    def _look(self) -> tuple[dict[str, NamedDelta], list[str]]:
        """Deltas by name, and what is said of names that stand for two."""
        offered, twice = {BASE: NamedDelta(BASE, None)}, []
        for delta in [*self._named, *self._in_folders()]:
            known = offered.setdefault(delta.name, delta)
            if known != delta:
                first = known.repo or "the base itself"
                twice.append(f"the name '{delta.name}' stands for {first} and for {delta.repo}")
        return offered, twice

    def _in_folders(self) -> list[NamedDelta]:
        found = []
        for folder in self._folders:
            for place in sorted(path.parent for path in folder.glob("*/config.json")):
                try:
                    kind = repository_kind(str(place), HubOptions())
                except CheckpointError:  # not whole yet, or not a model
                    continue
                if kind is RepositoryKind.DELTA and not place.name.startswith("."):
                    found.append(NamedDelta(place.name, str(place)))
        return found
