"""The base that an engine serves: whether a delta rests on it, and computes what the engine computes."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, PreTrainedConfig

from ..common.configs import differing_fields
from ..modeling.delta_repository import DeltaRepository, WrongBaseError
from ..modeling.model_files import CheckpointError
from .engine_files import EngineFiles

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class DeltaRefusedError(ValueError):
    """A delta that the engine cannot load, although it may be sound."""


class EngineBase:
    """What is known of an engine's base, against which deltas are compared.

    Args:
        source: where the base is, for messages.
        config: configuration of the model that the engine was started on.
        checksums: of the base's tensors, by their names there, as far as they are known.
    """

    def __init__(self, source: str, config: PreTrainedConfig, checksums: dict[str, int]):
        self._source, self._config, self._checksums = source, config, checksums

    def check_config(self, config: PreTrainedConfig, repo: str) -> None:
        """Check that a model computes the same with its weights as the engine's.

        Raises:
            DeltaRefusedError: if it does not.
        """
        if differing := differing_fields(self._config, config):
            some = list(differing.items())[:3]
            changes = ", ".join(f"{name} ({delta} instead of {engine})" for name, (engine, delta) in some)
            raise DeltaRefusedError(
                f"'{repo}' differs from the model that the engine was built for in {changes}: serve it with an engine "
                "of its own"
            )

    def open_delta(self, files: EngineFiles, repo: str, revision: str | None) -> DeltaRepository:
        """Open a delta that rests on the engine's base and differs from it in nothing but weights.

        Args:
            files: the engine's.
            repo, revision: the delta's folder or Hub id, and its commit.

        Raises:
            CheckpointError: if a file is missing or cannot be fetched.
            DeltaFormatError, WrongBaseError: if the delta is damaged, or its base is another.
            DeltaRefusedError: if it computes something else with its weights.
        """
        repository = files.open_delta(repo, revision)
        self.check_config(repository.text_config, repo)
        self._check_delta(repository)
        return repository

    def _check_delta(self, repository: DeltaRepository) -> None:
        """Check that a delta was made against the engine's base.

        Tensors of the base are read only if their checksums are not known yet.

        Raises:
            WrongBaseError: if it was not.
        """
        first = repository.chain[-1]
        for name in first.names():
            if first.base.stored_name(name) not in self._checksums:
                first.base_tensor(name)
        self.compare(
            checksums_of_base(repository),
            f"'{repository.source}' was made against '{first.config.base_model_name_or_path}', which is not the "
            f"engine's base '{self._source}'",
        )

    def compare(self, checksums: dict[str, int], problem: str) -> None:
        """Check that checksums, by name in the base, are those of the engine's base as far as these are known.

        Deltas may rest on different tensors of one base; those that are new are known from now on.

        Raises:
            WrongBaseError: if not; the message begins with `problem`.
        """
        known = self._checksums
        if differing := sorted(name for name in checksums.keys() & known.keys() if checksums[name] != known[name]):
            raise WrongBaseError(f"{problem}: their tensors {differing[0]} differ")
        self._checksums = known | checksums


def engine_on_base(vllm_config: "VllmConfig") -> tuple[EngineFiles, EngineBase]:
    """Return the files and the base of an engine that adds deltas to the base's outputs.

    Raises:
        DeltaRefusedError: if the engine was started on a delta.
        CheckpointError: if its files are missing or damaged.
    """
    files = EngineFiles(vllm_config)
    if files.is_delta:
        raise DeltaRefusedError(f"the engine was started on a delta, '{files.model}': start it on the base")
    return files, EngineBase(str(files.base), base_config(files.base), {})


def checksums_of_base(repository: DeltaRepository) -> dict[str, int]:
    """Return the checksums of the dense base's tensors that a delta rests on, by their names in the base."""
    first = repository.chain[-1]
    return {first.base.stored_name(name): checksum for name, checksum in first.base_checksums.items()}


def base_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration in a folder.

    Raises:
        CheckpointError: if transformers cannot use it without the model's own code.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # bad fields can raise any type
        raise CheckpointError(f"config.json of '{folder}' cannot be used: {str(error)[:400]}") from error
