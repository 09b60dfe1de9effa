"""The pipeline: base and fine-tuned model in, delta repository out, one tensor at a time."""

import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import processes
from .budget import SvdOf, components_bytes, shared_budgets
from .calibration_text import CalibrationSource, load_tokenizer, model_tokens
from .devices import usable_device
from .distilling import DistillReport, DistillSettings
from .encoding import Encoding, leading_svd_of
from .evaluate import load
from .layer_stream import stream_layers, streamed_model
from .methods import ImPartRdConfig, MethodConfig
from .modeling.checkpoints import Checkpoint, HubOptions, pinned
from .plan import TensorPlan, check_pair, make_plan, scan
from .progress import Progress
from .report import CompressionReport
from .repository import RepositoryWriter, describe_base
from .safetensors_writer import shard_bytes, size_bytes
from .svd_store import SvdStore
from .workspace import Workspace

_KEPT = torch.float16  # of singular components that are kept on disk until they are encoded
Method = TypeVar("Method", bound=MethodConfig)


def compress(
    base: str,
    finetuned: str,
    output_dir: str | Path,
    method: MethodConfig | None = None,
    *,
    max_bytes: int | str | None = None,
    calibration: CalibrationSource | None = None,
    distill: CalibrationSource | None = None,
    calibration_samples: int = 128,
    calibration_length: int = 2048,
    distill_settings: DistillSettings | None = None,
    device: str | torch.device = "cpu",
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
    base_name: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> CompressionReport:
    """Compress a fine-tuned model to a delta repository against its base.

    Both models are read tensor by tensor and never held as a whole (but for distillation). Work in progress is kept in
    a hidden folder beside `output_dir`, one file a tensor: a run that was killed goes on where it stopped and gives
    the same bytes as an unbroken one. `output_dir` appears, complete, at the end.

    In several processes (`accelerate launch`) the first does everything but distillation, in which all take part; they
    must see one file system. All return the report.

    Args:
        base: local folder or Hub id of the base model.
        finetuned: local folder or Hub id of the fine-tuned model.
        output_dir: where the repository goes; must not exist, be empty, or hold a delta repository, which is replaced.
        method: a method's configuration; `ImPartRdConfig` at ratio 32 if None.
        max_bytes: what the repository may take, as a number of bytes or a string such as "500MB", in the place of the
            method's ratio. The same is counted as for that; but where a ratio may be missed, this is a limit.
        calibration: text for the methods that quantise, as for `calibration_text.calibration_tokens`. Without it they
            round to the nearest level. With it, one decoder layer at a time is run over the text, fed by the layers
            compressed before it.
        distill: text of the same kinds on which the numbers in the finished records are trained towards the
            fine-tune's logits; see `distilling.distill`. Needs room for both models, or with
            `DistillSettings(blocks=1)` for one decoder layer.
        calibration_samples: sequences of text taken at most, for either purpose.
        calibration_length: tokens of a sequence; not more than the model's positions.
        distill_settings: how that is done.
        device: where matrices are decomposed, such as "cuda".
        base_revision: branch, tag or commit of the base on the Hub.
        finetuned_revision: the same of the fine-tuned model.
        base_name: the id to record for the base, if it was given as a local folder but lives on the Hub.
        token, cache_dir: as for any download from the Hub.
        max_shard_size: a delta file larger than this is split.
        progress: show progress bars.

    Returns:
        What became of every tensor, the bytes, and whether the requested ratio was met.

    Raises:
        CheckpointError: if one of the models cannot be read.
        IncompatibleModelsError: if they are not a pair, or hold NaN or infinity.
        ValueError: if the method's ratio cannot be reached, a device or size is none that can be used, or a text is
            too short.
        OutputError: if `output_dir` holds something else, is being written by another process, or the disk is full.
    """
    method = method if method is not None else ImPartRdConfig()
    if not isinstance(method, MethodConfig):
        raise TypeError(f"method must be a method's configuration such as ImPartRdConfig(), got {method!r}")
    if calibration is not None and not method.quantises:
        raise ValueError(f"calibration is for the methods that quantise; '{method.name}' does not")
    if distill_settings is not None and distill is None:
        raise ValueError("distill_settings are for distillation, which needs a text: distill is None")
    shard_size, wanted_bytes = shard_bytes(max_shard_size), wanted_size(max_bytes)
    processes.connect(str(device).startswith("cpu"))  # gives each process a GPU of its own: before any is used
    device = usable_device(device)
    # Whether the output can be written shows before anything is downloaded
    with Workspace(Path(output_dir)) if processes.is_first() else nullcontext() as workspace:
        pair = ModelPair(
            base,
            finetuned,
            HubOptions(base_revision, token, cache_dir),
            HubOptions(finetuned_revision, token, cache_dir),
            base_name=base_name,
            device=device,
            progress=Progress(progress),
        )
        if workspace is None:
            return _help(pair)
        texts = {
            purpose: pair.tokens(source, calibration_samples, calibration_length)
            for purpose, source in (("calibration", calibration), ("distillation", distill))
            if source is not None
        }
        report = pair.compress(
            workspace, method, texts.get("calibration"), texts.get("distillation"), distill_settings, shard_size,
            max_bytes=wanted_bytes,
        )  # fmt: skip
    return processes.from_first(report) if processes.several() else report


def wanted_size(max_bytes: int | str | None) -> int | None:
    """A number of bytes, or what such a string as "500MB" stands for.

    Raises:
        ValueError: if it is none.
    """
    return None if max_bytes is None else size_bytes(max_bytes, "max_bytes")


def sized(method: Method, max_bytes: int | None, weight_bytes: int) -> Method:
    """A method with the ratio at which the repository takes `max_bytes`; as it is, if that is None.

    Args:
        weight_bytes: of the fine-tuned checkpoint.

    Raises:
        ValueError: if the checkpoint takes no more.
    """
    if max_bytes is None:
        return method
    if max_bytes >= weight_bytes:
        raise ValueError(f"max_bytes={max_bytes} is no less than what the model's own weights take: {weight_bytes}")
    return replace(method, compression_ratio=weight_bytes / max_bytes)


@dataclass(frozen=True)
class _Distillation:
    """What all processes do together.

    Attributes:
        records: by tensor name, the file of the tensor's records.
        tokens: int64 (sequences, length).
        checkpoints: folder for the state of training.
    """

    records: dict[str, Path]
    tokens: torch.Tensor
    settings: DistillSettings
    checkpoints: Path

    def run(self, pair: "ModelPair") -> tuple[dict[str, bytes], DistillReport]:
        records = {name: path.read_bytes() for name, path in self.records.items()}
        return _distillation().distill(
            pair.base_model, pair.model, records, self.tokens, self.settings,
            device=pair.device, checkpoints=self.checkpoints, progress=pair.progress,
        )  # fmt: skip


def _distillation() -> Any:
    """The module that distils: it loads the Trainer, which no other use of a compression has to wait for.

    Raises:
        ModuleNotFoundError: if accelerate is not installed.
    """
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("distillation needs accelerate: pip install 'impart-hf[distill]'") from error
    from .distilling import distillation

    return distillation


def _help(pair: "ModelPair") -> CompressionReport:
    """What a process does that is not the first."""
    found: _Distillation | CompressionReport = processes.from_first()
    if isinstance(found, _Distillation):
        found.run(pair)
        found = processes.from_first()
    assert isinstance(found, CompressionReport)
    return found


class ModelPair:
    """A base and a fine-tune of it, read through once however often they are compressed.

    Attributes:
        model: the fine-tuned checkpoint.
        base_model: the base.
        device: where matrices are decomposed.
        progress: shows bars.
    """

    def __init__(
        self,
        base: str,
        finetuned: str,
        base_options: HubOptions,
        model_options: HubOptions,
        *,
        base_name: str | None = None,
        device: torch.device,
        progress: Progress,
    ):
        """Open both checkpoints; only headers are read.

        Raises:
            CheckpointError: if one of them cannot be read.
            IncompatibleModelsError: if they are not a pair.
        """
        self._finetuned, self._model_options = os.fspath(finetuned), pinned(os.fspath(finetuned), model_options)
        base_options = pinned(os.fspath(base), base_options)
        self.device, self.progress = device, progress
        self.model = Checkpoint(self._finetuned, self._model_options)
        self.base_model = Checkpoint(os.fspath(base), base_options, tied=self.model.tied)
        check_pair(self.base_model, self.model)
        self._base = describe_base(os.fspath(base), base_options, base_name)
        self._base_options = base_options

    @cached_property
    def tensors(self) -> list[TensorPlan]:
        """What is to become of every tensor, before any method has a say."""
        return scan(self.base_model, self.model, self.progress)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fine-tune's.

        Raises:
            ValueError: if it has none that can be read.
        """
        return load_tokenizer(self.model.source, self.model.options)

    def load(self, repository: Path | None = None) -> PreTrainedModel:
        """A delta repository of this pair, or the fine-tune itself, in float32 on the device, to be judged."""
        if repository is None:
            options = self._model_options
            return load(
                self._finetuned, torch.float32, self.device,
                revision=options.revision, token=options.token, cache_dir=options.cache_dir,
            )  # fmt: skip
        options = self._base_options
        source = self.base_model.source
        return load(
            str(repository), torch.float32, self.device,
            # The name recorded for a folder is for others, and need not exist yet
            base_model=source if os.path.isdir(source) else None, token=options.token, cache_dir=options.cache_dir,
        )  # fmt: skip

    def tokens(self, source: CalibrationSource, samples: int, length: int) -> torch.Tensor:
        """int64 (at most `samples`, `length` or as many positions as the model has): sequences of a text."""
        return model_tokens(self.model, source, samples, length)

    def compress(
        self,
        workspace: Workspace,
        method: MethodConfig,
        calibration: torch.Tensor | None = None,
        distillation: torch.Tensor | None = None,
        distill_settings: DistillSettings | None = None,
        max_shard_size: int = 5 * 10**9,
        *,
        max_bytes: int | None = None,
        svd_of: SvdOf = leading_svd_of,
        card_data: dict[str, Any] | None = None,
        planned_card_data: dict[str, Any] | None = None,
        origin: str = "",
    ) -> CompressionReport:
        """Compress the fine-tune into the workspace and publish it.

        Args:
            method: a method's configuration.
            calibration, distillation: int64 (sequences, length), or None.
            distill_settings: of distillation; None for the defaults.
            max_shard_size: in bytes.
            max_bytes: that the repository may take, in the place of the method's ratio.
            svd_of: for a tensor's name and a matrix's number in its stack, what gives its singular components.
            card_data: more entries for the model card's metadata.
            planned_card_data: what the plan leaves room for in their place, if that is to be something else.
            origin: where the fine-tune comes from, as for `delta_card`.
        """
        started = time.perf_counter()
        method = sized(method, max_bytes, self.model.weight_bytes)
        settings = distill_settings or DistillSettings()
        training = {}
        if method.quantises:
            training["calibration"] = _text_size(calibration) or method.uncalibrated
        if distillation is not None:
            training["distillation"] = f"{settings.trains}, {settings.steps} steps, {_text_size(distillation)}"
        writer = RepositoryWriter(
            base=self._base,
            finetuned=self._finetuned,
            finetuned_options=self._model_options,
            model=self.model,
            method={**method.to_dict(), **training},
            tensors=self.tensors,
            max_shard_size=max_shard_size,
            card_data=card_data or {},
            origin=origin,
        )
        text_bytes = writer.text_bytes(writer.card_data if planned_card_data is None else planned_card_data)
        plan = make_plan(self.tensors, method, self.model.weight_bytes, text_bytes, max_shard_size)
        if max_bytes is not None:
            plan.check_size()
        stream = None if calibration is None else streamed_model(self.model, calibration, self.device)
        if distillation is not None:
            _distillation().check_distillation(self.model, distillation, settings, self.device)
        inputs: list[Any] = [None if ids is None else ids.tolist() for ids in (calibration, distillation)]
        inputs.append(None if distillation is None else asdict(settings))
        kept = components_bytes(plan.encoded, method, _KEPT.itemsize) if method.shares_budget else 0
        workspace.begin(plan.fingerprint(method, inputs), plan.allowed_bytes + plan.fixed_bytes, kept)
        budgets: dict[str, list[int]] = {}
        if method.shares_budget:
            svd_of = SvdStore(workspace.components(), _KEPT).of
            budgets = workspace.budgets(
                lambda: shared_budgets(
                    plan.encoded, self.base_model, self.model, method, self.device, svd_of, self.progress
                )
            )
        work = Encoding(self.base_model, self.model, self.device, plan.encoded, method, workspace, svd_of, budgets)
        with self.progress.bar(sum(t.dense_bytes for t in plan.encoded), "Compressing", "B") as work.bar:
            if stream is not None and calibration is not None:
                stream_layers(stream, calibration, work.compressed, progress=Progress(False))
            for tensor in plan.encoded:
                work.encode(tensor)
        distilled = None
        if distillation is not None:
            paths = {tensor.name: workspace.record_path(tensor.name) for tensor in plan.encoded}
            task = _Distillation(paths, distillation, settings, workspace.checkpoints())
            if processes.several():
                processes.from_first(task)
            changed, distilled = task.run(self)
            for name, data in changed.items():
                workspace.put_distilled(name, data)
        report = writer.write(workspace, plan, time.perf_counter() - started, distilled)
        workspace.publish()
        return report


def _text_size(tokens: torch.Tensor | None) -> str:
    return "" if tokens is None else f"{tokens.shape[0]} x {tokens.shape[1]} tokens"
