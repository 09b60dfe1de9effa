"""The command `impart-hf tune`."""

import argparse
import json

from ..methods import method_class, method_names
from ..methods.importance_allocation import BETAS, CS, ImportanceAllocation
from .method_options import add_pair, calibration_text, check_pair, commands_after, method_config, pair_arguments
from .options import (
    add_device,
    add_limit,
    add_result,
    add_text_size,
    check_text_and_task,
    check_text_field,
    given,
    listed,
    numbers,
    push_if_asked,
    refuse,
    with_text_field,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    methods = [name for name in method_names() if issubclass(method_class(name), ImportanceAllocation)]
    add_pair(parser, methods, default="impart", searched=("beta", "c", "seed"))
    add_device(parser, "matrices are decomposed and models are evaluated")
    add_result(parser)
    group = parser.add_argument_group("search")
    group.add_argument(
        "--validation",
        metavar="TEXT",
        action="append",
        help="validation text: judge by KL(fine-tune || candidate) on it; give either this or --task",
    )
    group.add_argument("--task", help="judge by the first metric of this lm-eval task, or of a task's YAML file")
    add_limit(group)
    add_text_size(group, "the validation text")
    for option, kind, default in (("--betas", float, BETAS), ("--cs", float, CS), ("--seeds", int, (0,))):
        group.add_argument(
            option, type=numbers(kind), help=f"values to try, comma-separated (default: {listed(default)})"
        )


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_pair(options)
    if len(options.validation or []) + (options.task is not None) != 1:
        raise ValueError("give one --validation text or one --task to judge by")
    check_text_and_task(options, "validation")
    check_text_field(options, calibration_text(options), *(options.validation or []))
    if calibration_text(options) is None:
        refuse(options, ["calibration_samples", "calibration_length"], "needs a text; add --calibration TEXT")


def run(options: argparse.Namespace) -> None:
    """Search, and print the report."""
    from ..compression.tune import tune
    from .summaries import compression_summary

    found = tune(
        options.base,
        options.finetuned,
        options.output,
        method_config(options),
        validation=with_text_field(options, options.validation[0]) if options.validation else None,
        **given(options, "task", "limit", "betas", "cs", "seeds", "samples", "length", "batch_size"),
        **pair_arguments(options),
    )
    commands = commands_after(options)
    if options.json:
        print(json.dumps({**found.to_dict(), "next": commands}, indent=2))
    else:
        print(f"{found.table()}\n\n{compression_summary(found.report, options.output, commands=commands)}")
    push_if_asked(options)
