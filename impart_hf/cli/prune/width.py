"""The command `impart-hf prune width`."""

import argparse

from ...pruning.choices import PARTS
from ..options import (
    add_calibration,
    add_device,
    add_flag,
    add_text_field,
    check_text_field,
    given,
    given_texts,
    listed,
    refuse,
)
from .options import REPORT_FOLDER, add_pruning, check_pruning, finish, pruning_arguments


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_pruning(parser)
    parser.add_argument(
        "--ratio", type=float, required=True, help="share of the decoder layers' parameters to remove, between 0 and 1"
    )
    parser.add_argument(
        "--exponent",
        type=float,
        help="layers of score s lose a share proportional to s^-exponent; 0: all lose the same share (default: 0.5)",
    )
    parser.add_argument("--parts", help=f"parts to prune: attention, mlp or both (default: {listed(PARTS)})")
    parser.add_argument("--multiple-of", type=int, help="keep a multiple of this number of channels (default: 1)")
    add_flag(parser, "--query-heads", "remove query heads of every KV group, instead of whole groups")
    add_calibration(parser, "calibration text on which o_proj and down_proj are corrected by least squares")
    add_text_field(parser)
    add_device(parser, "the correction is computed")


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_pruning(options)
    check_text_field(options, options.calibration)
    parts = _parts(options)
    if "mlp" not in parts:
        refuse(options, ["multiple_of"], "is for channels, which --parts leaves unchanged; add mlp to --parts")
    if "attention" not in parts:
        refuse(options, ["query_heads"], "is for heads, which --parts leaves unchanged; add attention to --parts")
    if options.calibration is None:
        names = ["calibration_samples", "calibration_length", "device"]
        refuse(options, names, "is for the correction, which needs a text; add --calibration TEXT")


def run(options: argparse.Namespace) -> None:
    """Remove heads and channels, and print the report."""
    from ...pruning import prune_width

    report = prune_width(
        options.model,
        options.output,
        options.importance or REPORT_FOLDER,
        parts=_parts(options),
        **given(options, "exponent", "multiple_of", "query_heads"),
        **given_texts(options, "calibration"),
        **given(options, "calibration_samples", "calibration_length", "device"),
        **pruning_arguments(options),
    )
    lost = {"query heads": "heads_removed", "KV heads": "key_value_heads_removed", "channels": "channels_removed"}
    lines = [
        f"{what} removed by layer: {' '.join(map(str, report.step[key]))}"
        for what, key in lost.items()
        if any(report.step[key])
    ]
    finish(options, report, lines)


def _parts(options: argparse.Namespace) -> list[str]:
    """Return the parts of a layer that are pruned."""
    return list(PARTS) if options.parts is None else [part.strip() for part in options.parts.split(",")]
