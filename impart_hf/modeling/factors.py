"""The decoded delta of one matrix: factored or direct.

Both classes have the same three operations, none of which forms the fine-tuned matrix: add the delta to rows of the
base (loading), multiply the inputs of a linear layer, and return rows of an embedding (distillation, and deltas that
stay beside the base at run time). Their tensors may require gradients.
"""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Factors:
    """U diag(sigma) V^T, of shape (m, n).

    Attributes:
        u: (rank, m): the columns of U.
        sigma: (rank,), the scale of each component.
        v: (rank, n): the columns of V.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor

    def _left(self) -> Tensor:
        """Return U diag(sigma), (m, rank)."""
        return (self.u * self.sigma[:, None]).t()

    def matrix(self) -> Tensor:
        """Return the dense delta, (m, n)."""
        return self._left() @ self.v

    def select(self, rows: slice) -> "Factors":
        """Return the delta of a range of the matrix's rows."""
        return Factors(self.u[:, rows], self.sigma, self.v)

    def add_to(self, base: Tensor) -> Tensor:
        """Add the delta to a float32 matrix (m, n) in place."""
        return base.addmm_(self._left(), self.v)

    def multiply(self, inputs: Tensor) -> Tensor:
        """Return what the delta adds to a linear layer's outputs: inputs (…, n) to (…, m), x -> ((x V) sigma) U^T."""
        return (functional.linear(inputs, self.v) * self.sigma) @ self.u

    def rows(self, tokens: Tensor) -> Tensor:
        """Return what the delta adds to an embedding's outputs, its rows of these tokens: int64 (…) to (…, n)."""
        return (functional.embedding(tokens, self.u.t()) * self.sigma) @ self.v


@dataclass(frozen=True)
class DirectDelta:
    """A delta of shape (m, n), stored entry by entry.

    Attributes:
        values: (m, n).
        scale: factor of all entries, a number or a tensor (1,); or of each row, (m,).
    """

    values: Tensor
    scale: Tensor | float

    def matrix(self) -> Tensor:
        """Return the dense delta, (m, n)."""
        return self.values * (self.scale if isinstance(self.scale, float) else self.scale[:, None])

    def select(self, rows: slice) -> "DirectDelta":
        """Return the delta of a range of the matrix's rows."""
        one = isinstance(self.scale, float) or len(self.scale) == 1
        return DirectDelta(self.values[rows], self.scale if one else self.scale[rows])  # type: ignore[index]

    def add_to(self, base: Tensor) -> Tensor:
        """Add the delta to a float32 matrix (m, n) in place."""
        if isinstance(self.scale, float):
            return base.add_(self.values, alpha=self.scale)
        return base.add_(self.matrix())

    def multiply(self, inputs: Tensor) -> Tensor:
        """Return what the delta adds to a linear layer's outputs: inputs (…, n) to (…, m)."""
        return functional.linear(inputs, self.values) * self.scale

    def rows(self, tokens: Tensor) -> Tensor:
        """Return what the delta adds to an embedding's outputs, its rows of these tokens: int64 (…) to (…, n)."""
        return functional.embedding(tokens, self.matrix())


MatrixDelta: TypeAlias = Factors | DirectDelta
