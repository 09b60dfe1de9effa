"""Opening delta repositories."""

from ..modeling.checkpoints import CheckpointError, HubOptions, fetch_config
from ..modeling.configuration_delta_compressed import DeltaCompressedConfig
from ..modeling.delta_record import DeltaFormatError
from ..modeling.delta_repository import DeltaRepository
from ..modeling.repository_kind import RepositoryKind, kind_of


def open_repository(repo: str, options: HubOptions, base_model: str | None = None) -> DeltaRepository:
    """A delta repository and its base, opened for reading.

    Args:
        repo: local folder or Hub id.
        options: revision, token and cache.
        base_model: folder or Hub id to take the base from, instead of the recorded one.

    Raises:
        CheckpointError, DeltaFormatError, WrongBaseError: as `DeltaRepository` does.
    """
    return DeltaRepository(repo, read_config(repo, options), options, base_model)


def read_config(repo: str, options: HubOptions) -> DeltaCompressedConfig:
    """The configuration of a delta repository.

    Raises:
        CheckpointError: if the folder or Hub repository is missing, or is no delta repository.
        DeltaFormatError: if its fields are not as they should be.
    """
    content, _ = fetch_config(repo, options)
    if kind_of(content) is not RepositoryKind.DELTA:
        raise CheckpointError(f"'{repo}' is a '{content.get('model_type')}' model, not a delta repository")
    try:
        return DeltaCompressedConfig.from_dict(content)
    except Exception as error:  # fields of other types, of an unknown model, … raise whatever they meet first
        raise DeltaFormatError(f"config.json of '{repo}' cannot be used: {str(error)[:400]}") from error
