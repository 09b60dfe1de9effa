"""The deltas that a server offers by name."""

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from logging import getLogger
from pathlib import Path

from ..common.names import is_hub_id
from ..modeling.model_files import CheckpointError, HubOptions, repository_kind
from ..modeling.repository_kind import RepositoryKind

DELTAS_VARIABLE, ALLOW_VARIABLE = "IMPART_HF_DELTAS", "IMPART_HF_ALLOW"
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

    A second setting permits repositories that have no name: patterns of Hub ids and of absolute folders, such as
    `user/*,/srv/deltas/*`.
    """

    @classmethod
    def of_environment(cls, started_on: NamedDelta | None = None) -> "Catalogue":
        """Return the catalogue that the environment's variables describe; arguments and errors as for the class."""
        return cls(os.environ.get(DELTAS_VARIABLE, ""), started_on, os.environ.get(ALLOW_VARIABLE, ""))

    def __init__(self, setting: str, started_on: NamedDelta | None = None, allowed: str = ""):
        """Parse the settings.

        Args:
            setting: entries, separated by commas; may be empty.
            started_on: the delta that the engine was started on, which is offered too.
            allowed: patterns, separated by commas; may be empty.

        Raises:
            ValueError: if an entry has neither form, is a folder that does not exist, or a name is given twice.
        """
        patterns = [pattern for part in allowed.split(",") if (pattern := part.strip())]
        # Of folders all but the last level is without links, as the names that are compared with them.
        self._allowed = [
            os.path.join(os.path.realpath(os.path.dirname(pattern)), os.path.basename(pattern))
            if os.path.isabs(pattern)
            else pattern
            for pattern in patterns
        ]
        self._named = [NamedDelta(BASE, None), *([started_on] if started_on else [])]
        self._folders: list[Path] = []
        for entry in filter(None, (part.strip() for part in setting.split(","))):
            name, equals, repo = (part.strip() for part in entry.partition("="))
            if not equals:
                if not Path(name).is_dir():
                    raise ValueError(f"{DELTAS_VARIABLE}: '{entry}' is neither NAME=REPO[@REVISION] nor a folder")
                self._folders.append(Path(os.path.abspath(name)))  # a relative one might be taken for a Hub id
                continue
            # A folder may have an @ in its name.
            place, at, revision = (repo, "", "") if Path(repo).is_dir() else repo.partition("@")
            if not name or not place or (at and not revision):
                raise ValueError(f"{DELTAS_VARIABLE}: '{entry}' is not NAME=REPO[@REVISION]")
            if not Path(place).is_dir() and not _is_hub_id(place):
                raise ValueError(f"{DELTAS_VARIABLE}: '{place}' of '{entry}' is neither a folder here nor a Hub id")
            self._named.append(NamedDelta(name, place, revision or None))
        if problems := self._look()[1]:
            raise ValueError(f"{DELTAS_VARIABLE}: {problems[0]}; choose another name for one of them")

    def offered(self) -> dict[str, NamedDelta]:
        """Return what is offered now, by name, the base first; if two deltas have one name, the first is offered."""
        offered, problems = self._look()
        for problem in problems:
            getLogger("vllm.impart_hf").warning("%s: the second is not offered", problem)
        return offered

    def check_names(self, taken: set[str]) -> None:
        """Check that no delta on offer has a name that is taken.

        Raises:
            ValueError: if one has.
        """
        if clashing := sorted(self.offered().keys() & taken):
            raise ValueError(
                f"{DELTAS_VARIABLE}: '{clashing[0]}' is the name of another model of this server: give the delta "
                "another one"
            )

    def find(self, name: str) -> NamedDelta | None:
        """Return the delta that a name, a folder or a Hub id stands for; None if there is none that is permitted.

        The folders of tenants are not read as a whole.

        Args:
            name: a folder's is absolute and without links, so that each has one spelling.
        """
        try:
            return self._find(name)
        except (ValueError, OSError):  # no name that a file could have
            return None

    def _find(self, name: str) -> NamedDelta | None:
        known = next((delta for delta in self._named if name in (delta.name, delta.repo)), None)
        if known is not None:
            return known
        if not os.path.isabs(name):
            if "/" not in name:
                return next(filter(None, (_in_folder(folder / name) for folder in self._folders)), None)
            return NamedDelta(name, name) if _is_hub_id(name) and self._allows(name) else None
        if name != os.path.realpath(name):
            return None
        for folder in self._folders:
            if os.path.realpath(folder) == os.path.dirname(name):
                return _in_folder(folder / os.path.basename(name))
        return NamedDelta(name, name) if os.path.isdir(name) and self._allows(name) else None

    def _allows(self, place: str) -> bool:
        """Return whether a pattern permits a folder or Hub id; a * stands for a part of one level."""
        levels = place.split("/")
        patterns = [pattern.split("/") for pattern in self._allowed]
        return any(len(pattern) == len(levels) and all(map(fnmatchcase, levels, pattern)) for pattern in patterns)

    def label(self, name: str) -> str:
        """Return the label of metrics for a delta's name: one for all that clients may make up."""
        listed = any(delta.name == name for delta in self._named)
        in_folder = "/" not in name and any((folder / name).is_dir() for folder in self._folders)
        return name if listed or in_folder else "others"

    def _look(self) -> tuple[dict[str, NamedDelta], list[str]]:
        """Return deltas by name, and a message for each name that two deltas have."""
        offered: dict[str, NamedDelta] = {}
        problems = []
        for delta in [*self._named, *self._in_folders()]:
            known = offered.setdefault(delta.name, delta)
            if known != delta:
                first = known.repo or "the base itself"
                problems.append(f"the name '{delta.name}' is given to {first} and to {delta.repo}")
        return offered, problems

    def _in_folders(self) -> list[NamedDelta]:
        places = (place.parent for folder in self._folders for place in sorted(folder.glob("*/config.json")))
        return [delta for place in places if (delta := _in_folder(place)) is not None]


def _in_folder(place: Path) -> NamedDelta | None:
    """Return the delta in a folder; None if there is none, or it is not complete yet."""
    if place.name.startswith(".") or not place.is_dir():
        return None
    try:
        is_delta = repository_kind(str(place), HubOptions()) is RepositoryKind.DELTA
    except CheckpointError:
        return None
    return NamedDelta(place.name, str(place)) if is_delta else None


def _is_hub_id(name: str) -> bool:
    """Return whether a name can only be an id on the Hub; a folder of the same relative path would be read instead."""
    return is_hub_id(name) and not os.path.exists(name)
