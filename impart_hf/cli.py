"""The command `impart-hf`."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from . import hub
from .cli_command import add_push, add_reading, add_repository, command, numbers, push_if_asked
from .cli_evaluate import add_evaluate
from .cli_export import add_export_lora
from .cli_prune import add_prune
from .compress import compress, usable_device
from .distillation import DistillSettings
from .inspection import Inspection
from .methods import MethodConfig, method_class, method_fields, method_names, parse_setting
from .modeling.checkpoints import HubOptions
from .progress import Progress
from .reconstruct import open_repository, reconstruct, verify
from .report import CompressionReport, human_bytes
from .tune import BETAS, CS, tune

_SETTINGS = {
    "beta": "share of the singular components pruned beforehand, in [0, 1)",
    "c": "exponent of a component's importance, above 0",
    "value_dtype": "storage of kept values, float16 or bfloat16",
    "bits": "bits of a value in each group of components, comma-separated, 2 to 8",
    "groups": "components in each group but the last, comma-separated",
    "value_bits": "bits of a kept value, 2 to 8",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 with one line on standard error."""
    options = build_parser().parse_args(arguments)
    logging.disable_progress_bar()  # transformers' own, for every model that is loaded
    # PEFT imports it, and it complains of kernels that nothing here uses.
    getLogger("bitsandbytes").setLevel(ERROR)
    try:
        options.command(options)
    except KeyboardInterrupt:
        print("impart-hf: stopped; `compress`, run again, goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, OSError, ModuleNotFoundError, HfHubHTTPError) as error:
        print(f"impart-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="impart-hf",
        description="Keep fine-tuned language models as small compressed deltas against their base, and prune LLaMA.",
    )
    parser.add_argument("--version", action="version", version=f"impart-hf {version('impart-hf')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_compress(commands)
    _add_tune(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_reconstruct(commands)
    add_export_lora(commands)
    _add_push(commands)
    add_prune(commands)
    add_evaluate(commands)
    return parser


def _add_compress(commands: Any) -> None:
    parser = command(commands, "compress", _compress, "make a delta repository of a fine-tuned model")
    _add_pair(parser, method_names())
    parser.add_argument(
        "--distill", metavar="TEXT", help="text on which scales are trained towards the fine-tune's logits"
    )
    parser.add_argument("--distill-steps", type=int, help=f"of that training (default: {DistillSettings.steps})")


def _add_pair(parser: argparse.ArgumentParser, methods: Sequence[str], searched: Sequence[str] = ()) -> None:
    """What every command that compresses a pair takes, but for the settings that it searches itself."""
    parser.add_argument("base", metavar="BASE", help="base model: local folder or Hub id")
    parser.add_argument("finetuned", metavar="FINETUNED", help="fine-tuned model: local folder or Hub id")
    parser.add_argument("output", metavar="OUT", help="folder of the new repository")
    parser.add_argument("--method", choices=methods, default="impart", help="default: impart")
    parser.add_argument(
        "--ratio", type=float, default=32.0, help="checkpoint bytes over repository bytes (default: 32)"
    )
    if "seed" not in searched:
        parser.add_argument("--seed", type=int, default=0, help="seed of the masks (default: 0)")
    parser.add_argument("--embeddings", choices=("lowrank", "method"), help="how embeddings are compressed")
    for name, fields, all_owners in method_fields():
        defaults = {owner: field.default for owner, field in zip(all_owners, fields, strict=True) if owner in methods}
        if defaults and name not in searched:
            help = f"{_SETTINGS.get(name, name)}; for {', '.join(defaults)} (default: {_default(defaults)})"
            parser.add_argument(f"--{name.replace('_', '-')}", help=help)
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="text for the methods that quantise: a .txt, .json or .jsonl file, a folder or the name of a data "
        "set; without it they round",
    )
    parser.add_argument(
        "--calibration-samples", type=int, default=128, help="sequences of any such text, at most (default: 128)"
    )
    parser.add_argument(
        "--calibration-length",
        type=int,
        default=2048,
        help="tokens of a sequence (default: 2048, or as many as the model has positions)",
    )
    parser.add_argument("--device", default="cpu", help="where matrices are decomposed (default: cpu)")
    parser.add_argument("--revision", help="branch, tag or commit of the fine-tuned model")
    parser.add_argument("--base-revision", help="branch, tag or commit of the base model")
    parser.add_argument("--base-name", help="Hub id to record for a base that was given as a local folder")
    parser.add_argument("--max-shard-size", default="5GB", help="split larger delta files (default: 5GB)")
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
    chosen = method_class(options.method)
    settings: dict[str, Any] = {"compression_ratio": options.ratio}
    for name in ("seed", "embeddings"):
        if getattr(options, name, None) is not None:
            settings[name] = getattr(options, name)
    for name, _, methods in method_fields():
        value = getattr(options, name, None)
        if value is None:
            continue
        if options.method not in methods:
            raise ValueError(f"--{name.replace('_', '-')} belongs to {', '.join(methods)}, not to {options.method}")
        settings[name] = parse_setting(chosen, name, value)
    return chosen(**settings)


def _pair_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that `compress` and `tune` share."""
    if options.push and Path(options.base).is_dir() and not options.base_name:
        raise ValueError("--push needs --base-name, the Hub id of the base: others do not have your local folder")
    return {
        "calibration": options.calibration,
        "calibration_samples": options.calibration_samples,
        "calibration_length": options.calibration_length,
        "device": options.device,
        "base_revision": options.base_revision,
        "finetuned_revision": options.revision,
        "base_name": options.base_name,
        "max_shard_size": options.max_shard_size,
        "progress": not options.quiet,
    }


def _compress(options: argparse.Namespace) -> None:
    method, shared = method_config(options), _pair_options(options)
    report = compress(
        options.base,
        options.finetuned,
        options.output,
        method,
        distill=options.distill,
        distill_steps=options.distill_steps,
        **shared,
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else _summary(report, options.output))
    push_if_asked(options)


def _add_tune(commands: Any) -> None:
    parser = command(commands, "tune", _tune, "compress with the beta, C and seed that do best on a text or task")
    _add_pair(parser, ("impart", "impart-qt"), searched=("beta", "c", "seed"))
    judges = parser.add_mutually_exclusive_group(required=True)
    judges.add_argument("--validation", metavar="TEXT", help="judge by KL(fine-tune || candidate) on this text")
    judges.add_argument("--task", help="judge by the first metric of this lm-eval task, or of a task's YAML file")
    parser.add_argument("--betas", type=numbers(float), default=BETAS, help=f"default: {','.join(map(str, BETAS))}")
    parser.add_argument("--cs", type=numbers(float), default=CS, help=f"default: {','.join(map(str, CS))}")
    parser.add_argument("--seeds", type=numbers(int), default=(0,), help="default: 0")
    parser.add_argument("--samples", type=int, default=64, help="sequences of the validation text (default: 64)")
    parser.add_argument("--length", type=int, default=512, help="their tokens (default: 512)")
    parser.add_argument("--task-limit", type=int, help="examples of the task, at most")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences judged at a time (default: 8)")


def _tune(options: argparse.Namespace) -> None:
    found = tune(
        options.base,
        options.finetuned,
        options.output,
        method_config(options),
        validation=options.validation,
        task=options.task,
        betas=options.betas,
        cs=options.cs,
        seeds=options.seeds,
        samples=options.samples,
        length=options.length,
        task_limit=options.task_limit,
        batch_size=options.batch_size,
        **_pair_options(options),
    )
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.table())
    if not options.json:
        print("\n" + _summary(found.report, options.output))
    push_if_asked(options)


def _summary(report: CompressionReport, output: str) -> str:
    lines = [
        f"{output}: {human_bytes(report.repository_bytes)} instead of {human_bytes(report.checkpoint_bytes)}, "
        f"ratio {report.ratio:.2f} (requested {report.requested_ratio:g}), in {report.seconds:.0f} s",
        f"{len(report.tensors)} tensors changed, {report.equal_tensors} equal to the base's; not counted: tokenizer "
        f"and other unchanged files {human_bytes(report.companion_bytes)}, reader {human_bytes(report.reader_bytes)}",
    ]
    if not report.tensors:
        lines.append("the fine-tuned model equals the base: are BASE and FINETUNED the right ones?")
    if report.method.get("calibration", "").startswith("none"):
        lines.append("values were rounded to the nearest level: no calibration text was given (--calibration FILE)")
    if report.distilled:
        lines.append(
            f"distilled: KL to the fine-tune on held-out text {report.distilled.before:.4f} before, "
            f"{report.distilled.after:.4f} after, nats per token"
        )
    if report.shortfall:
        lines.append(f"ratio missed: {report.shortfall}")
    noted = [(t.name, note) for t in report.tensors for note in t.notes]
    if noted:
        lines.append(f"notes on {len(noted)} tensors (--json has all), the first: {noted[0][0]}: {noted[0][1]}")
    return "\n".join(lines)


def _add_inspect(commands: Any) -> None:
    parser = command(commands, "inspect", _inspect, "show what a delta repository holds, tensor by tensor")
    add_repository(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw spectra, keep ratios and bytes by layer")


def _inspect(options: argparse.Namespace) -> None:
    inspection = Inspection(options.repo, HubOptions(options.revision))
    if options.plot:
        inspection.plot(options.plot)
    print(json.dumps(inspection.to_dict(), indent=2) if options.json else inspection.table())


def _add_verify(commands: Any) -> None:
    parser = command(commands, "verify", _verify, "check a delta repository against its base, decoding every tensor")
    add_reading(parser)


def _verify(options: argparse.Namespace) -> None:
    repository = open_repository(options.repo, HubOptions(options.revision), options.base_model)
    verify(repository, Progress(not options.quiet))
    print(f"{options.repo}: {len(repository.names())} tensors are sound, the base is {repository.base.source}")


def _add_reconstruct(commands: Any) -> None:
    parser = command(commands, "reconstruct", _reconstruct, "write the dense fine-tuned checkpoint again")
    add_reading(parser)
    parser.add_argument("output", metavar="OUT", help="folder of the dense checkpoint")
    parser.add_argument("--device", default="cpu", help="where tensors are decoded (default: cpu)")
    parser.add_argument("--max-shard-size", default="5GB", help="split larger weight files (default: 5GB)")


def _reconstruct(options: argparse.Namespace) -> None:
    device = usable_device(options.device)
    repository = open_repository(options.repo, HubOptions(options.revision), options.base_model)
    reconstruct(
        repository,
        options.output,
        device=device,
        max_shard_size=options.max_shard_size,
        progress=Progress(not options.quiet),
    )
    print(f"{options.output}: the dense checkpoint of {options.repo}")


def _add_push(commands: Any) -> None:
    parser = command(commands, "push", _push, "upload a delta repository or pruned model to the Hub")
    parser.add_argument("folder", metavar="DIR", help="folder of a delta repository or pruned model")
    parser.add_argument("repo", metavar="REPO", help="Hub repository, created if missing")
    parser.add_argument("--revision", help="branch to push to, created if missing")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--message", help="commit message")


def _push(options: argparse.Namespace) -> None:
    print(
        hub.push(
            options.folder,
            options.repo,
            private=options.private,
            revision=options.revision,
            commit_message=options.message,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
