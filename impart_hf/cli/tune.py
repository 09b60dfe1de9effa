"""The command `impart-hf tune`."""

import argparse
import json
from typing import Any

from ..compression.tune import BETAS, CS, tune
from ..merging.config import MergeConfig
from ..merging.search import DENSITIES, LAMBDAS, TRIMS, tune_merge
from .compress import add_pair, method_config, pair_options, summary
from .merge import merge_summary
from .options import command, numbers, push_if_asked

# Options that only one of the two searches has a use for.
_FOR_PAIRS = (
    "method", "ratio", "max_bytes", "embeddings", "value_dtype", "bits", "groups", "calibration", "calibration_samples",
    "calibration_length", "revision", "base_revision", "base_name", "push", "private", "task", "task_limit", "betas",
    "cs", "seeds",
)  # fmt: skip
_FOR_MERGES = ("lambdas", "trims", "densities")


def add_tune(commands: Any) -> None:
    """Add the command `tune`."""
    parser = command(commands, "tune", _tune, "search the settings of impart, impart-qt or a merge on a text or task")
    parser.set_defaults(parser=parser)
    parser.usage = (
        "impart-hf tune [options] BASE FINETUNED OUT\n"
        "       impart-hf tune [options] --merge CONFIG.yaml --validation TASK=TEXT … OUT"
    )
    parser.add_argument("paths", metavar="BASE FINETUNED OUT", nargs="+", help="with --merge: OUT alone")
    parser.add_argument("--merge", metavar="CONFIG.yaml", help="search this merge's lambda, trimming and density")
    add_pair(parser, ("impart", "impart-qt"), searched=("beta", "c", "seed"), default="impart")
    parser.add_argument(
        "--validation", metavar="TEXT", action="append", default=[],
        help="judge by KL(fine-tune || candidate) on this text; a merge by its mean cross-entropy on the texts of "
        "several TASK=TEXT",
    )  # fmt: skip
    parser.add_argument("--task", help="judge by the first metric of this lm-eval task, or of a task's YAML file")
    for name, kind, default in (
        ("betas", float, BETAS), ("cs", float, CS), ("seeds", int, (0,)), ("lambdas", float, LAMBDAS),
        ("trims", float, TRIMS), ("densities", float, DENSITIES),
    ):  # fmt: skip
        merges = "of a merge; " if name in _FOR_MERGES else ""
        help = f"{merges}default: {','.join(map(str, default))}"
        # Some merges have no use for these two: whether they were given must be seen.
        known = name not in ("trims", "densities")
        parser.add_argument(f"--{name}", type=numbers(kind), default=default if known else None, help=help)
    parser.add_argument("--samples", type=int, default=64, help="sequences of a validation text (default: 64)")
    parser.add_argument("--length", type=int, default=512, help="their tokens (default: 512)")
    parser.add_argument("--task-limit", type=int, help="examples of the task, at most")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences judged at a time (default: 8)")


def _tune(options: argparse.Namespace) -> None:
    foreign, reason = (_FOR_PAIRS, "is not for --merge") if options.merge else (_FOR_MERGES, "is for --merge")
    for name in foreign:
        if getattr(options, name, None) != options.parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} {reason}")
    wanted = ["OUT"] if options.merge else ["BASE", "FINETUNED", "OUT"]
    if len(options.paths) != len(wanted):
        raise ValueError(f"give {', '.join(wanted)}; got {', '.join(options.paths)}")
    options.output = options.paths[-1]
    (_tune_merge if options.merge else _tune_pair)(options)


def _tune_pair(options: argparse.Namespace) -> None:
    options.base, options.finetuned, _ = options.paths
    if len(options.validation) + (options.task is not None) != 1:
        raise ValueError("give one --validation text or one --task to judge by")
    found = tune(
        options.base,
        options.finetuned,
        options.output,
        method_config(options),
        validation=options.validation[0] if options.validation else None,
        task=options.task,
        betas=options.betas,
        cs=options.cs,
        seeds=options.seeds,
        samples=options.samples,
        length=options.length,
        task_limit=options.task_limit,
        batch_size=options.batch_size,
        **pair_options(options),
    )
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.table())
    if not options.json:
        print("\n" + summary(found.report, options.output))
    push_if_asked(options)


def _tune_merge(options: argparse.Namespace) -> None:
    texts = {}
    for entry in options.validation:
        task, equals, text = entry.partition("=")
        if not (task and equals and text) or task in texts:
            raise ValueError(f"--validation of a merge is TASK=TEXT, once for each task; got '{entry}'")
        texts[task] = text
    found = tune_merge(
        MergeConfig.from_yaml(options.merge),
        options.output,
        texts,
        lambdas=options.lambdas,
        trims=options.trims,
        densities=options.densities,
        samples=options.samples,
        length=options.length,
        batch_size=options.batch_size,
        device=options.device,
        max_shard_size=options.max_shard_size,
        progress=not options.quiet,
    )
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.table())
    if not options.json:
        print("\n" + merge_summary(found.report, options.output))
