"""The command `impart-hf prune importance`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ...pruning.choices import SCORES
from ..options import add_flag, check_revision, check_text_field, given, refuse, with_text_field
from .options import REPORT_FOLDER, add_model, add_training, training_arguments

if TYPE_CHECKING:
    from ...pruning import Importance


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.set_defaults(shares_work=True)
    add_model(parser)
    add_training(parser)
    parser.add_argument(
        "--output", default=REPORT_FOLDER, help=f"folder to write the report to (default: {REPORT_FOLDER})"
    )
    parser.add_argument("--steps", type=int, help="training steps, at least 2 (default: 40)")
    parser.add_argument("--learning-rate", type=float, help="learning rate of AdamW (default: 1e-4)")
    parser.add_argument(
        "--top-percent", type=float, help="percentage of a dropped matrix that may be merged (default: 20)"
    )
    add_flag(parser, "--no-masks", "do not store the masks, one bit per weight, that merging layers needs")


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_revision(options, options.model)
    check_text_field(options, options.data)
    if options.no_masks:
        refuse(options, ["top_percent"], "is a setting of the masks, which --no-masks leaves out; remove --no-masks")


def run(options: argparse.Namespace) -> None:
    """Score the model, and print the scores."""
    from ...common.processes import is_first
    from ...modeling.model_files import read_json
    from ...pruning import compute_importance
    from ...pruning.importance_report import REPORT

    importance = compute_importance(
        options.model,
        options.output,
        with_text_field(options, options.data),
        masks=not options.no_masks,
        **given(options, "top_percent"),
        **training_arguments(options),
    )
    if not is_first():
        return
    if options.json:
        print(json.dumps(read_json(Path(options.output, REPORT)), indent=2))
        return
    print(_score_table(importance))
    print(f"\n{options.output}: importance of {importance.model}, {importance.steps} steps")


def _score_table(importance: Importance) -> str:
    """Return a table of every layer's scores, as shares of their sums, and its rank; 0 is the least important."""
    scores = {score: importance.layers[score] / importance.layers[score].sum() for score in SCORES}
    ranks = {score: values.argsort(stable=True).argsort().tolist() for score, values in scores.items()}
    titles = [f"{score.replace('_', '-')}, share" for score in SCORES]
    lines = ["layer" + "".join(f"{title:>24}{'rank':>6}" for title in titles)]
    for layer in range(len(importance.shape.layers)):
        cells = [f"{scores[score][layer].item():>24.4f}{ranks[score][layer]:>6}" for score in SCORES]
        lines.append(f"{layer:>5}" + "".join(cells))
    return "\n".join(lines)
