"""The command `impart-hf tune-merge`."""

import argparse
import json

from ..merging.config import MergeConfig
from ..merging.grids import DENSITIES, LAMBDAS, TRIMS
from .options import (
    add_device,
    add_json,
    add_merge_config,
    add_quiet,
    add_shard_size,
    add_text_field,
    add_text_size,
    check_text_field,
    given,
    listed,
    numbers,
    refuse,
    with_text_field,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_merge_config(parser)
    parser.add_argument(
        "--validation",
        metavar="TASK=TEXT",
        action="append",
        required=True,
        help="a task and its validation text, once for each task; candidates are judged by the mean cross-entropy",
    )
    add_text_size(parser, "each text")
    add_text_field(parser)
    for option, default, help in (
        ("--lambdas", LAMBDAS, "factors of the merged delta"),
        ("--trims", TRIMS, "shares of each delta that TIES keeps"),
        ("--densities", DENSITIES, "shares of each delta that DARE or ImPart keep"),
    ):
        parser.add_argument(option, type=numbers(float), help=f"{help}, comma-separated (default: {listed(default)})")
    add_device(parser, "tensors are combined and decomposed, and models are evaluated")
    add_shard_size(parser)
    add_json(parser)
    add_quiet(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined, or that the merge method has no use for."""
    check_text_field(options, *_texts(options).values())
    config = MergeConfig.from_yaml(options.config)
    for option, used in (("trims", config.method.consensus), ("densities", config.method.sparsifier is not None)):
        if not used:
            refuse(options, [option], f"{config.merge_method} has no use for {option}; choose another merge_method")


def run(options: argparse.Namespace) -> None:
    """Search, and print the report."""
    from ..merging.search import tune_merge
    from .summaries import merge_summary

    found = tune_merge(
        MergeConfig.from_yaml(options.config),
        options.output,
        {task: with_text_field(options, text) for task, text in _texts(options).items()},
        progress=not options.quiet,
        **given(options, "lambdas", "trims", "densities", "samples", "length", "batch_size"),
        **given(options, "device", "max_shard_size"),
    )
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.table())
    if not options.json:
        print("\n" + merge_summary(found.report, options.output))


def _texts(options: argparse.Namespace) -> dict[str, str]:
    """Return the validation texts by task."""
    texts: dict[str, str] = {}
    for entry in options.validation:
        task, equals, text = entry.partition("=")
        if not (task and equals and text) or task in texts:
            raise ValueError(f"--validation must be TASK=TEXT, once for each task, got '{entry}'")
        texts[task] = text
    return texts
