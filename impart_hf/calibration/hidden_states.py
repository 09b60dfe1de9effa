"""Hidden states of all tokens between two decoder layers, in one file, so that a killed run goes on from there."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..common.files import atomic_write

_PREFIX = "layer-"


class HiddenStates:
    """A folder with the inputs of one decoder layer: those of the next layer replace them, whole or not at all."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype):
        """Use a folder, which is made if it is missing.

        Args:
            folder: for one model and one text.
            shape: (sequences, length, size).
            dtype: dtype of the hidden states.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._shape, self._dtype = folder, shape, dtype

    @staticmethod
    def bytes_needed(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
        """Return the most bytes that a folder takes: there are two files while one is written."""
        return 2 * math.prod(shape) * dtype.itemsize

    def layer(self) -> int | None:
        """Return the number of the layer whose inputs are stored; None if there are none."""
        numbers = [int(path.name.removeprefix(_PREFIX)) for path in self._files()]
        return max(numbers, default=None)

    def read(self) -> Tensor:
        """Return the stored inputs, mapped from the file: (sequences, length, size), not to be written to."""
        path = self._folder / f"{_PREFIX}{self.layer()}"
        return torch.from_file(str(path), size=math.prod(self._shape), dtype=self._dtype).view(self._shape)

    @contextlib.contextmanager
    def replace(self, layer: int) -> Iterator[Callable[[Tensor], None]]:
        """Give a function that takes the inputs of a layer, batch after batch; they are there at the end."""
        old = self._files()
        with atomic_write(self._folder / f"{_PREFIX}{layer}") as temporary, temporary.open("wb") as file:

            def add(batch: Tensor) -> None:
                file.write(batch.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data)

            yield add
            file.flush()
        for path in old:
            with contextlib.suppress(PermissionError):  # Windows, while it is mapped; a later layer removes it
                path.unlink()

    def _files(self) -> list[Path]:
        found = self._folder.glob(f"{_PREFIX}*")
        return [path for path in found if path.name.removeprefix(_PREFIX).isdigit()]
