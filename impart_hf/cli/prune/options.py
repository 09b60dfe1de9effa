"""Options that several of the pruning commands have."""

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
    """The model that a command reads, and how it reports."""
    parser.add_argument("model", metavar="MODEL", help="LLaMA-shaped model: local folder or Hub id")
    add_revision(parser)
    add_json(parser)
    add_quiet(parser)


def add_training(parser: argparse.ArgumentParser) -> None:
    """The options of a command that trains."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="TEXT",
        help="text to train on: a .txt file, a .json or .jsonl file of records (text, prompt and completion, or "
        "messages), a folder or the name of a data set",
    )
    parser.add_argument("--batch-size", type=int, help="sequences a step, over all processes (default: 4)")
    parser.add_argument("--length", type=int, help="their tokens, no more than the model has positions (default: 512)")
    parser.add_argument("--rank", type=int, help="rank of the LoRA adapters (default: 8)")
    parser.add_argument("--alpha", type=int, help="alpha of the LoRA adapters (default: 32)")
    parser.add_argument("--seed", type=int, help="of adapters and the order of the text (default: 0)")
    add_training_file(parser)
    add_device(parser, "to train", "an accelerator, if there is one")


def training_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the functions that train."""
    return {
        **given(options, "batch_size", "length", "rank", "alpha", "seed", "steps", "learning_rate"),
        **given(options, "device", "revision"),
        **training_fields(options),
        "progress": not options.quiet,
    }


def add_pruning(parser: argparse.ArgumentParser) -> None:
    """The options of a command that removes something."""
    add_model(parser)
    parser.add_argument("output", metavar="OUT", help="folder of the pruned model")
    parser.add_argument(
        "--importance", metavar="DIR", help=f"report on MODEL (default: {REPORT_FOLDER}, where it is needed)"
    )
    parser.add_argument(
        "--score",
        type=lambda name: name.replace("-", "_"),
        choices=SCORES,
        metavar="{igia,gradient-norm}",
        help="of layers, heads and channels (default: igia)",
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
            options, ["base_name"], f"'{options.model}' was pruned before and records its base; give the first model"
        )


def _records_its_base(model: str) -> bool:
    """Whether a model is a local folder that an earlier step of pruning made. What is wrong with it shows later."""
    try:
        config = json.loads(Path(model, "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and isinstance(config.get("pruning"), dict)


def pruning_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that both functions that remove something have."""
    return {
        **given(options, "ratio", "score", "revision", "base_name", "max_shard_size"),
        "progress": not options.quiet,
    }


def finish(options: argparse.Namespace, report: PruningReport, lines: Sequence[str]) -> None:
    """Print what a step did, and publish its result if that is wanted."""
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
