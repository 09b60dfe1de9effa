"""The worker's side of a swap: a method that the plugin gives to vLLM's workers."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..modeling.checkpoints import Checkpoint
from ..modeling.delta_record import DeltaFormatError
from ..modeling.model_files import HubOptions
from ..modeling.tensors import Tensors
from .engine_base import checksums_of_base
from .engine_files import EngineFiles, decoded_tensors
from .partial_reload import Places, load_into, places_or_none
from .tensor_values import Values, base_values, delta_values

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerBase

_BEGAN = time.time()  # vLLM calls the plugin, which imports this, before it reads any weights
_DUMMY_FORMAT = "dummy"  # random weights, without reading any file


def load_delta(worker: "WorkerBase", delta: str | None, revision: str | None, dense: str | None) -> dict[str, Any]:
    """Replace the worker's weights by those of a delta on the engine's base, on all workers or on none.

    No request may be running. This never raises: if one of several workers raised, the others' answers to this call
    would be taken for their answers to the next one.

    Args:
        worker: one of the engine's workers; all of them must be called.
        delta: folder or Hub id of a checked delta repository; None for the base's own weights.
        revision: its commit.
        dense: folder of its weights, if they are already decoded.

    Returns:
        {"error": None} if the new weights were loaded; "tensors" is how many tensors were, and "different" how many of
        them may have other values than before. Otherwise "error" is the error of the first worker that failed, "sound"
        says whether all workers have the old weights again, and "undoing" why not.
    """
    return served_weights(worker.vllm_config, worker.model_runner.get_model(), worker.device).load(
        delta, revision, dense
    )


_ATTRIBUTE = "_impart_hf_weights"


def served_weights(vllm_config: "VllmConfig", model: nn.Module, device: torch.device | None) -> "ServedWeights":
    """Return what is known of the weights of a worker's model; it is kept with the model."""
    if not hasattr(model, _ATTRIBUTE):
        setattr(model, _ATTRIBUTE, ServedWeights(vllm_config, model, device))
    return getattr(model, _ATTRIBUTE)


@dataclass(frozen=True)
class _Opened:
    """Weights that can be loaded.

    Attributes:
        read: returns tensors of these names, one at a time.
        values: what tells their values from others, as far as that is known.
        tensors: their names and shapes.
    """

    read: Callable[[Sequence[str]], Iterator[tuple[str, torch.Tensor]]]
    values: Values
    tensors: Tensors


class ServedWeights:
    """The weights that a worker's model has, and how others are put in their place."""

    def __init__(self, vllm_config: "VllmConfig", model: nn.Module, device: torch.device | None):
        self._vllm_config, self._model, self._device = vllm_config, model, device or torch.device("cpu")
        self._files: EngineFiles | None = None
        self._served: tuple[str | None, str | None] = (None, None)  # folder or Hub id, and commit; None: the base
        self._values: Values | None = None  # of what is served; None if they are not known
        self._checksums: Mapping[str, int] = {}  # of the base's tensors, as far as they are known
        self._places: Places | None = None
        self._places_known = False

    def load(self, delta: str | None, revision: str | None, dense: str | None) -> dict[str, Any]:
        """Put others in their place; see `load_delta`."""
        opened: list[_Opened] = []
        chosen: list[tuple[list[str], list[str], frozenset[nn.Module] | None]] = []

        def prepare() -> None:
            opened.append(self._open(delta, revision, dense))
            chosen.append(self._choose(opened[0]))

        error = first_error(message_of(prepare))
        if error is not None:
            return {"error": error, "sound": True}
        (different, names, modules), new = chosen[0], opened[0]
        before, self._values = self._values, None  # until all is well again
        error = first_error(message_of(lambda: self._load(new, names, modules)))
        if error is None:
            self._served, self._values = (delta, revision), new.values
            getLogger("vllm.impart_hf").info(
                "%s: %d of %d tensors differ from those served before, %d were loaded with their modules",
                delta or "the base", len(different), len(new.tensors.names()), len(names),
            )  # fmt: skip
            return {"error": None, "sound": True, "tensors": len(names), "different": len(different)}
        undone = first_error(message_of(lambda: self._undo(before, names, modules)))
        return {"error": error, "sound": undone is None, "undoing": undone}

    def _begin(self) -> EngineFiles:
        """Return the engine's files, and learn at the first call what its model was loaded from."""
        if self._files is None:
            files = EngineFiles(self._vllm_config)
            if files.is_delta:
                self._served = (files.model, files.options.revision)
            # What was written since may not be what the engine has read.
            links = files.open_model().chain if files.is_delta else []
            folders = {files.folder, files.base, *(link.base.folder for link in links)}
            is_as_read = not any(_written_since(folder, _BEGAN) for folder in folders)
            if is_as_read and self._vllm_config.load_config.load_format != _DUMMY_FORMAT:
                self._values = delta_values(links[0]) if links else {}
            self._files = files
        return self._files

    def _open(self, delta: str | None, revision: str | None, dense: str | None = None) -> _Opened:
        """Open weights; none is read yet."""
        files = self._begin()
        if delta is None:
            base = files.open_base()
            return _Opened(lambda names: _read(base, names), base_values(base, self._checksums), base)
        repository = files.open_delta(delta, revision)
        self._checksums = {**self._checksums, **checksums_of_base(repository)}
        if dense is not None:
            copy = Checkpoint(dense, HubOptions())
            return _Opened(lambda names: _read(copy, names), delta_values(repository), copy)
        return _Opened(
            lambda names: decoded_tensors(repository, self._device, names), delta_values(repository), repository
        )

    def _choose(self, new: _Opened) -> tuple[list[str], list[str], frozenset[nn.Module] | None]:
        """Return the tensors that may differ from those served, those to load, and the modules that these go to.

        The modules are None if all are loaded.
        """
        from vllm.config import set_current_vllm_config

        names, served = new.tensors.names(), self._values
        if served is None:
            return names, names, None
        if self._served[0] is None:  # deltas that were opened since may know more of the base
            served = base_values(self._begin().open_base(), self._checksums)
        different = [name for name in names if name not in new.values or served.get(name) != new.values[name]]
        if not different:
            return [], [], frozenset()
        if len(different) < len(names):
            if not self._places_known or (self._places and self._places.names != names):
                with set_current_vllm_config(self._vllm_config):
                    self._places = places_or_none(self._model, self._vllm_config.model_config, new.tensors)
                self._places_known = True
            if self._places and (closed := self._places.closed(set(different))):
                return different, *closed
        return different, names, None

    def _load(self, weights: _Opened, names: Sequence[str], modules: frozenset[nn.Module] | None) -> None:
        from vllm.config import set_current_vllm_config

        if names:
            with set_current_vllm_config(self._vllm_config):
                load_into(self._model, self._vllm_config.model_config, weights.read(names), modules)

    def _undo(self, before: Values | None, names: Sequence[str], modules: frozenset[nn.Module] | None) -> None:
        """Load what was served before, if it is still where it was.

        Args:
            before: its values, if they are known.
        """
        old = self._open(*self._served)
        if before is not None and self._served[0] is not None and old.values != before:
            raise DeltaFormatError(f"'{self._served[0]}' is no longer what was loaded from it")
        self._load(old, old.tensors.names() if modules is None else names, modules)
        self._values = old.values


def _read(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, checkpoint.tensor(name)) for name in names)


def _written_since(folder: Path, moment: float) -> bool:
    """Return whether a file of a folder was written since a moment, or less than a second before it."""
    # The time of the last change of the file's entry, which copying a file with its times does not set back.
    return any(path.stat().st_ctime > moment - 1 for path in folder.iterdir() if path.is_file())


def message_of(work: Callable[[], object]) -> str | None:
    """Call a function, and return its error as a message; None if there is none."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def first_error(error: str | None) -> str | None:
    """Return the first error among all workers of the engine."""
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return error
    errors: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(errors, error, group=group.cpu_group)
    return next((one for one in errors if one is not None), None)
