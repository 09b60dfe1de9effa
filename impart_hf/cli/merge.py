"""The command `impart-hf merge`."""

import argparse
import json
from typing import Any

from ..merging.config import MERGE_METHODS, MergeConfig
from ..merging.merge import MergeReport, merge
from ..methods import MethodConfig, method_names
from .compress import add_method, add_result, check_push, given_settings, method_config, option_of, summary
from .options import command, push_if_asked


def add_merge(commands: Any) -> None:
    """Add the command `merge`."""
    parser = command(
        commands, "merge", _merge, f"merge fine-tunes of one base as a YAML file says: {', '.join(MERGE_METHODS)}"
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="merge_method, base_model, models and parameters")
    parser.add_argument("output", metavar="OUT", help="folder of the merged model")
    add_method(parser, method_names(), default=None)
    parser.add_argument("--device", default="cpu", help="where tensors are combined and decomposed (default: cpu)")
    add_result(parser)


def _merge(options: argparse.Namespace) -> None:
    config = MergeConfig.from_yaml(options.config)
    report = merge(
        config,
        options.output,
        compression=merged_as(options, config),
        max_bytes=options.max_bytes,
        base_name=options.base_name,
        device=options.device,
        max_shard_size=options.max_shard_size,
        progress=not options.quiet,
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else merge_summary(report, options.output))
    push_if_asked(options)


def merged_as(options: argparse.Namespace, config: MergeConfig) -> MethodConfig | None:
    """The method by which a merged model is to be compressed, None for a dense one.

    Raises:
        ValueError: if options are given that only a delta repository has.
    """
    if options.method is not None:
        check_push(options, config.base_model)
        return method_config(options)
    given = [*given_settings(options), *(name for name in ("max_bytes", "push", "base_name") if getattr(options, name))]
    if given:
        option = option_of(given[0])
        raise ValueError(f"{option} is for a delta repository: choose its --method, or leave {option} out")
    return None


def merge_summary(report: MergeReport, output: str) -> str:
    """What a user should know of a merge."""
    models = [model["model"] for model in report.config["models"]]
    lines = [f"{output}: {report.config['merge_method']} of {', '.join(models)}; {report.parameters:,} parameters"]
    if report.added_tokens:
        lines.append(f"{report.added_tokens} tokens more than the base")
    lines += report.notes
    if report.compression is not None:
        lines.append(summary(report.compression, output))
    return "\n".join(lines)
