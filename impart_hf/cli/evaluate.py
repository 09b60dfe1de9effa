"""The command `impart-hf evaluate`."""

import argparse
import json
import sys
from typing import Any

import torch

from ..evaluation.compare import compare_models
from ..evaluation.cost import NEW_TOKENS, PROMPT_TOKENS
from .options import command

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_evaluate(commands: Any) -> None:
    """Add the command `evaluate`."""
    parser = command(
        commands, "evaluate", _evaluate, "what models cost, and how well and fast they do on a text or task"
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="dense, delta or pruned model: local folder or Hub id"
    )
    parser.add_argument("--text", help="measure perplexity on this text: a file, a folder or the name of a data set")
    parser.add_argument("--task", help="measure the first metric of this lm-eval task, or of a task's YAML file")
    parser.add_argument("--task-limit", type=int, help="examples of the task, at most")
    parser.add_argument("--samples", type=int, default=64, help="sequences of the text, at most (default: 64)")
    parser.add_argument(
        "--length", type=int, default=512, help="their tokens (default: 512, or as many as the models have positions)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences judged at a time (default: 8)")
    parser.add_argument("--latency", action="store_true", help="measure time and memory of prefill and decode")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        help=f"prompt whose cost is counted and measured (default: {PROMPT_TOKENS}, or as many as there are positions)",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=NEW_TOKENS, help=f"tokens decoded after it (default: {NEW_TOKENS})"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median is taken (default: 5)")
    parser.add_argument("--device", default="cpu", help="where models are judged (default: cpu)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="of weights and cache (default: auto, each model's own)"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--base-model", help="take the base of delta repositories from this folder or Hub id")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _evaluate(options: argparse.Namespace) -> None:
    comparison = compare_models(
        options.models,
        text=options.text,
        task=options.task,
        task_limit=options.task_limit,
        samples=options.samples,
        length=options.length,
        batch_size=options.batch_size,
        latency=options.latency,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        device=options.device,
        dtype=_DTYPES[options.dtype],
        revision=options.revision,
        base_model=options.base_model,
        progress=not options.quiet,
    )
    print(json.dumps(comparison.to_dict(), indent=2) if options.json else comparison.table())
    for model in comparison.other_vocabularies:
        print(
            f"{model} has another vocabulary than {options.models[0]}, and reads the text in its own tokens: "
            "perplexities per token do not compare",
            file=sys.stderr,
        )
