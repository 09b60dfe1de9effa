"""The deltas that a server offers by name."""

import os
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from ..modeling.model_files import CheckpointError, HubOptions, repository_kind
from ..modeling.repository_kind import RepositoryKind

DELTAS_VARIABLE = "IMPART_HF_DELTAS"
BASE = "base"  # the name of the base's own weights


@dataclass(frozen=True)
class NamedDelta:
    """A named delta repository: folder or Hub id, and a revision on the Hub. Without `repo` it is the base itself."""

    name: str
    repo: str | None
    revision: str | None = None

    def __post_init__(self):
        if self.repo and os.path.isdir(self.repo):  # so that a folder has one spelling
            object.__setattr__(self, "repo", os.path.abspath(self.repo))


class Catalogue:
    """Deltas by name, from a setting such as `math=user/math-delta@v1,code=/deltas/code,/deltas/tenants`.

    An entry is NAME=REPO[@REVISION], or a folder whose delta repositories are offered under the names of their own
    folders. Such a folder is read again every time, so that deltas can be added and removed while the server runs.
    """

    def __init__(self, setting: str, started_on: NamedDelta | None = None):
        """Parse the setting.

        Args:
            setting: entries, separated by commas; may be empty.
            started_on: the delta that the engine was started on, which is offered too.

        Raises:
            ValueError: if an entry has neither form, or a name is given twice.
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
        if problems := self._look()[1]:
            raise ValueError(f"{DELTAS_VARIABLE}: {problems[0]}; choose another name for one of them")

    def offered(self) -> dict[str, NamedDelta]:
        """Return what is offered now, by name, the base first; if two deltas have one name, the first is offered."""
        offered, problems = self._look()
        for problem in problems:
            getLogger("vllm.impart_hf").warning("%s: the second is not offered", problem)
        return offered

    def _look(self) -> tuple[dict[str, NamedDelta], list[str]]:
        """Return deltas by name, and a message for each name that two deltas have."""
        offered, problems = {BASE: NamedDelta(BASE, None)}, []
        for delta in [*self._named, *self._in_folders()]:
            known = offered.setdefault(delta.name, delta)
            if known != delta:
                first = known.repo or "the base itself"
                problems.append(f"the name '{delta.name}' is given to {first} and to {delta.repo}")
        return offered, problems

    def _in_folders(self) -> list[NamedDelta]:
        found = []
        for folder in self._folders:
            for place in sorted(path.parent for path in folder.glob("*/config.json")):
                try:
                    kind = repository_kind(str(place), HubOptions())
                except CheckpointError:  # not complete yet, or not a model
                    continue
                if kind is RepositoryKind.DELTA and not place.name.startswith("."):
                    found.append(NamedDelta(place.name, str(place)))
        return found
