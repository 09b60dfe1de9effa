"""A delta repository as the dense checkpoint that it stands for."""

from pathlib import Path

import torch

from ..common.progress import Progress
from ..modeling.delta_repository import DeltaRepository
from ..storage.checkpoint_writer import dense_tensors, new_folder, write_weights
from .reader_files import copy_pruned_reader
from .sidecar_files import copy_sidecar_files


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
    tensors = dense_tensors(repository, device)
    with new_folder(output_dir) as folder:
        write_weights(folder, tensors, max_shard_size, progress or Progress(False), "Reconstructing")
        _write_texts(repository, folder)


def _write_texts(repository: DeltaRepository, target: Path) -> None:
    """config.json of the fine-tuned model, and tokenizer, generation settings and chat template."""
    text_config = repository.text_config
    text_config.save_pretrained(target)
    copy_pruned_reader(text_config.model_type, target)
    copy_sidecar_files(repository.source, repository.options, target)
