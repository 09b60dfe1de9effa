"""Exact: the fine-tune bit for bit, at the size of its changes; ours (docs/methods.md, "exact")."""

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass
class ExactConfig:
    """The choice to store every changed tensor exactly. It has no settings, and the size is what comes out.

    It is no `MethodConfig`: it encodes tensors of any shape and dtype, not deltas of matrices, and reaches no ratio.
    """

    name: ClassVar[str] = "exact"
    quantises: ClassVar[bool] = False
    shares_budget: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        """Return the method's name, as config.json stores it."""
        return {"name": self.name}
