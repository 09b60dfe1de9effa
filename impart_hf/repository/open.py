"""Opening delta repositories."""

from transformers.utils import logging

from ..modeling.delta_repository import DeltaRepository, read_config
from ..modeling.model_files import ADAPTER_CONFIG, CheckpointError, HubOptions, fetch_file

logger = logging.get_logger(__name__)

_ADAPTER_BESIDE = f"holds an adapter ({ADAPTER_CONFIG}) beside the delta, which loading applies"


def open_repository(repo: str, options: HubOptions, base_model: str | None = None) -> DeltaRepository:
    """Open a delta repository and its base for reading.

    Args:
        repo: local folder or Hub id.
        options: revision, token and cache.
        base_model: folder or Hub id of the base, instead of the recorded one; see `DeltaRepository`.

    Raises:
        CheckpointError, DeltaFormatError, WrongBaseError: as `DeltaRepository` does.
    """
    return DeltaRepository(repo, read_config(repo, options), options, base_model)


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


def refuse_chain(repository: DeltaRepository) -> None:
    """Check that a delta's base is dense, for what adds a delta to a base in memory.

    Raises:
        CheckpointError: if it is a delta repository.
    """
    if len(repository.chain) > 1:
        raise CheckpointError(
            f"the base of '{repository.source}' is a delta itself, '{repository.base.source}': write it against the "
            "first base with `impart-hf flatten`, and give the result instead"
        )


def warn_of_adapter_beside(repo: str, options: HubOptions) -> None:
    """Warn if a delta repository holds an adapter, which is not looked at."""
    if fetch_file(repo, ADAPTER_CONFIG, options) is not None:
        logger.warning(f"'{repo}' {_ADAPTER_BESIDE}: this is about the delta without it.")
