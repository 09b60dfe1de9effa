"""Reconstruction of the dense checkpoint from a delta repository."""

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
    """Write the dense fine-tuned checkpoint, tensor by tensor, in the fine-tune's dtypes.

    Args:
        repository: from `open_repository`.
        output_dir: folder to create; must not exist, or be empty.
        device: where tensors are decoded.
        max_shard_size: a weight file larger than this is split.
        progress: shows a bar over the tensors.

    Raises:
        OutputError: if the folder is not empty, or the disk has too little space.
        DeltaFormatError, WrongBaseError: if the delta is damaged or the base is another; no output remains.
    """
    tensors = dense_tensors(repository, device, checked=True)
    with new_folder(output_dir) as folder:
        write_weights(folder, tensors, max_shard_size, progress or Progress(False), "Reconstructing")
        _write_texts(repository, folder)


def _write_texts(repository: DeltaRepository, target: Path) -> None:
    """Write the fine-tune's config.json and copy reader files and sidecar files."""
    text_config = repository.text_config
    text_config.save_pretrained(target)
    copy_pruned_reader(text_config.model_type, target)
    copy_sidecar_files(repository.source, repository.options, target)
