"""Reconstruction of the dense checkpoint from a delta repository."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..common.files import write_json
from ..common.progress import Progress
from ..modeling.delta_repository import DeltaRepository
from ..modeling.model_files import fetch_config
from ..storage.checkpoint_writer import DenseTensor, new_folder, write_weights
from .open import refuse_adapter_beside
from .reader_files import with_pruned_reader
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
        CheckpointError: if the repository holds an adapter too.
        OutputError: if the folder is not empty, or the disk has too little space.
        DeltaFormatError, WrongBaseError: if the delta is damaged or the base is another; no output remains.
    """
    refuse_adapter_beside(repository.source, repository.options)
    decoded: Iterator[tuple[str, torch.Tensor]] = iter(())

    def begin(names: list[str]) -> None:
        nonlocal decoded
        decoded = repository.tensors(device, names)

    tensors = [
        DenseTensor(name, repository.shape(name), repository.dtype(name), lambda: next(decoded)[1], checked=True)
        for name in repository.names()
    ]
    with new_folder(output_dir) as folder:
        write_weights(folder, tensors, max_shard_size, progress or Progress(False), "Reconstructing", begin=begin)
        _write_texts(repository, folder)


def _write_texts(repository: DeltaRepository, target: Path) -> None:
    """Write the fine-tune's config.json as it was, and copy reader files and sidecar files."""
    copy_sidecar_files(repository.source, repository.options, target)
    # Not as transformers would write it: programs of before transformers 5 read other fields, such as `rope_theta`.
    fields = dict(fetch_config(repository.source, repository.options)[0]["text_config"])
    fields = with_pruned_reader(fields, target)
    if isinstance(fields.get("auto_map"), dict):
        fields["auto_map"] = {name: code for name, code in fields["auto_map"].items() if _is_available(code, target)}
        if not fields["auto_map"]:
            del fields["auto_map"]
    write_json(target / "config.json", fields)


def _is_available(code: Any, folder: Path) -> bool:
    """Return whether a value of `auto_map`, MODULE.CLASS, names a file of the folder, or one in another repository."""
    references = [each for each in (code if isinstance(code, list) else [code]) if isinstance(each, str)]
    return all("--" in each or (folder / f"{each.split('.')[0]}.py").is_file() for each in references)
