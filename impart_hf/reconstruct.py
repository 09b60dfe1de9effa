"""A delta repository as the dense checkpoint that it stands for, and the check that it does."""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch

from .modeling.checkpoints import DTYPE_NAMES, CheckpointError, HubOptions, fetch_file, read_json
from .modeling.checksums import tensor_bytes
from .modeling.configuration_delta_compressed import DeltaCompressedConfig
from .modeling.delta_record import DeltaFormatError
from .modeling.delta_repository import DeltaRepository
from .progress import Progress
from .repository import COMPANION_FILES
from .safetensors_writer import Entry, shard_entries, write_json, write_safetensors
from .workspace import OutputError, sync_folder


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
    """
    path = fetch_file(repo, "config.json", options)
    if path is None:
        raise CheckpointError(f"'{repo}' has no config.json: it is not a delta repository")
    content = read_json(path)
    if content.get("model_type") != "delta_compressed":
        raise CheckpointError(f"'{repo}' is a '{content.get('model_type')}' model, not a delta repository")
    return DeltaCompressedConfig.from_dict(content)


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
    output = Path(os.path.abspath(output_dir))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists and is not an empty folder; choose another")
    output.parent.mkdir(parents=True, exist_ok=True)
    names = repository.names()
    sizes = {n: torch.Size(repository.shape(n)).numel() * repository.dtype(n).itemsize for n in names}
    if (free := shutil.disk_usage(output.parent).free) < sum(sizes.values()):
        raise OutputError(f"{output.parent} has {free} bytes free, {sum(sizes.values())} are needed")
    with (
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", ignore_cleanup_errors=True) as folder,
        (progress or Progress(False)).bar(sum(sizes.values()), "Reconstructing", "B") as bar,
    ):
        target = Path(folder, "checkpoint")
        target.mkdir()

        def dense(name: str) -> bytes:
            bar.set_postfix_str(name)
            bar.update(sizes[name])
            return tensor_bytes(repository.tensor(name, device)).tobytes()

        entries = [
            Entry(n, DTYPE_NAMES[repository.dtype(n)], repository.shape(n), sizes[n], partial(dense, n))
            for n in sorted(names, key=lambda n: -repository.dtype(n).itemsize)
        ]
        files, index = shard_entries(entries, "model.safetensors", max_shard_size)
        for filename, members in files.items():
            write_safetensors(target / filename, members, {"format": "pt"})
        if index is not None:
            write_json(target / "model.safetensors.index.json", index)
        _write_texts(repository, target)
        sync_folder(target)
        if output.exists():
            output.rmdir()
        os.rename(target, output)
        sync_folder(output.parent)


def _write_texts(repository: DeltaRepository, target: Path) -> None:
    """config.json of the fine-tuned model, and tokenizer, generation settings and chat template."""
    text_config = repository.config.text_config
    assert text_config is not None  # a repository without one has no model class and cannot be opened
    text_config.save_pretrained(target)
    for name in COMPANION_FILES:
        path = fetch_file(repository.source, name, repository.options)
        if path is not None:
            shutil.copyfile(path, target / name)
