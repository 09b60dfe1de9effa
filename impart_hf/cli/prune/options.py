"""Options that several pruning commands have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pruning.choices import SCORES
from ..options import (
    add_base_name,
    add_device,
    add_json,
    add_publishing,
    add_quiet,
    add_revision,
    add_shard_size,
    add_text_field,
    add_training_file,
    check_publishing,
    check_revision,
    given,
    push_if_asked,
    refuse,
    training_fields,
)

if TYPE_CHECKING:
    from ...pruning import PruningReport

REPORT_FOLDER = "importance"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model that a command reads, and the options for its report."""
    parser.add_argument("model", metavar="MODEL", help="model of a family that can be pruned: local folder or Hub id")
    add_revision(parser)
    add_json(parser)
    add_quiet(parser)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that trains."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="TEXT",
        help="text to train on: a .txt file, a .json, .jsonl or .parquet file of records, a folder or the name of a "
        "data set on the Hub",
    )
    add_text_field(parser)
    parser.add_argument("--batch-size", type=int, help="sequences per step, over all processes (default: 4)")
    parser.add_argument(
        "--length", type=int, help="tokens per sequence, at most the model's number of positions (default: 512)"
    )
    parser.add_argument("--rank", type=int, help="rank of the LoRA adapters (default: 8)")
    parser.add_argument("--alpha", type=int, help="alpha of the LoRA adapters (default: 32)")
    parser.add_argument("--seed", type=int, help="seed for the adapters and the order of the text (default: 0)")
    add_training_file(parser)
    add_device(parser, "to train", "an accelerator, if there is one")


def training_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the functions that train."""
    return {
        **given(options, "batch_size", "length", "rank", "alpha", "seed", "steps", "learning_rate"),
        **given(options, "device", "revision"),
        **training_fields(options),
        "progress": not options.quiet,
    }


def add_pruning(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that removes layers, heads or channels."""
    add_model(parser)
    parser.add_argument("output", metavar="OUT", help="folder to write the pruned model to")
    parser.add_argument(
        "--importance",
        metavar="DIR",
        help=f"folder of the importance report on MODEL (default: {REPORT_FOLDER}, if it is needed)",
    )
    parser.add_argument(
        "--score",
        type=lambda name: name.replace("-", "_"),
        choices=SCORES,
        metavar="{igia,gradient-norm}",
        help="score by which layers, heads and channels are chosen (default: igia)",
    )
    add_base_name(parser, "a model")
    add_shard_size(parser)
    add_publishing(parser)


def check_pruning(options: argparse.Namespace) -> None:
    """Check the options of `add_pruning`."""
    check_revision(options, options.model)
    check_publishing(options)
    if _records_its_base(options.model):
        refuse(
            options, ["base_name"], f"'{options.model}' is already pruned and records its base; give an unpruned model"
        )


def _records_its_base(model: str) -> bool:
    """Return whether a model is a local folder with a pruning history; a damaged config.json is reported later."""
    try:
        config = json.loads(Path(model, "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and isinstance(config.get("pruning"), dict)


def pruning_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that `prune_layers` and `prune_width` share."""
    return {
        **given(options, "ratio", "score", "revision", "base_name", "max_shard_size"),
        "progress": not options.quiet,
    }


def finish(options: argparse.Namespace, report: PruningReport, lines: Sequence[str]) -> None:
    """Print the report of a pruning step, and publish its result if --push is given."""
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        share = 1 - report.decoder_after / report.decoder_before
        print(
            f"{options.output}: {report.parameters_after:,} parameters instead of {report.parameters_before:,}; "
            f"{share:.1%} of the decoder layers' parameters removed"
        )
        print("\n".join([*lines, *report.notes]))
    push_if_asked(options)
