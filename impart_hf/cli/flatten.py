"""The command `impart-hf flatten`."""

import argparse
import json

from .options import (
    add_base_model,
    add_repository,
    add_result,
    check_publishing,
    check_revision,
    given,
    push_if_asked,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.set_defaults(resumes=True, shares_work=True)
    add_repository(parser)
    parser.add_argument("output", metavar="OUT", help="folder to write the delta repository to")
    add_base_model(parser)
    add_result(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_revision(options, options.repo)
    check_publishing(options)


def run(options: argparse.Namespace) -> None:
    """Write the delta against the first base, and print the report."""
    from ..common.processes import is_first
    from ..compression.flatten import flatten
    from .summaries import compression_summary

    report = flatten(
        options.repo,
        options.output,
        progress=not options.quiet,
        **given(options, "base_model", "base_name", "revision", "max_shard_size"),
    )
    if is_first():
        summary = compression_summary(report, options.output, takes_text=False)
        print(json.dumps(report.to_dict(), indent=2) if options.json else summary)
        push_if_asked(options)
