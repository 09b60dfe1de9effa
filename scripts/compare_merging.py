"""Reproduce the paper's table of merging on a small scale: task arithmetic and TIES, alone and after DARE or ImPart.

Two fine-tunes of one base are merged: the given one, and one that this script trains on text that comes with Python
(tables of character encodings; --second-text for another text). The settings of every method are searched on one half
of each task's held-out text, by mean cross-entropy, as `impart-hf tune-merge` does. The table reports the other half.
Methods that drop at random are run with several seeds. Writes merging.md, merging.json and the second fine-tune.

With --second-answers, the second task is records with exact answers (tasks/ of scripts/exact_answers.py), best of kinds
that the first fine-tune has not learnt (--kinds there, --answer-kinds of scripts/train_pair.py). The table then has the
share of right answers to them, and with --answers of those to the first fine-tune's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import pair_text
import pair_training
import torch
from exact_answers import TRAIN, exact_score, read_tasks
from measure import comma_separated
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from impart_hf import MergeConfig, MergeModel, merge
from impart_hf.calibration.text import calibration_tokens
from impart_hf.evaluation.metrics import load, perplexity
from impart_hf.merging.config import MERGE_METHODS
from impart_hf.merging.grids import DENSITIES, LAMBDAS, TRIMS
from impart_hf.merging.search import tune_merge

METHODS = {
    "task arithmetic": "task_arithmetic",
    "task arithmetic + DARE": "dare_linear",
    "task arithmetic + ImPart": "impart_linear",
    "TIES": "ties",
    "TIES + DARE": "dare_ties",
    "TIES + ImPart": "impart_ties",
}


def train_second(base: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Train the base on the second task, and write the fine-tune and its held-out text, heldout.txt."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    length = min(arguments.length, model.config.max_position_embeddings)
    labels = None
    if arguments.second_answers:
        blocks, labels = pair_text.answer_blocks(tokenizer, read_tasks(arguments.second_answers, TRAIN), length)
        # A paragraph each, so that `halves` parts them
        held_out = [record.prompt + record.answer for record in read_tasks(arguments.second_answers)]
    else:
        second = arguments.second_text
        documents = pair_text.read_documents(second) if second else pair_text.encoding_tables()
        train, held_out = pair_text.hold_out(documents, every=10)
        blocks = pair_text.training_blocks(tokenizer, train, length, at_least=arguments.batch_size)
    with pair_training.quiet():
        pair_training.train(
            model, blocks, "second fine-tune", labels=labels, steps=arguments.steps, minutes=None, lr=arguments.lr,
            batch_size=arguments.batch_size, seed=0,
        )  # fmt: skip
        model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "heldout.txt").write_text(pair_text.join(held_out), encoding="utf-8", newline="\n")


def halves(text: Path) -> tuple[list[str], list[str]]:
    """Split a text by every other paragraph: one half for the search, one for the table."""
    paragraphs = text.read_text("utf-8").split("\n\n")
    return ["\n\n".join(paragraphs[0::2])], ["\n\n".join(paragraphs[1::2])]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all numbers of the table."""
    logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    second = arguments.output / "second"
    if not (second / "heldout.txt").is_file():
        train_second(arguments.base, second, arguments)
    models = {arguments.first_name: arguments.finetuned, arguments.second_name: str(second)}
    texts = {arguments.first_name: halves(arguments.text), arguments.second_name: halves(second / "heldout.txt")}
    validation = {task: text[0] for task, text in texts.items()}
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    sequences = {
        task: calibration_tokens(text[1], tokenizer, samples=arguments.samples, length=arguments.length)
        for task, text in texts.items()
    }

    folders = {arguments.first_name: arguments.answers, arguments.second_name: arguments.second_answers}
    # Every other record, as in `halves`: the search has seen the rest of the second task's
    records = {f"{task}, right": read_tasks(folder)[1::2] for task, folder in folders.items() if folder}

    def measured(model: str) -> dict[str, float]:
        """Return cross-entropy by task, and the share of right answers."""
        loaded = load(model, torch.float32, arguments.device)
        losses = {task: math.log(perplexity(loaded, ids, arguments.batch_size)) for task, ids in sequences.items()}
        return losses | {title: exact_score(loaded, tokenizer, asked).share for title, asked in records.items()}

    results: dict[str, Any] = {
        "machine": measure.machine(arguments.device),
        "tokens": {task: ids.numel() - len(ids) for task, ids in sequences.items()},
        "unmerged": {"base": measured(arguments.base), **{task: measured(model) for task, model in models.items()}},
        "merged": {},
    }
    with tempfile.TemporaryDirectory(dir=arguments.output) as scratch:
        for title, method in METHODS.items():
            started = time.perf_counter()
            config = MergeConfig(
                method, arguments.base, tuple(MergeModel(model) for model in models.values()),
                # TIES averages agreeing entries; mergekit's dare_ties sums them unless told otherwise
                {"normalize": True} if method.endswith("ties") else {},
            )  # fmt: skip
            found = tune_merge(
                config, Path(scratch, f"{method}-tuned"), validation, lambdas=arguments.lambdas,
                trims=arguments.trims if MERGE_METHODS[method].consensus else None,
                densities=arguments.densities if MERGE_METHODS[method].sparsifier else None,
                samples=arguments.samples, length=arguments.length,
                batch_size=arguments.batch_size, device=arguments.device, progress=sys.stderr.isatty(),
            )  # fmt: skip
            runs = []
            for seed in [{"seed": n} for n in arguments.seeds] if config.method.sparsifier else [{}]:
                seeded = {**config.to_dict(), "parameters": {**config.parameters, **found.best.settings, **seed}}
                folder = Path(scratch, f"{method}-{len(runs)}")
                merge(seeded, folder, device=arguments.device)
                runs.append(measured(str(folder)))
            seconds = time.perf_counter() - started
            results["merged"][title] = {
                "settings": found.best.settings, "candidates": len(found.candidates), "runs": runs, "seconds": seconds,
            }  # fmt: skip
            print(f"{title}: {found.best.settings}, {runs} ({seconds:.0f} s)", file=sys.stderr)
    return results


def rows_of(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return the table's rows: means over seeds ± half the range.

    They are cross-entropies on the held-out halves, in nats/token, and shares of right answers.
    """
    tasks = list(results["tokens"])

    def row(title: str, settings: dict[str, float], runs: list[dict[str, float]]) -> dict[str, str]:
        cells = {"model": title}
        # The share that TIES keeps is called density in TIES alone and trim_density after a sparsifier
        trims = {"TIES": "density", "TIES + DARE": "trim_density", "TIES + ImPart": "trim_density"}.get(title)
        cells["λ"] = _text(settings.get("lambda"))
        cells["TIES keeps"] = _text(settings.get(trims)) if trims else ""
        cells["DARE, ImPart keep"] = _text(settings.get("density")) if trims != "density" else ""
        for task in tasks:
            cells[task] = _mean([run[task] for run in runs])
        cells["mean"] = _mean([statistics.mean(run[task] for task in tasks) for run in runs])
        return cells | {title: _mean([run[title] for run in runs]) for title in runs[0] if title not in tasks}

    unmerged = [row(title, {}, [found]) for title, found in results["unmerged"].items()]
    merged = results["merged"].items()
    return unmerged + [row(title, found["settings"], found["runs"]) for title, found in merged]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _mean(values: list[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare_merging.py", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="base model, a LLaMA: local folder or Hub id")
    parser.add_argument("finetuned", help="fine-tuned model, dense or a delta repository")
    parser.add_argument("--text", type=Path, required=True, help="held-out text of the fine-tune's task")
    parser.add_argument("--answers", type=Path, metavar="FOLDER", help="tasks/ of the pair: count right answers")
    second = parser.add_mutually_exclusive_group()
    second.add_argument("--second-text", type=Path, nargs="+", help="text of the second task")
    second.add_argument("--second-answers", type=Path, metavar="FOLDER", help="tasks/ with records: the second task")
    parser.add_argument("--first-name", default="first", help="name of the fine-tune's task in the table")
    parser.add_argument("--second-name", default="second", help="name of the second task in the table")
    parser.add_argument(
        "--output", type=Path, default=Path("merging"), help="folder to write the results to (default: merging)"
    )
    parser.add_argument("--steps", type=int, default=160, help="training steps of the second fine-tune (default: 160)")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate of the second fine-tune (default: 5e-4)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--samples", type=int, default=48, help="sequences of each half (default: 48)")
    parser.add_argument(
        "--seeds", type=comma_separated(int), default=[0, 1, 2], help="seeds, comma-separated (default: 0,1,2)"
    )
    parser.add_argument("--lambdas", type=comma_separated(float), default=list(LAMBDAS), help="default: the paper's")
    parser.add_argument("--trims", type=comma_separated(float), default=list(TRIMS), help="default: the paper's")
    parser.add_argument(
        "--densities", type=comma_separated(float), default=list(DENSITIES), help="default: the paper's"
    )
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    try:
        results = compare(arguments)
    except (ValueError, OSError) as error:
        print(f"compare_merging.py: error: {error}", file=sys.stderr)
        return 1
    text = measure.table(rows_of(results)) + f"\n\n{measure.machine_line(arguments.device)}\n"
    (arguments.output / "merging.json").write_text(json.dumps(results, indent=2) + "\n")
    (arguments.output / "merging.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
