"""The public function `flatten`: the end of a chain of deltas as one delta against the first base."""

from pathlib import Path

import torch

from ..common import processes
from ..common.files import OutputError
from ..common.names import is_on_hub
from ..common.progress import Progress
from ..common.validation import shard_bytes
from ..modeling.delta_chain import DeltaBase
from ..modeling.model_files import HubOptions, fetch_config, pinned
from ..modeling.tensors import Model
from ..repository.open import open_repository, refuse_adapter_beside
from ..repository.report import CompressionReport
from ..storage.workspace import Workspace
from .exact import compress_exactly
from .exact_names import ALL
from .pair import ModelPair, is_among


def flatten(
    repository: str,
    output_dir: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    base_name: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> CompressionReport:
    """Write the exact delta of a delta repository against its first base, the dense model at the end of the chain.

    The delta file is the one that `compress` writes for the reconstructed model with method exact; tokenizer and other
    small files are the repository's. Tensors are decoded one at a time, on the CPU. A killed run resumes.

    Args:
        repository: folder or Hub id of a delta repository. If it is the only one, the result is an exact delta against
            the same base.
        output_dir: as for `compress`. A delta that is replaced by its flat form still serves as the base of others.
        base_model: as for `from_pretrained`. It is recorded in the result if the first base is recorded as a folder.
        revision: branch, tag or commit of the repository on the Hub.
        base_name: the Hub id to record for the first base.
        token, cache_dir: as for any download from the Hub.
        max_shard_size: a delta file larger than this is split.
        progress: show progress bars.

    Returns:
        A report on every tensor, and the sizes.

    Raises:
        CheckpointError: if a repository of the chain or the first base is missing, or the repository holds an adapter.
        DeltaFormatError, WrongBaseError: if a delta is damaged, or rests on another base.
        OutputError: as for `compress`, or if `output_dir` holds a delta that the repository rests on.
    """
    shard_size = shard_bytes(max_shard_size)
    processes.connect(True)
    with Workspace(Path(output_dir)) as workspace:
        options = HubOptions(revision, token, cache_dir)
        pair = processes.each(lambda: _flat_pair(repository, options, base_model, base_name, Progress(progress)))
        _check_output(workspace.output, pair.finetuned)
        return compress_exactly(pair, workspace, shard_size)


def _check_output(output: Path, end: Model) -> None:
    """Check that an output folder is none that the end of a chain rests on: that could not be read any more."""
    assert isinstance(end, DeltaBase)
    if is_among(output, end.folders - {end.folder}):
        raise OutputError(f"{output} holds a delta that '{end.source}' rests on; choose another folder")


def _flat_pair(
    source: str, options: HubOptions, base_model: str | None, base_name: str | None, progress: Progress
) -> ModelPair:
    """Return a delta repository's first base with the model that the repository stands for."""
    options = pinned(source, options)
    refuse_adapter_beside(source, options)
    config, folder = fetch_config(source, options)
    repository = open_repository(source, options, base_model)
    first = repository.chain[-1]
    base, recorded = first.base, first.config.base_model_name_or_path
    pair = ModelPair(
        base.source, DeltaBase(repository, options, config, folder), base.options, options,
        base_name=base_name, device=torch.device("cpu"), progress=progress, exact=ALL,
    )  # fmt: skip
    if base_name is None and (base_model is None or is_on_hub(recorded)):
        # Its tensors have been compared with those of the recorded one, wherever they are read from.
        pair.recorded_base = recorded, first.config.base_model_revision
    return pair
