"""A delta repository as the dense checkpoint that it stands for, and the check that it does."""

from functools import partial
from pathlib import Path

import torch

from .checkpoint_writer import DenseTensor, new_folder, write_weights
from .companions import copy_companions
from .modeling.checkpoints import CheckpointError, HubOptions, fetch_file, read_json
from .modeling.configuration_delta_compressed import DeltaCompressedConfig
from .modeling.delta_record import DeltaFormatError
from .modeling.delta_repository import DeltaRepository
from .progress import Progress
from .repository import copy_pruned_reader


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
    path = fetch_file(repo, "config.json", options)
    if path is None:
        raise CheckpointError(f"'{repo}' has no config.json: it is not a delta repository")
    content = read_json(path)
    if content.get("model_type") != "delta_compressed":
        raise CheckpointError(f"'{repo}' is a '{content.get('model_type')}' model, not a delta repository")
    try:
        return DeltaCompressedConfig.from_dict(content)
    except Exception as error:  # fields of other types, of an unknown model, … raise whatever they meet first
        raise DeltaFormatError(f"config.json of '{repo}' cannot be used: {str(error)[:400]}") from error


def verify(repository: DeltaRepository, progress: Progress | None = None) -> None:
    """Decode every tensor: all checksums of delta and base hold, every record fits, every value is finite.

    Raises:
        DeltaFormatError: naming the first damaged tensor.
        WrongBaseError: naming the first tensor in which the base differs.
    """
    for name in (progress or Progress(False)).track(repository.names(), "Verifying"):
        tensor = repository.tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DeltaFormatError(f"{name} decodes to NaN or infinity")


def reconstruct(
    repository: DeltaRepository,
    output_dir: str | Path,
    *,
    device: str | torch.device = "cpu",
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> None:
    """Write the dense fine-tuned checkpoint, tensor by tensor, in the dtypes it was published in.

    Args:
        repository: from `open_repository`.
        output_dir: folder to make; must not exist, or be empty.
        device: where tensors are decoded.
        max_shard_size: a weight file larger than this is split.

    Raises:
        OutputError: if the folder is not free or the disk is too small.
        DeltaFormatError, WrongBaseError: if delta or base are not as they should be; nothing is left behind.
    """
    tensors = [
        DenseTensor(name, repository.shape(name), repository.dtype(name), partial(repository.tensor, name, device))
        for name in repository.names()
    ]
    with new_folder(output_dir) as folder:
        write_weights(folder, tensors, max_shard_size, progress or Progress(False), "Reconstructing")
        _write_texts(repository, folder)


def _write_texts(repository: DeltaRepository, target: Path) -> None:
    """config.json of the fine-tuned model, and tokenizer, generation settings and chat template."""
    text_config = repository.config.text_config
    assert text_config is not None  # a repository without one has no model class and cannot be opened
    text_config.save_pretrained(target)
    copy_pruned_reader(text_config.model_type, target)
    copy_companions(repository.source, repository.options, target)
