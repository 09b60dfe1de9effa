"""Deltas of one matrix that stay packed beside the base, for batches whose rows belong to different deltas."""

from dataclasses import dataclass

import torch

from .delta_decode import decode_planes, matrix_delta
from .delta_record import Record
from .packed_tables import kernels_wanted
from .precision import full_float32


@dataclass(frozen=True)
class RowGroups:
    """Which rows of a batch belong to which delta; made once, used for every matrix of a model.

    Attributes:
        delta_of_row: integers (rows,): the number of the row's delta; any other number, as -1, for none.
        order: int64 (rows,): the rows, those of one delta together.
        bounds: int32 (deltas + 1,): where in `order` the rows of each delta begin and end.
    """

    delta_of_row: torch.Tensor
    order: torch.Tensor
    bounds: torch.Tensor

    @classmethod
    def of(cls, delta_of_row: torch.Tensor, deltas: int) -> "RowGroups":
        """Group rows; the host does not wait for the device.

        Args:
            delta_of_row: int32 or int64, of any shape: one number for each row, in the inputs' order.
            deltas: the number of deltas.
        """
        flat = delta_of_row.reshape(-1).long()
        ordered, order = flat.sort(stable=True)
        numbers = torch.arange(deltas + 1, device=flat.device)
        return cls(flat, order, torch.searchsorted(ordered, numbers, out_int32=True))


class PackedDeltas:
    """The packed deltas of one matrix (m, n) on a device.

    Triton kernels multiply by them as they are packed. Where these do not run, torch decodes the deltas that a batch
    needs each time.

    Args:
        records: one for each delta, of one shape.
        name: the tensor's name, for messages.
        device: where they are held and inputs are.
        kernels: whether to use kernels, if they can be; None for `packed_tables.kernels_wanted`.

    Attributes:
        kernels: whether kernels are used.

    Raises:
        DeltaFormatError: if a record has not as many codes as kept entries, or a stored value is not finite.
        ValueError: if there is no record, or they differ in shape.
    """

    def __init__(
        self, records: list[Record], name: str, device: torch.device | str = "cpu", kernels: bool | None = None
    ):
        if len({(record.rows, record.columns) for record in records}) != 1:
            raise ValueError(f"{name}: deltas of one matrix have one shape, and there is at least one of them")
        self.device = torch.empty(0, device=device).device  # with its index
        self.rows, self.columns, self.deltas = records[0].rows, records[0].columns, len(records)
        self._records, self._name, self._applied = records, name, None
        if (kernels_wanted(self.device) if kernels is None else kernels) and self.rows * self.columns:
            from .triton_apply import applied_deltas  # importing Triton takes a second, which a CPU need not spend

            self._applied = applied_deltas(records, name, self.device)
        self.kernels = self._applied is not None
        if self.kernels:
            self._records = []
        else:
            for record in records:
                decode_planes(record, name, self.device)  # it raises what is wrong with them

    def add_to(self, outputs: torch.Tensor, inputs: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Add to outputs, in place, what each row's delta adds to a linear layer's outputs, and return them.

        Args:
            outputs: (…, m), contiguous; float32, bfloat16 or float16. The sum is rounded once.
            inputs: (…, n), as many rows as outputs; any of these dtypes.
            groups: `RowGroups.of(delta_of_row, self.deltas)`.

        Raises:
            ValueError: if the shapes do not fit, or the outputs are not contiguous.
        """
        rows = len(groups.delta_of_row)
        if outputs.shape != (*inputs.shape[:-1], self.rows) or inputs.shape != (*outputs.shape[:-1], self.columns):
            raise ValueError(
                f"{self._name}: outputs {tuple(outputs.shape)} and inputs {tuple(inputs.shape)} do not fit a "
                f"{self.rows}x{self.columns} matrix"
            )
        if rows != inputs.shape[:-1].numel() or len(groups.bounds) != self.deltas + 1:
            raise ValueError(
                f"{self._name}: the groups are of {rows} rows and {len(groups.bounds) - 1} deltas, not of "
                f"{inputs.shape[:-1].numel()} and {self.deltas}"
            )
        if not outputs.is_contiguous():
            raise ValueError(f"{self._name}: outputs must be contiguous")
        flat_outputs, flat_inputs = outputs.view(-1, self.rows), inputs.reshape(-1, self.columns).contiguous()
        if not rows:
            return outputs
        if self._applied is not None:
            self._applied.add_to(flat_outputs, flat_inputs, groups.order, groups.bounds)
        else:
            self._add_decoded(flat_outputs, flat_inputs, groups.delta_of_row)
        return outputs

    @full_float32()
    def _add_decoded(self, outputs: torch.Tensor, inputs: torch.Tensor, delta_of_row: torch.Tensor) -> None:
        for number in delta_of_row.unique().tolist():
            if 0 <= number < self.deltas:
                rows = (delta_of_row == number).nonzero().view(-1)
                delta = matrix_delta(self._records[number], self._name, self.device)
                outputs[rows] = (outputs[rows] + delta.multiply(inputs[rows].float())).to(outputs.dtype)
