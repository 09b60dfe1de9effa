"""Adapters of deltas for one engine, made when they are asked for and kept in a folder."""

import os
import shutil
import tempfile
import threading
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.files import OutputError
from ..lora.export import ADAPTER_FILE, export_lora
from ..lora.places import Part
from ..modeling.model_files import pinned
from ..modeling.repository_files import delta_digest, repository_folder
from ..repository.open import refuse_chain
from ..storage.checkpoint_writer import new_folder
from ..storage.locked_folder import LockedFolder
from .catalogue import NamedDelta
from .engine_base import DeltaRefusedError, engine_on_base
from .engine_files import PACKED_VARIABLE

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

ADAPTERS_VARIABLE = "IMPART_HF_ADAPTERS"


class AdapterCache:
    """Makes adapters of at most the engine's rank, each once.

    They are in the folder that `IMPART_HF_ADAPTERS` names, where a later server finds them; without it in a temporary
    one. They stay as long as the server runs, because vLLM may read one again after others have taken its place.

    If the engine takes deltas packed (`IMPART_HF_PACKED`), an adapter is a copy of the delta itself.
    """

    def __init__(self, vllm_config: "VllmConfig"):
        """Read the engine's own files, and make the folder.

        Raises:
            DeltaRefusedError: if the engine cannot have adapters of deltas.
            CheckpointError, DeltaFormatError, WrongBaseError: if its files are missing or damaged.
            ValueError: if the environment does not name a folder that can be written to.
        """
        lora = vllm_config.lora_config
        assert lora is not None
        self._packed = os.environ.get(PACKED_VARIABLE) == "1"
        if not self._packed and find_spec("peft") is None:
            raise DeltaRefusedError("adapters are made by PEFT: pip install 'impart-hf[lora]'")
        if lora.target_modules is not None and not self._packed:
            raise DeltaRefusedError("--lora-target-modules would leave out a part of every delta: start it without")
        self._files, self._base = engine_on_base(vllm_config)
        self._rank: int = lora.max_lora_rank
        self._parts = _parts_of(vllm_config.model_config)
        self._making = threading.Lock()  # an adapter takes memory for a matrix and all cores
        self._temporary: LockedFolder | None = None
        if place := os.environ.get(ADAPTERS_VARIABLE):
            self._folder = Path(place)
            if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(f"{ADAPTERS_VARIABLE}: '{place}' is not a folder that can be written to")
        else:
            self._temporary = LockedFolder(Path(tempfile.gettempdir()), "impart-hf-adapters-")
            self._folder = self._temporary.path

    def adapter_of(self, delta: NamedDelta) -> Path:
        """Return the folder of a delta's adapter, made now if there is none.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError: if the delta is missing, damaged or
                not one of the engine's base.
            ValueError: if it changes nothing that an adapter can hold.
            OutputError: if the disk is full.
        """
        assert delta.repo is not None
        options = pinned(delta.repo, self._files.hub_options(delta.revision))
        repository = self._base.open_delta(self._files, delta.repo, options.revision)
        refuse_chain(repository)
        # The digest is of the delta and of its base, so that an adapter of other files is never taken.
        digest = delta_digest(repository.file, repository.config)[:32]
        if self._packed:
            folder, whole = self._folder / f"{digest}-packed", "config.json"
        else:
            folder, whole = self._folder / f"{digest}-rank{self._rank}-{'-'.join(self._parts)}", ADAPTER_FILE
        with self._making:
            if (folder / whole).is_file():
                return folder
            try:
                if self._packed:
                    _keep(repository_folder(delta.repo, options), folder)
                else:
                    export_lora(repository, folder, self._rank, parts=self._parts)
            except OutputError:
                if not (folder / whole).is_file():  # another server has made it meanwhile
                    raise
        return folder


def _keep(source: Path, target: Path) -> None:
    """Copy a folder's files as they are now, for when vLLM reads them again."""
    with new_folder(target) as folder:
        for file in filter(Path.is_file, source.iterdir()):
            shutil.copyfile(file, folder / file.name)


def _parts_of(model_config: "ModelConfig") -> Collection[Part]:
    """Return what adapters of a model may hold in vLLM; experts are left out, which not every platform can serve."""
    from vllm.model_executor.model_loader.utils import get_model_cls

    known = getattr(get_model_cls(model_config), "embedding_modules", {})
    parts: list[Part] = ["linear"]
    return [*parts, "embeddings"] if {"embed_tokens", "lm_head"} <= set(known) else parts
