"""The public function `compress`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.text import AUTOMATIC, BUILT_IN, CalibrationSource
from ..common import processes
from ..common.devices import usable_device
from ..common.progress import Progress
from ..common.validation import byte_budget, shard_bytes
from ..distillation import DistillSettings
from ..methods import ExactConfig, ImPartRdConfig, MethodConfig
from ..modeling.model_files import HubOptions
from ..repository.report import CompressionReport
from ..storage.workspace import Workspace
from .exact import compress_exactly
from .exact_names import ALL, ExactNames
from .pair import ModelPair
from .pipeline import CompressionRequest, compress_pair
from .target import QualityTarget
from .targeted import compress_to_target


def compress(
    base: str,
    finetuned: str,
    output_dir: str | Path,
    method: MethodConfig | ExactConfig | None = None,
    *,
    exact: Sequence[str] = (),
    max_bytes: int | str | None = None,
    target: QualityTarget | None = None,
    calibration: CalibrationSource | None = AUTOMATIC,
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

    Both models are read tensor by tensor and never held as a whole, except for distillation. Work in progress is kept
    in a hidden folder beside `output_dir`, one file per tensor: a killed run resumes where it stopped and gives the
    same bytes as an unbroken one. `output_dir` appears, complete, at the end.

    Several processes (`accelerate launch`), on one machine or on machines that see one file system, share the tensors
    out and give the same bytes as one. All return the report.

    Args:
        base: local folder or Hub id of the base model, which may be a delta repository that is exact.
        finetuned: local folder or Hub id of the fine-tuned model, or of an adapter in PEFT's format on the
            base, which together are the fine-tuned model.
        output_dir: folder of the repository; must not exist, be empty, or hold a delta repository, which is replaced.
        method: a method's configuration; `ImPartRdConfig` at ratio 32 if None. `ExactConfig` stores every change, bit
            for bit; then there is no ratio, target or text.
        exact: names of tensors that are stored exactly beside any method, if they changed; with wildcards as in file
            names: "*.router.weight", "lm_head.*". Their bytes count, and the others get what they leave.
        max_bytes: the most that the repository may take, as a number of bytes or a string such as "500MB", instead of
            the method's ratio. The same files are counted; a ratio may be missed, but this limit is kept.
        target: the quality to keep on a validation text, instead of a ratio: a few ratios are tried, the method's
            first, and the smallest repository is written that was measured to keep the target. Fine-tune and delta are
            then in memory as a whole. A killed search goes on with what it has measured.
        calibration: calibration text for the methods that quantise, as for `calibration.text.calibration_tokens`.
            With it, one decoder layer at a time is run over the text, on the outputs of the compressed layers before
            it. "auto" is the built-in text for the methods that measure with it what errors in each matrix cost
            (impart-rd), unless the model has no tokenizer or cannot be run layer by layer, which is logged; for other
            methods it is None: they round to the nearest level.
        distill: text, of the same kinds, on which the numbers in the finished records are trained towards the
            fine-tune's logits; see `distillation.distillation.distill`. Needs memory for both models, or with
            `DistillSettings(blocks=1)` for one decoder layer.
        calibration_samples: the most sequences to take from each text.
        calibration_length: tokens per sequence; at most the model's positions.
        distill_settings: settings of distillation.
        device: where matrices are decomposed, such as "cuda".
        base_revision: branch, tag or commit of the base on the Hub.
        finetuned_revision: the same for the fine-tuned model.
        base_name: the Hub id to record for a base that was given as a local folder.
        token, cache_dir: as for any download from the Hub.
        max_shard_size: a delta file larger than this is split.
        progress: show progress bars.

    Returns:
        A report on every tensor, the sizes, and whether the requested ratio was met.

    Raises:
        CheckpointError: if one of the models cannot be read, or an adapter cannot be merged.
        DeltaFormatError, WrongBaseError: if the base is a delta repository that is damaged, or whose own base is
            another, or that stores a tensor approximately.
        IncompatibleModelsError: if they are not a pair, or hold NaN or infinity.
        ValueError: if the method's ratio cannot be reached, no ratio keeps the target, a device or size is invalid, or
            a text is too short.
        OutputError: if `output_dir` holds something else or a delta that the base rests on, is being written by another
            process, or the disk is full.
    """
    method = checked_method(method, calibration, distill, distill_settings, max_bytes, target)
    names = exact_names(method, exact)
    shard_size, wanted_bytes = shard_bytes(max_shard_size), byte_budget(max_bytes)
    processes.connect(str(device).startswith("cpu"))  # before a GPU is used: it assigns one to each process
    device = usable_device(device)
    # The workspace comes first, so that an output that cannot be written fails before anything is downloaded.
    with Workspace(Path(output_dir)) as workspace:
        pair = processes.each(
            lambda: ModelPair(
                base, finetuned, HubOptions(base_revision, token, cache_dir),
                HubOptions(finetuned_revision, token, cache_dir), base_name=base_name, device=device,
                progress=Progress(progress), exact=names,
            )
        )  # fmt: skip
        pair.check_output(workspace.output)
        if isinstance(method, ExactConfig):
            return compress_exactly(pair, workspace, shard_size)
        request = request_for(
            pair, method, wanted_bytes, calibration, distill, calibration_samples, calibration_length,
            distill_settings, shard_size,
        )  # fmt: skip
        if target is not None:
            return compress_to_target(pair, workspace, request, target)
        return compress_pair(pair, workspace, request)


def checked_method(
    method: MethodConfig | ExactConfig | None,
    calibration: CalibrationSource | None,
    distill: CalibrationSource | None,
    distill_settings: DistillSettings | None,
    max_bytes: int | str | None = None,
    target: QualityTarget | None = None,
) -> MethodConfig | ExactConfig:
    """Return the method, or the default if it is None, after checking that it goes with the other arguments.

    Raises:
        TypeError: if it is no method's configuration.
        ValueError: if the arguments cannot be combined.
    """
    method = method if method is not None else ImPartRdConfig()
    if isinstance(method, ExactConfig):
        given = {"max_bytes": max_bytes, "target": target, "distill": distill}
        if refused := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{refused[0]}: '{method.name}' stores every change, whatever size that has: leave it out")
    if target is not None and max_bytes is not None:
        raise ValueError("both target and max_bytes decide the size: give one of them")
    if not isinstance(method, MethodConfig | ExactConfig):
        raise TypeError(f"method must be a method's configuration such as ImPartRdConfig(), got {method!r}")
    if calibration is not None and calibration != AUTOMATIC and not method.quantises:
        raise ValueError(f"calibration is for the methods that quantise, and '{method.name}' does not: leave it out")
    if distill_settings is not None and distill is None:
        raise ValueError("distill_settings are for distillation, which needs a text, but distill is None: give a text")
    return method


def exact_names(method: MethodConfig | ExactConfig, exact: Sequence[str]) -> ExactNames:
    """Return the names of the tensors that are stored exactly.

    Raises:
        TypeError: if `exact` is one string.
        ValueError: if it has no effect.
    """
    if isinstance(exact, str):
        raise TypeError(f"exact must be a list of names, got the string {exact!r}")
    if isinstance(method, ExactConfig):
        if exact:
            raise ValueError(f"exact: '{method.name}' stores every tensor exactly: leave the names out")
        return ALL
    return ExactNames(tuple(exact))


def request_for(
    pair: ModelPair,
    method: MethodConfig,
    max_bytes: int | None,
    calibration: CalibrationSource | None,
    distill: CalibrationSource | None,
    samples: int,
    length: int,
    distill_settings: DistillSettings | None,
    max_shard_size: int,
) -> CompressionRequest:
    """Return what is asked for, with the texts' tokens, which are read in every process.

    The arguments are those of `compress`, checked; `samples` and `length` are those of the texts.
    """
    if calibration == AUTOMATIC and not method.shares_budget:
        calibration = None

    def read(text: CalibrationSource | None) -> Tensor | None:
        return None if text is None else processes.each(lambda: pair.tokens(text, samples, length))

    if calibration == AUTOMATIC:  # one process decides, for all
        tokens = processes.in_first(lambda: pair.automatic_tokens(samples, length))
    else:
        tokens = read(calibration)
    distill_tokens = read(distill)
    return CompressionRequest(
        method, max_bytes, tokens, distill_tokens, distill_settings or DistillSettings(), max_shard_size,
        is_built_in=tokens is not None and calibration in (AUTOMATIC, BUILT_IN),
    )  # fmt: skip
