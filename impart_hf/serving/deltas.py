"""Checks of the deltas that an engine may load: everything that can be checked before the engine is touched."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

from ..modeling.checksums import tensor_checksum
from ..modeling.model_files import pinned
from ..modeling.tensors import Tensors
from .completeness import check_complete
from .engine_base import DeltaRefusedError, EngineBase, base_config, checksums_of_base
from .engine_files import EngineFiles
from .scratch import Scratch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class CheckedDelta:
    """A delta that the engine can load.

    Attributes:
        repo, revision: its folder or Hub id and its commit; both None for the base's own weights.
        dense: folder of its weights, if they are already decoded; None if the engine decodes them.
        notes: notes for the user: files for which the engine continues to use those that it was started with.
        tensors: how many tensors the engine has loaded: those that may differ from what it had, and those that vLLM
            joins with them; None if it has not loaded it yet.
    """

    repo: str | None
    revision: str | None
    dense: str | None = None
    notes: tuple[str, ...] = ()
    tensors: int | None = None


class DeltaChecker:
    """Checks deltas for one engine, and decodes them if there is scratch space; does not touch the engine.

    Attributes:
        files: files of the model that the engine was started on.
        scratch: the scratch space.
    """

    def __init__(self, vllm_config: "VllmConfig", decodes_ahead: bool = True):
        """Read the engine's own files.

        Args:
            decodes_ahead: whether to use the scratch space that the environment names.

        Raises:
            DeltaRefusedError: if the engine was started with settings that do not allow swaps.
            CheckpointError, DeltaFormatError, WrongBaseError: if its files are missing, damaged or changed.
            ValueError: if the environment names scratch space that cannot be used.
        """
        if vllm_config.lora_config is not None:
            raise DeltaRefusedError(
                "an engine with --enable-lora cannot swap deltas: adapters fit one set of weights; start it without"
            )
        if vllm_config.speculative_config is not None:
            raise DeltaRefusedError("an engine with a draft model cannot swap deltas: the draft would not be swapped")
        if vllm_config.model_config.get_num_experts() > 0:
            # On CPUs at least, vLLM's layerwise reload gives other weights than its loader
            raise DeltaRefusedError("the weights of experts cannot be swapped: vLLM cannot load them a second time")
        if vllm_config.parallel_config.data_parallel_size > 1:
            raise DeltaRefusedError(
                "with --data-parallel-size above 1 only the first engine reports whether it swapped"
            )
        self._vllm_config = vllm_config
        self.files, self.scratch = EngineFiles(vllm_config), Scratch(decodes_ahead)
        config, checksums = None, dict[str, int]()
        if self.files.is_delta:
            started_on = self.files.open_model()
            config, checksums = started_on.text_config, checksums_of_base(started_on)
        self._base = EngineBase(str(self.files.base), config or base_config(self.files.base), checksums)

    def check(self, repo: str | None, revision: str | None = None) -> CheckedDelta:
        """Check that the engine can load a delta: its files are complete, and its base and model are the engine's.

        Args:
            repo: folder or Hub id; None for the base's own weights.
            revision: branch, tag or commit on the Hub.

        Raises:
            CheckpointError: if a file is missing or cannot be fetched.
            DeltaFormatError: if the delta is damaged or does not fit the base.
            WrongBaseError: if its base is another model.
            DeltaRefusedError: if its model differs from the engine's in more than weights.
        """
        if repo is None:
            return self._check_base_itself()
        return self._check_delta(os.path.abspath(repo) if os.path.isdir(repo) else os.fspath(repo), revision)

    def _check_base_itself(self) -> CheckedDelta:
        base, config = self.files.open_base(), base_config(self.files.base)
        self._base.check_config(config, base.source)
        self._check_complete(base, config)
        checksums = {name: tensor_checksum(base.tensor(name)) for name in base.names()}
        self._base.compare(checksums, f"'{base.source}' has changed since the engine was started")
        return CheckedDelta(None, None)

    def _check_delta(self, repo: str, revision: str | None) -> CheckedDelta:
        options = pinned(repo, self.files.hub_options(revision))
        repository = self._base.open_delta(self.files, repo, options.revision)
        self._check_complete(repository, repository.text_config)
        for link in repository.chain:
            for entry in link.file.names():
                link.file.read_finite(entry)  # this also checks its CRC
        notes = tuple(self.files.notes(repo, options))
        return CheckedDelta(repo, options.revision, self.scratch.prepare(repository), notes)

    def _check_complete(self, weights: Tensors, config: PreTrainedConfig) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._vllm_config):  # vLLM replaces some of transformers' classes; these read it
            check_complete(weights, config)
