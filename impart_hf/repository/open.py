"""Opening delta repositories."""

from transformers.utils import logging

from ..modeling.checkpoints import config_fields
from ..modeling.configuration_delta_compressed import DeltaCompressedConfig
from ..modeling.delta_record import DeltaFormatError
from ..modeling.delta_repository import DeltaRepository
from ..modeling.model_files import ADAPTER_CONFIG, CheckpointError, HubOptions, fetch_config, fetch_file
from ..modeling.repository_kind import RepositoryKind, kind_of

logger = logging.get_logger(__name__)

_ADAPTER_BESIDE = f"holds an adapter ({ADAPTER_CONFIG}) beside the delta, which loading applies"


def open_repository(repo: str, options: HubOptions, base_model: str | None = None) -> DeltaRepository:
    """Open a delta repository and its base for reading.

    Args:
        repo: local folder or Hub id.
        options: revision, token and cache.
        base_model: folder or Hub id of the base, instead of the recorded one.

    Raises:
        CheckpointError, DeltaFormatError, WrongBaseError: as `DeltaRepository` does.
    """
    return DeltaRepository(repo, read_config(repo, options), options, base_model)


def read_config(repo: str, options: HubOptions) -> DeltaCompressedConfig:
    """Read the configuration of a delta repository.

    Raises:
        CheckpointError: if the folder or Hub repository is missing, or not a delta repository.
        DeltaFormatError: if its config.json has invalid fields.
    """
    content, _ = fetch_config(repo, options)
    if kind_of(content) is not RepositoryKind.DELTA:
        raise CheckpointError(
            f"'{repo}' is a '{content.get('model_type')}' model, not a delta repository: check the path"
        )
    try:
        return DeltaCompressedConfig.from_dict(config_fields(content))
    except Exception as error:  # transformers raises many exception types for invalid fields
        raise DeltaFormatError(
            f"config.json of '{repo}' cannot be used, download it again or upgrade transformers: {str(error)[:400]}"
        ) from error


def refuse_adapter_beside(repo: str, options: HubOptions) -> None:
    """Check that a delta repository holds no adapter, which what is made of its tensors would lack.

    Raises:
        CheckpointError: if it does.
    """
    if fetch_file(repo, ADAPTER_CONFIG, options) is not None:
        raise CheckpointError(
            f"'{repo}' {_ADAPTER_BESIDE}, and what is written here would lack it: move its files (adapter_*) to a "
            "folder of their own"
        )


def warn_of_adapter_beside(repo: str, options: HubOptions) -> None:
    """Warn if a delta repository holds an adapter, which is not looked at."""
    if fetch_file(repo, ADAPTER_CONFIG, options) is not None:
        logger.warning(f"'{repo}' {_ADAPTER_BESIDE}: this is about the delta without it.")
