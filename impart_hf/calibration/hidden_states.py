"""Hidden states of all tokens between two decoder layers, in one file, so that a killed run goes on from there."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..common import processes
from ..common.files import sync_path

_PREFIX = "layer-"

# Writes hidden states of neighbouring sequences: the first one's number, and (sequences, length, size).
Write = Callable[[int, Tensor], None]


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

    def discard(self) -> None:
        """Remove what is stored."""
        for path in self._files():
            path.unlink()

    def read(self) -> Tensor:
        """Return the stored inputs, mapped from the file: (sequences, length, size), not to be written to."""
        path = self._folder / f"{_PREFIX}{self.layer()}"
        return torch.from_file(str(path), size=math.prod(self._shape), dtype=self._dtype).view(self._shape)

    @contextlib.contextmanager
    def replace(self, layer: int) -> Iterator[Write]:
        """Give a function that writes inputs of a layer; they are there at the end.

        The processes of a job do this together, each for its sequences.
        """
        path = self._folder / f"{_PREFIX}{layer}"
        temporary, row = path.with_suffix(".writing"), math.prod(self._shape[1:]) * self._dtype.itemsize
        old = self._files()
        processes.in_first(temporary.touch)
        with temporary.open("r+b") as file:

            def write(start: int, states: Tensor) -> None:
                file.seek(start * row)
                file.write(states.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data)

            yield write
            processes.each(file.flush)

        def publish() -> None:
            sync_path(temporary)
            os.replace(temporary, path)
            for replaced in old:
                with contextlib.suppress(PermissionError):  # Windows, while it is mapped; a later layer removes it
                    replaced.unlink()

        processes.in_first(publish)

    def _files(self) -> list[Path]:
        found = self._folder.glob(f"{_PREFIX}*")
        return [path for path in found if path.name.removeprefix(_PREFIX).isdigit()]
