"""The command `impart-hf merge`."""

import argparse
import json

from ..merging.config import MERGE_METHODS, MergeConfig
from ..methods import ExactConfig, method_names
from .method_options import add_method, chosen_method, given_settings
from .options import add_device, add_merge_config, add_result, check_publishing, given, option_of, push_if_asked


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.description = f"{parser.description}: {', '.join(MERGE_METHODS)}"
    parser.set_defaults(shares_work=True)
    add_merge_config(parser)
    add_method(parser, [*method_names(), ExactConfig.name], default=None)
    add_device(parser, "tensors are combined and decomposed")
    add_result(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined.

    Raises:
        ValueError: if an option for delta repositories is given, but a dense model is to be made.
    """
    config = MergeConfig.from_yaml(options.config)
    if options.method is not None:
        chosen_method(options)
        check_publishing(options, config.base_model)
        return
    unused = [f"--{option}" for option in given_settings(options)]
    unused += map(option_of, given(options, "max_bytes", "push", "base_name"))
    if unused:
        raise ValueError(f"{unused[0]} is for a delta repository: add --method, or leave {unused[0]} out")
    check_publishing(options)


def run(options: argparse.Namespace) -> None:
    """Merge, and print the report."""
    from ..common.processes import is_first
    from ..merging.merge import merge
    from .next_commands import next_commands
    from .summaries import merge_summary

    config = MergeConfig.from_yaml(options.config)
    report = merge(
        config,
        options.output,
        compression=chosen_method(options) if options.method else None,
        progress=not options.quiet,
        **given(options, "max_bytes", "base_name", "device", "max_shard_size"),
    )
    if is_first():
        commands = []
        if report.compression is not None:
            commands = next_commands(options.output, config.base_model, pushed=options.push)
        if options.json:
            print(json.dumps({**report.to_dict(), "next": commands}, indent=2))
        else:
            print(merge_summary(report, options.output, commands))
        push_if_asked(options)
