"""The command `impart-hf prune layers`."""

import argparse

from ..options import add_flag, given, numbers, refuse
from .options import REPORT_FOLDER, add_pruning, check_pruning, finish, pruning_arguments


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_pruning(parser)
    choices = parser.add_mutually_exclusive_group(required=True)
    choices.add_argument("--drop", type=int, help="number of layers to drop")
    choices.add_argument("--ratio", type=float, help="share of the decoder layers' parameters to drop, between 0 and 1")
    choices.add_argument(
        "--layers", type=numbers(int), help="numbers of the layers to drop, comma-separated, counted from 0"
    )
    add_flag(parser, "--no-merge", "drop layers without merging them into kept ones")
    add_flag(parser, "--no-protect", "allow the first and the last layer to be dropped")


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_pruning(options)
    if options.layers is not None:
        refuse(options, ["score"], "chooses layers, but --layers names them; use --drop or --ratio instead")
    if not _needs_report(options):
        reason = "has no effect if --layers are named and not merged; remove --no-merge"
        refuse(options, ["importance"], reason)


def run(options: argparse.Namespace) -> None:
    """Drop layers, and print the report."""
    from ...pruning import prune_layers

    report = prune_layers(
        options.model,
        options.output,
        options.importance or (REPORT_FOLDER if _needs_report(options) else None),
        merge=not options.no_merge,
        protect=not options.no_protect,
        **given(options, "drop", "layers"),
        **pruning_arguments(options),
    )
    merged = ", ".join(f"{a} into {b}" for a, b in report.step["merged_into"].items())
    finish(
        options, report, [f"dropped layers: {', '.join(map(str, report.step['removed']))}; merged: {merged or 'none'}"]
    )


def _needs_report(options: argparse.Namespace) -> bool:
    """Return whether layers are chosen or merged by their importance."""
    return options.layers is None or not options.no_merge
