"""Measure perplexity against parameters of a pruned model: layers by several rules, widths, both; and recovery.

The model is scored by early gradients on a text, pruned in every way to the same sizes, and recovered by the same short
full training on that text. Perplexity is measured on another text, and with --answers right answers to held-out
records are counted (tasks/ of scripts/train_pair.py or scripts/exact_answers.py). Every finished run is recorded, and
the same command resumes after the last one. Writes study.md (means over seeds), study.json (every run), study.png and
the importance report.

- random layers: drawn by seed, without the first and the last layer. Not merged.
- last layers: the layers before the last one, which is kept. Not merged.
- IGIA layers, gradient-norm layers: the layers with the lowest scores, without the first and the last one.
- merged: the top entries of dropped layers are added to the layers before them.
- width: heads and channels with the lowest IGIA, as many parameters as that number of layers has; corrected: o_proj and
  down_proj are then fitted by least squares on the text.
- layers and width: half as many layers (rounded down), lowest IGIA and merged, then the rest by width, scored again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from exact_answers import TEST, exact_score, read_tasks
from measure import comma_separated
from transformers import AutoTokenizer
from transformers.utils import logging

from impart_hf.common.files import atomic_write
from impart_hf.evaluation.metrics import load, perplexity
from impart_hf.pruning import Importance, PruningReport, compute_importance, prune_layers, prune_width, recover
from impart_hf.pruning.checks import open_decoder

REFERENCE = "unpruned"
_LAYER_RULES = {"IGIA layers": "igia", "gradient-norm layers": "gradient_norm"}
_SETTINGS = (
    "seeds", "counts", "ratios", "importance_steps", "recovery_steps", "learning_rate", "batch_size", "length",
    "recovery_seed", "bf16", "tokens", "calibration_samples",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One pruned model of the study.

    Attributes:
        method: its name in the table.
        amount: what is removed, as the table states it: a number of layers or a ratio.
        seed: for the choice of layers; None if nothing is random.
        make: writes the pruned model to the first folder; the second one is scratch space.
        layers: the dropped layers. Runs with the same layers, merged or not, share one result.
        merge: whether they are merged.
    """

    method: str
    amount: str
    seed: int | None
    make: Callable[[Path, Path], PruningReport] | None
    layers: tuple[int, ...] | None = None
    merge: bool = False

    @property
    def key(self) -> str:
        return f"{self.method} | {self.amount} | {self.seed}"


class Study:
    """The runs of one study and their results, kept in a folder.

    Attributes:
        results: the content of study.json.
    """

    def __init__(self, arguments: argparse.Namespace):
        """Open a study: a new one, or one that was stopped.

        Raises:
            ValueError: if the folder holds a study with other settings, the model has too few layers, or there is
                too little text.
        """
        self.arguments, self.folder = arguments, arguments.output
        self.model = str(arguments.model)
        _, self.shape = open_decoder(self.model)
        self.count = len(self.shape.layers)
        if not all(0 < count <= self.count - 2 for count in arguments.counts):
            raise ValueError(
                f"the model has {self.count} layers, of which the first and the last are kept: --counts must lie "
                f"between 1 and {self.count - 2}"
            )
        if not all(0 < ratio < 1 for ratio in arguments.ratios):
            raise ValueError("--ratios must be above 0 and below 1: shares of the decoder layers' parameters")
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.records = read_tasks(arguments.answers) if arguments.answers else []
        self.held_out = measure.text_sequences(arguments.text, self.tokenizer, arguments.tokens, arguments.length)
        self.path = self.folder / "study.json"
        settings = {name: getattr(arguments, name) for name in _SETTINGS}
        settings |= {"model": Path(self.model).name, "data": _identity(arguments.data)}
        settings |= {"text": _identity(arguments.text)}
        settings |= {"answers": _identity(arguments.answers / TEST)} if arguments.answers else {}
        self.results: dict[str, Any] = {"settings": settings, "machine": measure.machine(arguments.device), "runs": []}
        if self.path.exists():
            found = json.loads(self.path.read_text("utf-8"))
            if found["settings"] != settings:
                raise ValueError(f"{self.path} is of a study with other settings: choose another --output")
            self.results["runs"] = found["runs"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.importance = self._importance()
        self.results["layer_scores"] = {
            score: self.importance.layers[score].tolist() for score in _LAYER_RULES.values()
        }

    def _importance(self) -> Importance:
        folder = self.folder / "importance"
        if not folder.exists():
            self._score(self.model, folder)
        importance = Importance.load(folder)
        importance.check_model(*open_decoder(self.model))
        return importance

    def _score(self, model: str, folder: Path) -> Importance:
        arguments = self.arguments
        return compute_importance(
            model, folder, str(arguments.data), steps=arguments.importance_steps, length=arguments.length,
            device=arguments.device, progress=False,
        )  # fmt: skip

    def runs(self) -> list[Run]:
        """Return all runs: the reference first, then by the amount that is removed."""
        runs = [Run(REFERENCE, "0 layers", None, None)]
        for count in self.arguments.counts:
            amount = f"{count} layer{'s' * (count > 1)}"
            inner = range(1, self.count - 1)
            for seed in self.arguments.seeds:
                drawn = random.Random(f"{seed} {count}").sample(inner, count)
                runs.append(self._layers("random layers", amount, drawn, False, seed))
            runs.append(self._layers("last layers", amount, inner[-count:], False))
            for method, score in _LAYER_RULES.items():
                ranked = sorted(inner, key=lambda n, score=score: (self.importance.layers[score][n].item(), n))
                runs.append(self._layers(method, amount, ranked[:count], False))
                runs.append(self._layers(f"{method}, merged", amount, ranked[:count], True))
            if count > 1:
                runs.append(Run("layers and width", amount, None, self._both(count)))
        for ratio in self.arguments.ratios or [count / self.count for count in self.arguments.counts]:
            amount = f"{ratio:.4g} of the width"
            runs.append(Run("width", amount, None, self._width(ratio, False)))
            runs.append(Run("width, corrected", amount, None, self._width(ratio, True)))
        return runs

    def _layers(self, method: str, amount: str, layers: Sequence[int], merge: bool, seed: int | None = None) -> Run:
        chosen = tuple(sorted(layers))

        def make(folder: Path, _: Path) -> PruningReport:
            importance = self.importance if merge else None
            return prune_layers(self.model, folder, importance, layers=chosen, merge=merge, progress=False)

        return Run(method, amount, seed, make, chosen, merge)

    def _width(self, ratio: float, corrected: bool) -> Callable[[Path, Path], PruningReport]:
        arguments = self.arguments

        def make(folder: Path, _: Path) -> PruningReport:
            return prune_width(
                self.model, folder, self.importance, ratio=ratio, progress=False, device=arguments.device,
                calibration=str(arguments.data) if corrected else None,
                calibration_samples=arguments.calibration_samples, calibration_length=arguments.length,
            )  # fmt: skip

        return make

    def _both(self, count: int) -> Callable[[Path, Path], PruningReport]:
        dropped = count // 2
        ratio = (count - dropped) / (self.count - dropped)  # of the parameters that remain after dropping layers

        def make(folder: Path, scratch: Path) -> PruningReport:
            shorter = scratch / "shorter"
            prune_layers(self.model, shorter, self.importance, drop=dropped, progress=False)
            importance = self._score(str(shorter), scratch / "importance")
            return prune_width(str(shorter), folder, importance, ratio=ratio, progress=False)

        return make

    def do(self, run: Run) -> None:
        """Prune, measure, recover, measure again, and record the result; do nothing if it is already recorded."""
        done = self.results["runs"]
        if any(result["key"] == run.key for result in done):
            return
        found = None
        if run.layers is not None:
            same = (r for r in done if (r["layers"], r["merged"]) == (list(run.layers or ()), run.merge))
            found = next(same, None)
        shared = (*_NUMBERS, *(RIGHT if self.records else ()))
        numbers = self._measured(run) if found is None else {name: found[name] for name in shared}
        done.append(
            {"key": run.key, "method": run.method, "amount": run.amount, "seed": run.seed}
            | {"layers": run.layers and list(run.layers), "merged": run.merge}
            | numbers
        )
        self.save()
        print(f"{run.key}: {numbers['before']:.2f}, recovered {numbers['after']:.2f}", file=sys.stderr, flush=True)

    def _measured(self, run: Run) -> dict[str, Any]:
        arguments, started = self.arguments, time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            pruned, recovered = Path(scratch, "pruned"), Path(scratch, "recovered")
            parameters = self.shape.parameters
            if run.make is None:
                pruned = Path(self.model)
            else:
                parameters = run.make(pruned, Path(scratch)).parameters_after
            before, right_before = self._quality(pruned)
            recover(
                str(pruned), recovered, str(arguments.data), lora=False, steps=arguments.recovery_steps,
                learning_rate=arguments.learning_rate, batch_size=arguments.batch_size, length=arguments.length,
                seed=arguments.recovery_seed, training={"bf16": True} if arguments.bf16 else None,
                device=arguments.device, progress=False,
            )  # fmt: skip
            after, right_after = self._quality(recovered)
        seconds = time.perf_counter() - started
        numbers = {"parameters": parameters, "before": before, "after": after, "seconds": seconds}
        return numbers | (dict(zip(RIGHT, (right_before, right_after), strict=True)) if self.records else {})

    def _quality(self, folder: Path) -> tuple[float, float]:
        """Return a model's perplexity, and its share of right answers, NaN without records."""
        model = load(str(folder), torch.float32, self.arguments.device)
        right = exact_score(model, self.tokenizer, self.records).share if self.records else math.nan
        return perplexity(model, self.held_out, self.arguments.batch_size), right

    def save(self) -> None:
        """Write study.json and study.md."""
        _replace(self.path, json.dumps(self.results, indent=2) + "\n")
        _replace(self.folder / "study.md", markdown(self.results, self.held_out))


RIGHT = ("right_before", "right_after")  # shares of right answers, in runs with records
_NUMBERS = ("parameters", "before", "after", "seconds")


def _identity(path: Path) -> dict[str, Any]:
    """Return the name and hash by which a text is recognised."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _replace(path: Path, text: str) -> None:
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8")


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per method and amount: the mean over the seeds, and half their range."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        groups.setdefault((run["method"], run["amount"]), []).append(run)
    rows = []
    for (method, amount), runs in groups.items():
        row: dict[str, Any] = {"method": method, "amount": amount, "seeds": len(runs)}
        row["layers"] = runs[0]["layers"] if len(runs) == 1 else None
        for name in ("parameters", "before", "after", *(name for name in RIGHT if name in runs[0])):
            values = [run[name] for run in runs]
            row[name], row[f"{name}_spread"] = statistics.fmean(values), (max(values) - min(values)) / 2
        rows.append(row)
    order = list(dict.fromkeys(row["method"] for row in rows))
    return sorted(rows, key=lambda row: (order.index(row["method"]), -row["parameters"]))


def markdown(results: dict[str, Any], held_out: torch.Tensor) -> str:
    settings = results["settings"]

    def cell(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.2f}" + (f" ± {row[f'{name}_spread']:.2f}" if row["seeds"] > 1 else "")

    right = dict(zip(RIGHT, ("right answers", "right after recovery"), strict=True)) if "answers" in settings else {}
    rows = [
        {
            "method": row["method"],
            "removed": row["amount"] + (f" ({', '.join(map(str, row['layers']))})" if row["layers"] else ""),
            "parameters": f"{row['parameters']:,.0f}",
            "perplexity": cell(row, "before"),
            "after recovery": cell(row, "after"),
            **{title: cell(row, name) for name, title in right.items()},
        }
        for row in summary(results)
    ]
    answers = " Right answers: share of held-out records that have exact ones." if right else ""
    scores = [
        {"layer": layer, "IGIA": values[0], "gradient norm": values[1]}
        for layer, values in enumerate(zip(*results["layer_scores"].values(), strict=True))
    ]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return (
        f"{settings['model']} pruned on {settings['data']['name']}: perplexity on {settings['text']['name']}, "
        f"{held_out.numel() - len(held_out)} tokens in sequences of {settings['length']}. Importance: "
        f"{settings['importance_steps']} steps. Recovery: full fine-tuning on {settings['data']['name']}, "
        f"{settings['recovery_steps']} steps of {settings['batch_size']} sequences of {settings['length']} tokens, "
        f"learning rate {settings['learning_rate']:g}, the same for all.{answers} Several seeds: mean ± half the "
        "range.\n\n"
        f"{measure.table(rows)}\n\nScores of the layers:\n\n{measure.table(scores)}\n\nMachine: {machine}\n"
    )


def picture(results: dict[str, Any], path: Path) -> None:
    """Draw perplexity against parameters, before recovery (above) and after; hollow markers: merged or corrected."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    rows = summary(results)
    figure, panels = pyplot.subplots(
        2, 1, sharex=True, figsize=(9.5, 7), layout="constrained", gridspec_kw={"height_ratios": [2, 3]}
    )
    styles = zip(pyplot.get_cmap("tab10").colors, "osD^vP*Xhp", strict=True)
    style_of: dict[str, Any] = {}  # by rule; merged and corrected variants share it
    for name, line, axes in zip(("before", "after"), ("--", "-"), panels, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            sizes, values = [row["parameters"] / 1e6 for row in own], [row[name] for row in own]
            if method == REFERENCE:
                axes.plot(sizes, values, "k*", markersize=10, label=method)
                continue
            rule, _, changed = method.partition(", ")
            color, marker = style_of.get(rule) or style_of.setdefault(rule, next(styles))
            axes.plot(
                sizes, values, color=color, marker=marker, linestyle=line, linewidth=0.9 if name == "before" else 1.5,
                markersize=7, markerfacecolor="none" if changed else color, label=method,
            )  # fmt: skip
            seeds = [run for run in results["runs"] if run["method"] == method and run["seed"] is not None]
            axes.plot([r["parameters"] / 1e6 for r in seeds], [r[name] for r in seeds], ".", color=color, alpha=0.4)
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(True, which="both", color="0.93")
    panels[0].set_ylabel("perplexity as pruned")
    panels[1].set_ylabel("perplexity after recovery")
    panels[1].set_xlabel("parameters, millions")
    panels[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.8))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="study_pruning.py", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="model to prune: local folder or Hub id")
    parser.add_argument("--data", type=Path, required=True, help="text file for scoring, correction and recovery")
    parser.add_argument("--text", type=Path, required=True, help="held-out text file to measure on")
    parser.add_argument("--answers", type=Path, metavar="FOLDER", help="tasks/ of a pair: also count right answers")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("study"),
        metavar="FOLDER",
        help="folder to write the results to (default: study)",
    )
    parser.add_argument(
        "--seeds", type=comma_separated(int), default=[0, 1, 2], help="seeds of random layers (default: 0,1,2)"
    )
    parser.add_argument(
        "--counts", type=comma_separated(int), default=[1, 2, 3, 4], help="numbers of layers to drop (default: 1,2,3,4)"
    )
    parser.add_argument(
        "--ratios",
        type=comma_separated(float),
        default=[],
        help="shares of parameters to remove by width alone (default: the shares that the layers have)",
    )
    parser.add_argument("--importance-steps", type=int, default=40, help="steps of the importance run (default: 40)")
    parser.add_argument(
        "--recovery-steps", type=int, default=100, metavar="N", help="training steps of the recovery (default: 100)"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=1e-3, help="learning rate of the recovery (default: 1e-3)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step (default: 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence (default: 256)")
    parser.add_argument("--recovery-seed", type=int, default=0, help="seed for the order of the text (default: 0)")
    parser.add_argument(
        "--bf16", action="store_true", help="recover in mixed precision, which is faster on CPUs that support it"
    )
    parser.add_argument(
        "--tokens", type=int, default=16_384, help="largest number of tokens to measure on (default: 16384)"
    )
    parser.add_argument(
        "--calibration-samples", type=int, default=64, help="sequences for the correction (default: 64)"
    )
    parser.add_argument("--device", default="cpu", help="default: cpu")
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        study = Study(arguments)
        runs = study.runs()
        for number, run in enumerate(runs):
            print(f"{number + 1} of {len(runs)}", file=sys.stderr, end=" ", flush=True)
            study.do(run)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"study_pruning.py: error: {error}", file=sys.stderr)
        return 1
    study.save()
    picture(study.results, arguments.output / "study.png")
    print(markdown(study.results, study.held_out))
    print(f"Written: study.md, study.json and study.png in {arguments.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
