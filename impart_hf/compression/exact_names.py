"""Which tensors of a fine-tune are stored exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class ExactNames:
    """The names of the tensors to store exactly, if they changed.

    Attributes:
        patterns: names with wildcards as in file names: "*.norm.weight", "lm_head.*".
    """

    patterns: tuple[str, ...] = ()

    @property
    def are_all(self) -> bool:
        """Whether they are those of method exact: all, whatever size that has; a pattern for all has a budget."""
        return self is ALL

    def __contains__(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def check(self, names: Sequence[str]) -> None:
        """Check that every pattern is that of a tensor.

        Raises:
            ValueError: naming a pattern without one.
        """
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"exact: no tensor's name matches '{pattern}'; names are like {names[0]} and {names[-1]}, and * "
                    "stands for any part"
                )


NONE, ALL = ExactNames(), ExactNames(("*",))
