"""The command `impart-hf prune recover`."""

import argparse
import json

from ..options import (
    add_flag,
    add_publishing,
    check_publishing,
    check_revision,
    check_text_field,
    given,
    given_texts,
    push_if_asked,
    refuse,
    with_text_field,
)
from .options import add_model, add_training, training_arguments


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.set_defaults(shares_work=True)
    add_model(parser)
    parser.add_argument("output", metavar="OUT", help="folder to write the trained model to")
    add_training(parser)
    add_flag(parser, "--full", "train all weights, instead of LoRA adapters")
    parser.add_argument("--steps", type=int, help="training steps, instead of epochs")
    parser.add_argument("--epochs", type=float, help="how often all of the text is used (default: 1)")
    parser.add_argument(
        "--learning-rate", type=float, help="learning rate of AdamW (default: 1e-4 for LoRA, 2e-5 with --full)"
    )
    parser.add_argument(
        "--eval-data", metavar="TEXT", help="held-out text on which perplexity is measured before and after"
    )
    add_publishing(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_revision(options, options.model)
    check_publishing(options)
    check_text_field(options, options.data, options.eval_data)
    if options.full:
        refuse(options, ["rank", "alpha"], "is a setting of LoRA, but --full trains all weights; remove --full")
    if options.steps is not None:
        refuse(options, ["epochs"], "--steps already sets the length of training; remove --steps")


def run(options: argparse.Namespace) -> None:
    """Train, and print the report."""
    from ...common.processes import is_first
    from ...hub import is_pruned_model
    from ...modeling.model_files import HubOptions
    from ...pruning import recover

    if options.push and not is_pruned_model(options.model, HubOptions(options.revision)):
        raise ValueError(f"--push is for pruned models, but '{options.model}' was never pruned: leave it out")
    report = recover(
        options.model,
        options.output,
        with_text_field(options, options.data),
        lora=not options.full,
        **given(options, "epochs"),
        **given_texts(options, "eval_data"),
        **training_arguments(options),
    )
    if not is_first():
        return
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(
            f"{options.output}: trained for {report.steps} steps in {report.seconds:.0f} s, loss "
            f"{report.first_loss:.3f} at the start, {report.last_loss:.3f} at the end"
        )
        if report.perplexity_before is not None:
            found = f"{report.perplexity_before:.2f} before, {report.perplexity_after:.2f} after"
            print(f"perplexity on {options.eval_data}: {found}")
    push_if_asked(options)
