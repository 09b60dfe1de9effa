"""The command `impart-hf compress`, and what the others that compress share with it."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..compression.compress import compress
from ..distillation import TRAINED, DistillReport, DistillSettings
from ..methods import MethodConfig, method_class, method_fields, method_names, parse_setting
from ..repository.report import CompressionReport, human_bytes
from ..training.distributed import is_first
from .options import add_push, add_training_fields, command, push_if_asked, training_fields

_SETTINGS = {
    "beta": "share of the singular components pruned beforehand, in [0, 1)",
    "c": "exponent of a component's importance, above 0",
    "value_dtype": "storage of kept values, float16 or bfloat16",
    "bits": "bits of a value in each group of components, comma-separated, 2 to 8",
    "groups": "components in each group but the last, comma-separated",
    "drop_weight": "what a dropped component counts for, in noise of the same size, at least 1",
    "value_bits": "bits of a kept value, 2 to 8",
}
DEFAULT_METHOD = "impart-rd"
_SHARED_SETTINGS = "compression_ratio", "seed", "embeddings"  # by all methods
# The options of settings that go by another name there
_OPTIONS = {"compression_ratio": "ratio", "batch_size": "distill_batch_size", "blocks": "distill_blocks"}


def add_compress(commands: Any) -> None:
    """Add the command `compress`."""
    parser = command(commands, "compress", _compress, "make a delta repository of a fine-tuned model")
    parser.add_argument("base", metavar="BASE", help="base model: local folder or Hub id")
    parser.add_argument("finetuned", metavar="FINETUNED", help="fine-tuned model: local folder or Hub id")
    parser.add_argument("output", metavar="OUT", help="folder of the new repository")
    add_pair(parser, method_names())
    parser.set_defaults(resumes=True)
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--distill", metavar="TEXT", help="text on which what is stored is trained towards the fine-tune's logits"
    )
    group.add_argument(
        "--steps", type=int,
        help=f"of that training, fewer if held-out text only gets worse (default: {DistillSettings.steps}); with "
        "--distill-blocks for each N layers",
    )  # fmt: skip
    group.add_argument(
        "--trains", choices=TRAINED, help=f"kept values too, or their scales alone (default: {DistillSettings.trains})"
    )
    group.add_argument(
        "--distill-batch-size",
        type=int,
        help=f"sequences a step, over all processes (default: {DistillSettings.batch_size})",
    )
    group.add_argument(
        "--distill-blocks", type=int, metavar="N", help="train N decoder layers at a time, for models that do not fit"
    )
    add_training_fields(group)


def add_method(
    parser: argparse.ArgumentParser,
    methods: Sequence[str],
    searched: Sequence[str] = (),
    default: str | None = DEFAULT_METHOD,
) -> None:
    """A method and its settings, but for those that the command searches itself."""
    parser.add_argument("--method", choices=methods, default=default, help=f"default: {default or 'a dense model'}")
    parser.add_argument("--ratio", type=float, help="checkpoint bytes over repository bytes (default: 32)")
    parser.add_argument(
        "--max-bytes", metavar="SIZE", help="most that the repository may take, such as 500MB, instead of --ratio"
    )
    if "seed" not in searched:
        parser.add_argument("--seed", type=int, help="seed of the masks (default: 0)")
    parser.add_argument(
        "--embeddings",
        choices=("lowrank", "method"),
        help="how embeddings are compressed: by their leading components, or as all else (default: method for "
        "impart-rd, lowrank for the others)",
    )
    for name, fields, all_owners in method_fields():
        defaults = {owner: field.default for owner, field in zip(all_owners, fields, strict=True) if owner in methods}
        if defaults and name not in searched:
            help = f"{_SETTINGS.get(name, name)}; for {', '.join(defaults)} (default: {_default(defaults)})"
            parser.add_argument(f"--{name.replace('_', '-')}", help=help)


def add_pair(
    parser: argparse.ArgumentParser,
    methods: Sequence[str],
    searched: Sequence[str] = (),
    default: str = DEFAULT_METHOD,
) -> None:
    """What every command takes that compresses a pair, beside the pair."""
    add_method(parser, methods, searched, default)
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="text for the methods that quantise: a .txt, .json or .jsonl file, a folder of such or the name of "
        "a data set; without it they round, impart-rd against inputs guessed from the delta",
    )
    parser.add_argument(
        "--calibration-samples",
        type=int,
        help="sequences of that text, and of --distill, at most (default: 128)",
    )
    parser.add_argument(
        "--calibration-length",
        type=int,
        help="tokens of a sequence (default: 2048, or as many as the model has positions)",
    )
    parser.add_argument("--device", default="cpu", help="where matrices are decomposed (default: cpu)")
    parser.add_argument("--revision", help="branch, tag or commit of the fine-tuned model")
    parser.add_argument("--base-revision", help="branch, tag or commit of the base model")
    add_result(parser)


def add_result(parser: argparse.ArgumentParser) -> None:
    """What becomes of the repository that a command makes."""
    parser.add_argument("--base-name", help="Hub id to record for a base that was given as a local folder")
    parser.add_argument("--max-shard-size", default="5GB", help="split larger weight files (default: 5GB)")
    add_push(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _default(defaults: dict[str, Any]) -> str:
    """A setting's defaults by method: the first one's, and those of others where they differ."""
    texts = {m: ",".join(map(str, d)) if isinstance(d, tuple) else str(d) for m, d in defaults.items()}
    usual = next(iter(texts.values()))
    return ", ".join([usual, *(f"{text} for {method}" for method, text in texts.items() if text != usual)])


def method_config(options: argparse.Namespace) -> MethodConfig:
    """The method that the command line asks for.

    Raises:
        ValueError: if a setting is out of range, or belongs to another method.
    """
    if options.max_bytes is not None and options.ratio is not None:
        raise ValueError("give --ratio or --max-bytes, not both")
    chosen = method_class(options.method)
    owners = {name: methods for name, _, methods in method_fields()}
    settings = given_settings(options)
    for name in [name for name in settings if name in owners]:
        if options.method not in owners[name]:
            raise ValueError(f"{option_of(name)} belongs to {', '.join(owners[name])}, not to {options.method}")
        settings[name] = parse_setting(chosen, name, settings[name])
    return chosen(**settings)


def option_of(setting: str) -> str:
    """The option that gives a setting."""
    return "--" + _OPTIONS.get(setting, setting).replace("_", "-")


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a method that the command line gives, by name, as they stand there."""
    return _given(options, [*_SHARED_SETTINGS, *(name for name, _, _ in method_fields())])


def _given(options: argparse.Namespace, settings: Iterable[str]) -> dict[str, Any]:
    """Of some settings, those that the command line gives."""
    given = {name: getattr(options, _OPTIONS.get(name, name), None) for name in settings}
    return {name: value for name, value in given.items() if value is not None}


def check_push(options: argparse.Namespace, base: str) -> None:
    """See that a delta repository that is to be published names a base that others have.

    Raises:
        ValueError: if it does not.
    """
    if options.push and Path(base).is_dir() and not options.base_name:
        raise ValueError("--push needs --base-name, the Hub id of the base: others do not have your local folder")


def pair_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that `compress` and `tune` share."""
    check_push(options, options.base)
    texts = _given(options, ("calibration_samples", "calibration_length"))
    if texts and options.calibration is None and getattr(options, "distill", None) is None:
        raise ValueError(f"{option_of(next(iter(texts)))} is of a text, but none is given (--calibration, --distill)")
    return {
        "max_bytes": options.max_bytes,
        "calibration": options.calibration,
        **texts,
        "device": options.device,
        "base_revision": options.base_revision,
        "finetuned_revision": options.revision,
        "base_name": options.base_name,
        "max_shard_size": options.max_shard_size,
        "progress": not options.quiet,
    }


def _compress(options: argparse.Namespace) -> None:
    method, shared = method_config(options), pair_options(options)
    report = compress(
        options.base,
        options.finetuned,
        options.output,
        method,
        distill=options.distill,
        distill_settings=_distill_settings(options),
        **shared,
    )
    if is_first():
        print(json.dumps(report.to_dict(), indent=2) if options.json else summary(report, options.output))
        push_if_asked(options)


def _distill_settings(options: argparse.Namespace) -> DistillSettings | None:
    given = _given(options, ("steps", "trains", "batch_size", "blocks"))
    if (training := training_fields(options)) is not None:
        given["training"] = training
    if given and options.distill is None:
        raise ValueError(f"{', '.join(map(option_of, given))}: for distillation, which needs --distill TEXT")
    return DistillSettings(**given) if given else None


def _best_step(distilled: DistillReport) -> str:
    if not distilled.best_step:
        return f"none of {distilled.steps} steps did better, nothing was changed"
    return f"best of {distilled.steps} steps: {distilled.best_step}"


def summary(report: CompressionReport, output: str) -> str:
    """What a user should know of a compression."""
    lines = [
        f"{output}: {human_bytes(report.repository_bytes)} instead of {human_bytes(report.checkpoint_bytes)}, "
        f"ratio {report.ratio:.2f} (requested {report.requested_ratio:g}), in {report.seconds:.0f} s",
        f"{len(report.tensors)} tensors changed, {report.equal_tensors} equal to the base's; not counted: tokenizer "
        f"and other unchanged files {human_bytes(report.sidecar_bytes)}, reader {human_bytes(report.reader_bytes)}",
    ]
    if not report.tensors:
        lines.append("the fine-tuned model equals the base: are BASE and FINETUNED the right ones?")
    calibration, _, instead = report.method.get("calibration", "").partition(": ")
    if calibration == "none":
        lines.append(f"{instead}, as no calibration text was given (--calibration FILE)")
    if report.distilled:
        lines.append(
            f"distilled: KL to the fine-tune on held-out text {report.distilled.before:.4f} before, "
            f"{report.distilled.after:.4f} after, nats per token; {_best_step(report.distilled)}"
        )
    if report.shortfall:
        lines.append(f"ratio missed: {report.shortfall}")
    noted = [(t.name, note) for t in report.tensors for note in t.notes]
    if noted:
        lines.append(f"notes on {len(noted)} tensors (--json has all), the first: {noted[0][0]}: {noted[0][1]}")
    return "\n".join(lines)
