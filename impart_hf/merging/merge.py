"""Merging fine-tunes of one base, tensor by tensor, into a dense checkpoint or a delta repository."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..coding.svd_cache import SvdOf, uncached_svd
from ..common import processes
from ..common.devices import usable_device
from ..common.files import OutputError, write_json
from ..common.model_names import split_adapter
from ..common.progress import Progress
from ..common.validation import byte_budget, shard_bytes
from ..common.weight_bytes import weight_bytes
from ..compression.compatibility import IncompatibleModelsError
from ..compression.encoding import mask_seed
from ..compression.exact import compress_exactly
from ..compression.exact_names import ALL, NONE
from ..compression.pair import ModelPair
from ..compression.pipeline import CompressionRequest, compress_pair, stages_of, with_ratio_for
from ..compression.stages import EXACT_STAGES, SCANNING
from ..methods import ExactConfig, MethodConfig
from ..modeling.checkpoints import all_finite
from ..modeling.model_files import HubOptions
from ..modeling.transfer import to_device
from ..repository.cards import merge_card, merge_origin
from ..repository.reader_files import with_pruned_reader
from ..repository.report import CompressionReport
from ..storage.checkpoint_writer import dense_tensors, new_folder_of_job, write_weights
from ..storage.output import check_output, check_visible
from ..storage.workspace import Workspace
from .chat_template import write_chat_template
from .config import MergeConfig
from .inputs import MergeInputs
from .task_vectors import TaskVector, combined_deltas, dare, impart, trim_vector

BLOCK_ENTRIES = 1 << 20  # combined at a time, for each model; larger blocks leave the cache


@dataclass
class MergeReport:
    """The result of a merge.

    Attributes:
        config: the configuration, as in its YAML file.
        parameters: number of parameters of the merged model.
        added_tokens: rows of its vocabulary beyond the base's.
        notes: notes for the user.
        compression: the report on the delta repository, if one was made.
    """

    config: dict[str, Any]
    parameters: int
    added_tokens: int
    notes: list[str] = field(default_factory=list)
    compression: CompressionReport | None = None

    def to_dict(self) -> dict[str, Any]:
        compression = None if self.compression is None else self.compression.to_dict()
        return {**asdict(self), "compression": compression}


def merge(
    config: MergeConfig | dict[str, Any] | str | Path,
    output_dir: str | Path,
    *,
    compression: MethodConfig | ExactConfig | None = None,
    max_bytes: int | str | None = None,
    base_name: str | None = None,
    device: str | torch.device = "cpu",
    token: str | bool | None = None,
    cache_dir: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> MergeReport:
    """Merge fine-tunes of one base by task arithmetic or TIES, optionally after DARE or ImPart.

    For every tensor the result is W_base + lambda * sum_t w_t D_t (task arithmetic, arXiv 2212.04089), or the same sum
    over only the entries that agree with the elected sign (TIES, arXiv 2306.01708). D_t is W_t - W_base, sparsified and
    trimmed as the merge method says. All arithmetic is in float32. Memory holds one tensor of each model; they are
    combined in blocks. Several processes (`accelerate launch`), on one machine or on machines that see one file system,
    share the tensors out.

    Args:
        config: a `MergeConfig`, the same as a dictionary, or the path of a YAML file.
        output_dir: folder to make. Must not exist or be empty; for a delta repository it may hold an older one.
        compression: make a delta repository by this method instead of a dense checkpoint.
        max_bytes: byte budget of the delta repository, as for `compress`.
        base_name: Hub id to record in the delta repository for a base that is a local folder.
        device: where tensors are combined and decomposed.
        token, cache_dir: as for any download from the Hub.
        max_shard_size: a weight file larger than this is split.
        progress: show progress bars.

    Raises:
        ValueError: if the configuration or a setting is wrong.
        CheckpointError, DeltaFormatError, WrongBaseError: if a model cannot be read.
        IncompatibleModelsError: if a model is not a fine-tune of the base, or holds NaN or infinity.
        OutputError: if the folder is not free or the disk is too small.
        ModuleNotFoundError: if PEFT is not installed.
    """
    config = MergeConfig.of(config)
    require_peft()
    processes.connect(str(device).startswith("cpu"))
    shard_size, device = shard_bytes(max_shard_size), usable_device(device)
    bars = Progress(progress)
    wanted_bytes = byte_budget(max_bytes)
    if wanted_bytes is not None and not isinstance(compression, MethodConfig):
        raise ValueError(
            "max_bytes is for a delta repository of a method with a ratio: give that with compression, or leave it out"
        )
    output = processes.each(lambda: free_output(output_dir, config, compression))
    merged = processes.each(
        lambda: Merge(config, MergeInputs(config, token=token, cache_dir=cache_dir, device=device), device)
    )

    def write(folder: Path) -> None:
        merged.write(folder, output.name, shard_size, bars)

    if compression is None:
        return publish(merged, output, write)
    return compress_merge(merged, output, write, compression, wanted_bytes, base_name, shard_size, bars)


def publish(merged: "Merge", output: Path, write: Callable[[Path], None]) -> MergeReport:
    """Write a merged model to its output folder, completely or not at all.

    Args:
        write: writes the model's files into an existing folder.
    """
    with new_folder_of_job(output) as folder:
        write(folder)
    return merged.report()


def compress_merge(
    merged: "Merge",
    output: Path,
    write: Callable[[Path], None],
    method: MethodConfig | ExactConfig,
    max_bytes: int | None,
    base_name: str | None,
    max_shard_size: int,
    progress: Progress,
) -> MergeReport:
    """Make a delta repository of a merged model in its output folder, completely or not at all.

    Args:
        write: writes the dense model's files into an existing folder.
        method, base_name, max_shard_size: as for `compress`.
        max_bytes: byte budget of the repository; None for the method's ratio.
    """
    origin, request = merge_origin(merged.config.to_dict()), None
    if isinstance(method, MethodConfig):
        # Checks the budget before any work; the header of the file is not counted yet.
        with_ratio_for(method, max_bytes, merged.weight_bytes())
        request = CompressionRequest(method, max_bytes, max_shard_size=max_shard_size, origin=origin)
    progress.plan(["Merging", SCANNING, *(EXACT_STAGES if request is None else stages_of(request))])
    with Workspace(output) as workspace:
        dense = workspace.scratch() / output.name
        processes.in_first(dense.mkdir)
        processes.each(lambda: check_visible(dense))
        write(dense)
        base = merged.inputs.base
        pair = processes.each(
            lambda: ModelPair(
                base.source, str(dense), base.options, HubOptions(),
                base_name=base_name, device=merged.device, progress=progress, exact=ALL if request is None else NONE,
            )
        )  # fmt: skip
        report = merged.report()
        report.compression = (
            compress_exactly(pair, workspace, max_shard_size, origin)
            if request is None
            else compress_pair(pair, workspace, request)
        )
        return report


def free_output(output_dir: str | Path, config: MergeConfig, compression: MethodConfig | ExactConfig | None) -> Path:
    """Return the absolute path of a merge's output folder.

    Raises:
        OutputError: if the folder is not free, or is one of the models.
    """
    output = Path(os.path.abspath(output_dir))
    names = (config.base_model, *(part for model in config.models for part in split_adapter(model.model)))
    for model in names:
        if os.path.isdir(model) and os.path.realpath(model) == os.path.realpath(output):
            raise OutputError(f"{output} is one of the models that are merged; choose another folder")
    return check_output(output, replaces_delta=compression is not None)


def require_peft() -> None:
    """Check that PEFT is installed.

    Raises:
        ModuleNotFoundError: if not.
    """
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("merging needs PEFT: pip install 'impart-hf[merge]'") from error


class Merge:
    """The merged model, computed one tensor at a time.

    Attributes:
        config: the configuration.
        inputs: the opened models.
        device: where tensors are combined.
    """

    def __init__(
        self,
        config: MergeConfig,
        inputs: MergeInputs,
        device: torch.device,
        svd_of: SvdOf = uncached_svd,
        delta_of: Callable[[str], torch.Tensor] | None = None,
    ):
        """Set up the merge; nothing is computed yet.

        Args:
            device: where tensors are combined.
            inputs: opened for this configuration, or for one that differs in parameters alone.
            svd_of: for a key that identifies one model's tensor, and a matrix's number in its stack, returns an `Svd`.
            delta_of: returns a tensor's combined delta in place of `delta`, if it was computed before.
        """
        self.config, self.inputs, self.device, self._svd_of = config, inputs, device, svd_of
        self._delta_of = delta_of or self.delta

    @property
    def source(self) -> str:
        """The models that are merged, for messages."""
        return f"merge of {', '.join(model.name for model in self.inputs.models)}"

    def names(self) -> list[str]:
        return self.inputs.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.inputs.base.shape(name)
        return (shape[0] + self.inputs.vocabulary_rows(name), *shape[1:]) if shape else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one of the result's tensors.

        The dtype of the configuration replaces the base's. If it is that of most of the base's tensors, others, such as
        a router's bias in float32, keep their own: rounded, it would choose other experts.
        """
        dtype, wanted = self.inputs.base.dtype(name), self.config.torch_dtype
        if wanted is None or wanted == self.inputs.usual_dtype or not dtype.is_floating_point:
            return dtype
        return wanted

    def weight_bytes(self) -> int:
        """Return the bytes of the merged model's weights."""
        return weight_bytes(self)

    def delta(self, name: str) -> torch.Tensor:
        """Return the combined delta of one tensor: float32, of the base's shape, before the factor lambda.

        Raises:
            IncompatibleModelsError: if a model's tensor holds NaN or infinity.
        """
        shape, depth = self.inputs.base.shape(name), self.inputs.depth(name)
        before = torch.atleast_1d(self.inputs.base.tensor(name))
        if not before.numel():
            return torch.empty(shape)
        if not all_finite(before):
            raise IncompatibleModelsError(f"{name} of '{self.config.base_model}' holds NaN or infinity")
        shared = self.config.values(name, depth)
        own = [self.config.model_values(model, name, depth) for model in self.config.finetunes]
        vectors = [self._vector(number, name, before, values, shared) for number, values in enumerate(own)]
        weights = [values["weight"] for values in own]
        block = max(1, BLOCK_ENTRIES // before[0].numel())
        combined = torch.empty(before.shape)
        for start in range(0, len(before), block):
            rows = slice(start, start + block)
            deltas = [vector(rows) for vector in vectors]
            combined[rows] = combined_deltas(deltas, weights, self.config.method.consensus, shared["normalize"])
        return combined.view(shape)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return one tensor of the merged model, on a device."""
        before = self.inputs.base.tensor(name)
        if not before.is_floating_point():
            return before.to(device)
        delta = self._delta_of(name)
        scale = self.config.values(name, self.inputs.depth(name))["lambda"]
        dtype = self.dtype(name)
        merged = torch.add(before.float(), delta, alpha=scale).to(dtype)
        if self.inputs.vocabulary_rows(name):
            merged = torch.cat([merged, self.inputs.added_rows(name, dtype)])
        return merged.to(device)

    def _vector(
        self, number: int, name: str, before: torch.Tensor, values: dict[str, float], shared: dict[str, Any]
    ) -> TaskVector:
        """Return one model's delta of one tensor, sparsified and trimmed."""
        model, method = self.inputs.models[number], self.config.method
        after = model.shared(name, before, self.device)
        if not all_finite(after):
            raise IncompatibleModelsError(f"{name} of '{model.name}' holds NaN or infinity")

        def dense(rows: slice) -> torch.Tensor:
            return after[rows].float() - to_device(before[rows], self.device).float()

        vector: TaskVector = dense
        if method.sparsifier is not None and values["density"] < 1 and self.inputs.is_layer_matrix(name):
            vector = self._sparsified(number, name, dense(slice(None)), values, shared).__getitem__
        trim = values["density" if method.sparsifier is None else "trim_density"]
        if method.consensus and trim < 1:
            vector = trim_vector(vector, len(before), trim)
        return vector

    def _sparsified(
        self, number: int, name: str, delta: torch.Tensor, values: dict[str, float], shared: dict[str, Any]
    ) -> torch.Tensor:
        """Return the delta of one tensor with entries dropped, of the delta (DARE) or of its components (ImPart)."""
        key = f"{number}:{name}"
        for place, matrix in enumerate(delta.view(-1, *delta.shape[-2:])):
            seed = mask_seed(shared["seed"], key, place)
            if not matrix.any():
                continue
            if self.config.method.sparsifier == "dare":
                sparse = dare(matrix, values["density"], shared["rescale"], seed)
            else:
                sparse = impart(matrix, values["density"], values["beta"], values["c"], seed, self._svd_of(key, place))
            matrix.copy_(sparse)
        return delta

    def write(self, folder: Path, name: str, max_shard_size: int, progress: Progress) -> None:
        """Write the merged model as a dense checkpoint with this name into an existing folder."""
        processes.in_first(lambda: self._write_files(folder, name))
        write_weights(folder, dense_tensors(self), max_shard_size, progress, "Merging", together=True)

    def _write_files(self, folder: Path, name: str) -> None:
        """Write config.json of the merged model, its sidecar files, and its model card."""
        content = {key: value for key, value in self.inputs.result_config.items() if key != "_name_or_path"}
        if self.config.dtype is not None:
            content.pop("torch_dtype", None)
            content["dtype"] = self.config.dtype
        write_json(folder / "config.json", with_pruned_reader(content, folder))
        self.inputs.companions.copy_to(folder)
        if self.inputs.chat_template is not None:
            write_chat_template(folder, self.inputs.chat_template)
        (folder / "README.md").write_text(merge_card(name, self.config.to_dict()), "utf-8")

    def report(self) -> MergeReport:
        shapes = [self.shape(name) for name in self.names()]
        count = sum(torch.Size(shape).numel() for shape in shapes)
        return MergeReport(self.config.to_dict(), count, self.inputs.added_tokens, self.config.notes())
