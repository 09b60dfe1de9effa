"""The command `impart-hf evaluate`."""

import argparse
import json
import os
import sys

from ..common.processes import is_first
from ..evaluation.defaults import NEW_TOKENS, PROMPT_TOKENS
from .options import (
    add_base_model,
    add_device,
    add_flag,
    add_json,
    add_quiet,
    add_revision,
    add_text_field,
    add_text_size,
    check_revision,
    check_text_and_task,
    check_text_field,
    given,
    given_texts,
    refuse,
)
from .task_options import add_tasks, batch_size, check_tasks, given_tasks, warn_of_code


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.set_defaults(shares_work=True)
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="dense model, delta repository or pruned model: local folder or Hub id",
    )
    parser.add_argument(
        "--text", help="measure perplexity on this text: a file, a folder or the name of a data set on the Hub"
    )
    add_text_size(parser, "the text", batch_size=False)
    add_text_field(parser)
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        metavar="N|auto",
        help="sequences of the text, or requests of a task, at a time; auto, for tasks: as many as fit (default: 8)",
    )
    add_flag(parser, "--latency", "measure time and memory of prefill and decode")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        help=f"length of the prompt whose cost is counted and measured (default: {PROMPT_TOKENS}, or as many as the "
        "model has positions)",
    )
    parser.add_argument("--new-tokens", type=int, help=f"tokens decoded after the prompt (default: {NEW_TOKENS})")
    parser.add_argument("--repeats", type=int, help="number of runs; the median is reported (default: 5)")
    add_device(parser, "models are evaluated")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of weights and cache (default: auto, each model's own)",
    )
    add_revision(parser)
    add_base_model(parser)
    add_json(parser, "print JSON instead of a table")
    add_quiet(parser)
    add_tasks(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_revision(options, *options.models)
    check_text_and_task(options, "text")
    check_text_field(options, options.text)
    check_tasks(options)
    if options.backend not in (None, "hf"):
        refuse(options, ["text", "latency"], f"is for the backend hf; leave --backend {options.backend} out")
    if options.backend == "vllm":
        refuse(options, ["device"], "has no effect on vLLM, which chooses the device")
    if options.batch_size == "auto" and options.task is None:
        raise ValueError("--batch-size auto is for tasks: give a number, or add --task TASK")
    if options.text is None and options.task is None:
        refuse(options, ["batch_size"], "needs a text or task; add --text TEXT or --task TASK")
        if not options.latency:
            reason = "has no effect, as no weights are loaded; add --text TEXT, --task TASK or --latency"
            refuse(options, ["device", "base_model"], reason)
    if not options.latency:
        refuse(options, ["new_tokens", "repeats"], "has no effect without a measurement; add --latency")


def run(options: argparse.Namespace) -> None:
    """Evaluate the models, and print a table."""
    if options.backend == "vllm":
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # read when it is imported; it is stdout else

    import torch

    from ..evaluation.compare import compare_models
    from ..evaluation.model_index import read_metadata, update_card

    if is_first():
        warn_of_code(options)
    for model in options.models if options.update_card else []:
        read_metadata(model)  # for its errors, before models are evaluated for hours
    comparison = compare_models(
        options.models,
        latency=bool(options.latency),
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        progress=not options.quiet,
        **given_texts(options, "text"),
        **given(options, "samples", "length"),
        **({} if options.batch_size == "auto" else given(options, "batch_size")),
        **given_tasks(options),
        **given(options, "prompt_tokens", "new_tokens", "repeats", "device", "revision", "base_model"),
    )
    if not is_first():
        return
    # Before the cards, which a full disk or a folder without rights would stop.
    print(json.dumps(comparison.to_dict(), indent=2) if options.json else comparison.table(), flush=True)
    for model in comparison.other_vocabularies:
        print(
            f"{model} has another vocabulary than {options.models[0]}, so it reads the text in its own tokens: "
            "perplexities per token cannot be compared",
            file=sys.stderr,
        )
    for evaluation in comparison.evaluations if options.update_card else []:
        update_card(evaluation.model, evaluation.scores)
