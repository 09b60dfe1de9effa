"""`impart-hf prune …`: importance, layers, width, recover."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..hub import is_pruned_model
from ..modeling.checkpoints import HubOptions, read_json
from ..pruning import PruningReport, prune_layers, prune_width
from ..pruning.importance_report import REPORT, SCORES, Importance
from ..pruning.width_budget import PARTS
from ..training.distributed import is_first
from .options import add_push, add_training_fields, command, numbers, push_if_asked, training_fields

_REPORT_FOLDER = "importance"


def add_prune(commands: Any) -> None:
    """Add `prune` and the commands below it."""
    help = "prune a LLaMA: score its layers, heads and channels, remove the least important, train what is left"
    parser = commands.add_parser("prune", help=help, description=help)
    steps = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_importance(steps)
    _add_layers(steps)
    _add_width(steps)
    _add_recover(steps)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="LLaMA-shaped model: local folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        metavar="TEXT",
        help="text to train on: a .txt file, a .json or .jsonl file of records (text, prompt and completion, or "
        "messages), a folder or the name of a data set",
    )
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step, over all processes (default: 4)")
    parser.add_argument(
        "--length", type=int, default=512, help="their tokens, no more than the model has positions (default: 512)"
    )
    parser.add_argument("--rank", type=int, default=8, help="rank of the LoRA adapters (default: 8)")
    parser.add_argument("--alpha", type=int, default=32, help="alpha of the LoRA adapters (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of adapters and the order of the text (default: 0)")
    add_training_fields(parser)
    parser.add_argument("--device", help="where to train (default: an accelerator, if there is one)")


def _add_importance(steps: Any) -> None:
    parser = command(
        steps, "importance", _importance, "score layers, heads and channels by the gradients of the first LoRA steps"
    )
    _add_model(parser)
    _add_training(parser)
    parser.add_argument("--output", default=_REPORT_FOLDER, help=f"folder of the report (default: {_REPORT_FOLDER})")
    parser.add_argument("--steps", type=int, default=40, help="training steps, at least 2 (default: 40)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of AdamW (default: 1e-4)")
    parser.add_argument(
        "--top-percent", type=float, default=20.0, help="how much of a dropped matrix may be merged (default: 20)"
    )
    parser.add_argument("--no-masks", action="store_true", help="leave out what merging needs: a bit for every weight")


def _importance(options: argparse.Namespace) -> None:
    from ..pruning import compute_importance

    importance = compute_importance(
        options.model,
        options.output,
        options.data,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        rank=options.rank,
        alpha=options.alpha,
        length=options.length,
        seed=options.seed,
        top_percent=options.top_percent,
        masks=not options.no_masks,
        training=training_fields(options),
        device=options.device,
        revision=options.revision,
        progress=not options.quiet,
    )
    if not is_first():
        return
    if options.json:
        print(json.dumps(read_json(Path(options.output, REPORT)), indent=2))
        return
    print(_score_table(importance))
    print(f"\n{options.output}: importance of {importance.model}, {importance.steps} steps")


def _score_table(importance: Importance) -> str:
    """Both scores of every layer, as shares of their sums, and the layer's rank from the least important on."""
    scores = {score: importance.layers[score] / importance.layers[score].sum() for score in SCORES}
    ranks = {score: values.argsort(stable=True).argsort().tolist() for score, values in scores.items()}
    titles = [f"{score.replace('_', '-')}, share" for score in SCORES]
    lines = ["layer" + "".join(f"{title:>24}{'rank':>6}" for title in titles)]
    for layer in range(len(importance.shape.layers)):
        cells = [f"{scores[score][layer].item():>24.4f}{ranks[score][layer]:>6}" for score in SCORES]
        lines.append(f"{layer:>5}" + "".join(cells))
    return "\n".join(lines)


def _add_pruning(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("output", metavar="OUT", help="folder of the pruned model")
    parser.add_argument(
        "--score",
        type=lambda name: name.replace("-", "_"),
        choices=SCORES,
        default="igia",
        metavar="{igia,gradient-norm}",
        help="of layers, heads and channels (default: igia)",
    )
    parser.add_argument("--base-name", help="Hub id to record for a model that is given as a local folder")
    parser.add_argument("--max-shard-size", default="5GB", help="split larger weight files (default: 5GB)")
    add_push(parser)


def _add_layers(steps: Any) -> None:
    parser = command(steps, "layers", _layers, "drop the least important layers, merging them into those before")
    _add_pruning(parser)
    parser.add_argument(
        "--importance", metavar="DIR", help=f"report on MODEL (default: {_REPORT_FOLDER}, where it is needed)"
    )
    choices = parser.add_mutually_exclusive_group(required=True)
    choices.add_argument("--drop", type=int, help="how many layers")
    choices.add_argument("--ratio", type=float, help="share of the decoder layers' parameters, between 0 and 1")
    choices.add_argument("--layers", type=numbers(int), help="which ones, comma-separated, from 0 on")
    parser.add_argument("--no-merge", action="store_true", help="only drop them")
    parser.add_argument("--no-protect", action="store_true", help="let the first and the last layer go as well")


def _layers(options: argparse.Namespace) -> None:
    needed = options.layers is None or not options.no_merge
    report = prune_layers(
        options.model,
        options.output,
        options.importance or (_REPORT_FOLDER if needed else None),
        drop=options.drop,
        ratio=options.ratio,
        layers=options.layers,
        score=options.score,
        merge=not options.no_merge,
        protect=not options.no_protect,
        revision=options.revision,
        base_name=options.base_name,
        max_shard_size=options.max_shard_size,
        progress=not options.quiet,
    )
    merged = ", ".join(f"{a} into {b}" for a, b in report.step["merged_into"].items())
    what = f"dropped layers: {', '.join(map(str, report.step['removed']))}; merged: {merged or 'none'}"
    _finished(options, report, [what])


def _add_width(steps: Any) -> None:
    parser = command(steps, "width", _width, "remove the least important heads and channels of every layer")
    _add_pruning(parser)
    parser.add_argument(
        "--importance", metavar="DIR", default=_REPORT_FOLDER, help=f"report on MODEL (default: {_REPORT_FOLDER})"
    )
    parser.add_argument(
        "--ratio", type=float, required=True, help="share of the decoder layers' parameters, between 0 and 1"
    )
    parser.add_argument(
        "--exponent",
        type=float,
        default=0.5,
        help="layers of score s lose a share in proportion to s^-exponent; 0: all the same (default: 0.5)",
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"attention, mlp or both (default: {','.join(PARTS)})")
    parser.add_argument("--multiple-of", type=int, default=1, help="keep a multiple of so many channels (default: 1)")
    parser.add_argument(
        "--query-heads", action="store_true", help="remove query heads of every KV group, instead of whole groups"
    )
    parser.add_argument(
        "--calibration", metavar="TEXT", help="text on which o_proj and down_proj are corrected by least squares"
    )
    parser.add_argument("--calibration-samples", type=int, default=128, help="its sequences, at most (default: 128)")
    parser.add_argument("--calibration-length", type=int, default=2048, help="their tokens (default: 2048)")
    parser.add_argument("--device", default="cpu", help="where the correction is computed (default: cpu)")


def _width(options: argparse.Namespace) -> None:
    report = prune_width(
        options.model,
        options.output,
        options.importance,
        ratio=options.ratio,
        score=options.score,
        exponent=options.exponent,
        parts=[part.strip() for part in options.parts.split(",")],
        multiple_of=options.multiple_of,
        query_heads=options.query_heads,
        calibration=options.calibration,
        calibration_samples=options.calibration_samples,
        calibration_length=options.calibration_length,
        device=options.device,
        revision=options.revision,
        base_name=options.base_name,
        max_shard_size=options.max_shard_size,
        progress=not options.quiet,
    )
    lost = {"query heads": "heads_removed", "KV heads": "key_value_heads_removed", "channels": "channels_removed"}
    lines = [
        f"{what} removed by layer: {' '.join(map(str, report.step[key]))}"
        for what, key in lost.items()
        if any(report.step[key])
    ]
    _finished(options, report, lines)


def _finished(options: argparse.Namespace, report: PruningReport, lines: Sequence[str]) -> None:
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


def _add_recover(steps: Any) -> None:
    parser = command(steps, "recover", _recover, "train a pruned model, with LoRA or in full, and save it merged")
    _add_model(parser)
    parser.add_argument("output", metavar="OUT", help="folder of the trained model")
    _add_training(parser)
    parser.add_argument("--full", action="store_true", help="train all weights, instead of LoRA adapters")
    parser.add_argument("--steps", type=int, help="training steps, instead of epochs")
    parser.add_argument("--epochs", type=float, default=1.0, help="default: 1")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-4 for LoRA, 2e-5 in full")
    parser.add_argument("--eval-data", metavar="TEXT", help="held-out text: perplexity before and after")
    add_push(parser)


def _recover(options: argparse.Namespace) -> None:
    from ..pruning import recover

    if options.push and not is_pruned_model(options.model, HubOptions(options.revision)):
        raise ValueError(f"--push publishes pruned models, and '{options.model}' was never pruned: leave it out")
    report = recover(
        options.model,
        options.output,
        options.data,
        lora=not options.full,
        steps=options.steps,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        length=options.length,
        rank=options.rank,
        alpha=options.alpha,
        seed=options.seed,
        training=training_fields(options),
        eval_data=options.eval_data,
        device=options.device,
        revision=options.revision,
        progress=not options.quiet,
    )
    if not is_first():
        return
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(
            f"{options.output}: trained for {report.steps} steps in {report.seconds:.0f} s, loss "
            f"{report.first_loss:.3f} at first, {report.last_loss:.3f} at last"
        )
        if report.perplexity_before is not None:
            found = f"{report.perplexity_before:.2f} before, {report.perplexity_after:.2f} after"
            print(f"perplexity on {options.eval_data}: {found}")
    push_if_asked(options)
