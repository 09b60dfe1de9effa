"""The command `impart-hf compress`."""

import argparse
import json
from typing import Any

from ..compression.target import QualityTarget
from ..distillation import OPTIMIZERS, TRAINED, DistillSettings
from ..methods import ExactConfig, MethodConfig, method_names
from .method_options import (
    add_pair,
    calibration_text,
    check_pair,
    chosen_method,
    commands_after,
    given_settings,
    pair_arguments,
)
from .options import (
    add_card_plot_option,
    add_device,
    add_flag,
    add_result,
    add_text_size,
    add_training_file,
    check_models,
    check_text_field,
    given,
    given_texts,
    push_if_asked,
    refuse,
    training_fields,
    with_text_field,
)

_DISTILLATION = (
    "steps",
    "trains",
    "distill_batch_size",
    "distill_micro_batch_size",
    "distill_blocks",
    "distill_optim",
    "gradient_checkpointing",
    "training",
)
_TEXT_SIZE = ("calibration_samples", "calibration_length")
_LIMITS = ("max_kl", "max_loss_increase")
_VALIDATION = ("validation", "samples", "length", "batch_size")
# What has no effect on a forecast.
_WRITTEN = ("push", "private", "quiet", "card_plot")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.set_defaults(resumes=True, shares_work=True)
    add_pair(parser, [*method_names(), ExactConfig.name], of_what="that text, and of the --distill text")
    parser.add_argument(
        "--exact",
        action="append",
        metavar="NAME",
        help="tensors to store exactly beside any method, with wildcards: '*.router.weight'; repeatable",
    )
    add_device(parser, "matrices are decomposed")
    add_result(parser)
    add_card_plot_option(parser)
    add_flag(
        parser,
        "--dry-run",
        "write nothing, and print what the run will take: time by stage, memory, disk, bytes of the result",
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="with --dry-run: number of processes of the job that is forecast (default: those of this one)",
    )
    group = parser.add_argument_group("a target instead of a ratio")
    group.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="write the smallest repository whose KL(fine-tune || delta) on the --validation text, nats/token, is at "
        "most this; about five ratios are tried",
    )
    group.add_argument(
        "--max-loss-increase",
        metavar="LIMIT",
        help="the same for the text's cross-entropy: nats/token above the fine-tune's, or percent of it, such as 0.5%%",
    )
    group.add_argument("--validation", metavar="TEXT", help="text on which the target is kept")
    add_text_size(group, "the validation text")
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--distill", metavar="TEXT", help="text on which the stored values are trained towards the fine-tune's logits"
    )
    group.add_argument(
        "--steps",
        type=int,
        help=f"distillation steps, fewer if the loss on held-out text keeps rising (default: {DistillSettings.steps}); "
        "with --distill-blocks, steps for each N layers",
    )
    group.add_argument(
        "--trains",
        choices=TRAINED,
        help=f"train the kept values and their scales, or the scales alone (default: {DistillSettings.trains})",
    )
    group.add_argument(
        "--distill-batch-size",
        type=int,
        help=f"sequences per step, over all processes (default: {DistillSettings.batch_size})",
    )
    group.add_argument(
        "--distill-micro-batch-size",
        type=int,
        help="sequences that a process runs at a time (default: as many as fit in memory)",
    )
    group.add_argument(
        "--distill-blocks",
        type=int,
        metavar="N",
        help="train N decoder layers at a time, for models that do not fit into memory",
    )
    group.add_argument(
        "--distill-optim",
        choices=tuple(OPTIMIZERS),
        help=f"optimizer, by transformers' name; the second needs bitsandbytes (default: {DistillSettings.optim})",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="run layers again in the backward pass, to save memory (default: if activations would not fit)",
    )
    add_training_file(group)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    if options.method == ExactConfig.name:
        _check_exact(options)
        return
    method = check_pair(options)
    if options.dry_run:
        refuse(options, _WRITTEN, "has no effect on a forecast; leave out --dry-run")
    else:
        refuse(options, ["processes"], "is for forecasts; add --dry-run")
    _check_target(options)
    check_text_field(options, calibration_text(options), options.distill, options.validation)
    if options.distill is None:
        refuse(options, _DISTILLATION, "for distillation, which needs a text; add --distill TEXT")
        if options.calibration == "none" or (options.calibration is None and not method.shares_budget):
            refuse(options, _TEXT_SIZE, "needs a text; add --calibration TEXT or --distill TEXT")
    _distill_settings(options, {})


def _check_exact(options: argparse.Namespace) -> None:
    """Refuse what has no effect on a delta that is stored exactly."""
    check_models(options)
    chosen_method(options)
    refuse(options, ["exact"], "names tensors beside another method; choose another --method")
    lossy = [*_LIMITS, *_VALIDATION, "calibration", "distill", *_DISTILLATION, *_TEXT_SIZE, "text_field"]
    refuse(options, lossy, "exact stores every change, whatever size that has; choose another --method")
    refuse(options, ["dry_run", "processes"], "the size of an exact delta is known when it is stored; run it")


def _check_target(options: argparse.Namespace) -> None:
    """Refuse a target that is incomplete, or that something else replaces."""
    if not given(options, *_LIMITS):
        refuse(options, _VALIDATION, "is for a target; add --max-kl or --max-loss-increase")
        return
    if "ratio" in given_settings(options):
        raise ValueError("give --ratio or a target (--max-kl, --max-loss-increase), not both")
    refuse(options, ["max_bytes"], "a target (--max-kl, --max-loss-increase) decides the size; leave out the target")
    if options.dry_run:
        refuse(options, _LIMITS, "a search tries several ratios, about five; forecast one of them with --ratio")
    if options.validation is None:
        refuse(options, _LIMITS, "is kept on a text; add --validation TEXT")
    _target(options, options.validation)


def _target(options: argparse.Namespace, validation: Any) -> QualityTarget:
    """Return the target that the options ask for, on a text."""
    sizes = given(options, "samples", "length", "batch_size")
    return QualityTarget(validation, options.max_kl, options.max_loss_increase, **sizes)


def run(options: argparse.Namespace) -> None:
    """Compress, and print the report; or print a forecast."""
    from ..common.processes import is_first
    from ..compression.compress import compress
    from ..repository.card_plot import add_card_plot
    from ..repository.plot import new_figure
    from .summaries import compression_summary

    method, arguments = chosen_method(options), pair_arguments(options)
    arguments |= given_texts(options, "distill")
    arguments["distill_settings"] = _distill_settings(options, training_fields(options))
    if options.dry_run:
        _print_forecast(options, method, arguments)
        return
    if options.card_plot:
        new_figure(1, 1)  # without matplotlib an error, before any work
    target = None if options.validation is None else _target(options, with_text_field(options, options.validation))
    report = compress(
        options.base, options.finetuned, options.output, method, exact=options.exact or (), target=target, **arguments
    )
    if is_first():
        if options.card_plot:
            add_card_plot(options.output)
        commands = commands_after(options)
        if options.json:
            print(json.dumps({**report.to_dict(), "next": commands}, indent=2))
        else:
            print(compression_summary(report, options.output, commands=commands))
        push_if_asked(options)


def _print_forecast(options: argparse.Namespace, method: MethodConfig | ExactConfig, arguments: dict[str, Any]) -> None:
    from ..common.processes import is_first
    from ..compression.forecast import forecast

    del arguments["progress"]
    found = forecast(
        options.base, options.finetuned, method,
        output_dir=options.output, process_count=options.processes, **arguments,
    )  # fmt: skip
    if is_first():
        print(json.dumps(found.to_dict(), indent=2) if options.json else found)


def _distill_settings(options: argparse.Namespace, training: dict[str, Any]) -> DistillSettings | None:
    """Return the settings of distillation; None for the defaults."""
    found = given(options, "steps", "trains", "gradient_checkpointing") | training
    for name in ("batch_size", "micro_batch_size", "blocks", "optim"):
        if (value := getattr(options, f"distill_{name}")) is not None:
            found[name] = value
    return DistillSettings(**found) if found else None
