"""Measure quality against bytes: perplexity and KL divergence from the fine-tune, for each method, ratio and seed.

Writes quality.md (mean over seeds, and spread), quality.json (every run) and quality.png. Memory holds the fine-tune
and one other model at a time; next-token distributions are compared a few hundred tokens at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from measure import comma_separated
from transformers import AutoTokenizer
from transformers.utils import logging

from impart_hf import compress
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.methods import MethodConfig, method_class, method_names, settings_of

_TRAINING = ("calibration", "distill")


def configured(method: str, ratio: float, seed: int, options: dict[str, str]) -> MethodConfig:
    """Return a method's configuration; options that the method does not have are ignored."""
    config = method_class(method)
    values: dict[str, Any] = {"compression_ratio": ratio, "seed": seed}
    values |= {s.name: s.parse(options[s.name]) for s in settings_of(config) if s.name in options}
    return config(**values)


def benchmark(arguments: argparse.Namespace, options: dict[str, str]) -> dict[str, Any]:
    """Run the benchmark, and return the results of every run."""
    logging.disable_progress_bar()
    dtype = getattr(torch, arguments.dtype)
    reference = load(arguments.finetuned, dtype, arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.finetuned)
    blocks = measure.text_sequences(arguments.text, tokenizer, arguments.tokens, arguments.sequence_length)

    def measured(source: str) -> dict[str, float]:
        model = load(source, dtype, arguments.device)
        perplexity, divergence = evaluate(model, reference, blocks, arguments.batch_size)
        return {"perplexity": perplexity, "kl": divergence}

    perplexity, divergence = evaluate(reference, reference, blocks, arguments.batch_size)
    runs: list[dict[str, Any]] = []
    results = {
        "machine": measure.machine(arguments.device),
        "base": measured(arguments.base),
        "finetuned": {"perplexity": perplexity, "kl": divergence},
        "tokens": blocks.numel() - len(blocks),
        "sequence_length": blocks.shape[1],
        "text": arguments.text.name,
        "runs": runs,
    }
    for method in arguments.methods:
        name, *training = method.split("+")
        texts = {kind: getattr(arguments, kind) for kind in training}
        for ratio in arguments.ratios:
            for seed in arguments.seeds if method_class(name).drops_entries else arguments.seeds[:1]:
                config = configured(name, ratio, seed, options)
                run: dict[str, Any] = {"method": method, "asked": ratio, "seed": seed, "settings": config.to_dict()}
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        report = compress(
                            arguments.base, arguments.finetuned, Path(folder, "delta"), config, device=arguments.device,
                            calibration_samples=arguments.calibration_samples,
                            calibration_length=arguments.sequence_length, **texts,
                        )  # fmt: skip
                    except ValueError as error:  # the method cannot reach this ratio
                        print(f"{method} at {ratio:g}: {error}", file=sys.stderr)
                        break
                    run |= {"bytes": report.repository_bytes, "ratio": report.ratio, "seconds": report.seconds}
                    run |= {"checkpoint_bytes": report.checkpoint_bytes, "shortfall": report.shortfall}
                    run |= measured(str(Path(folder, "delta")))
                runs.append(run)
                print(f"{method} at {ratio:g}, seed {seed}: KL {run['kl']:.5f}", file=sys.stderr)
    return results


def markdown(results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    def line(name: str, asked: str, ratio: str, size: str, values: dict[str, Any]) -> dict[str, str]:
        several = values.get("seeds", 1) > 1

        def cell(key: str, digits: int) -> str:
            spread = f" ± {values[f'{key}_spread']:.{digits}f}" if several else ""
            return f"{values[key]:.{digits}f}{spread}"

        return {
            "model": name, "ratio asked": asked, "ratio": ratio, "bytes": size,
            "perplexity": cell("perplexity", 2), "KL, nats/token": cell("kl", 5),
        }  # fmt: skip

    lines = [line("fine-tuned", "", "1", "", results["finetuned"]), line("base", "", "", "", results["base"])]
    lines += [line(r["method"], f"{r['asked']:g}", f"{r['ratio']:.2f}", f"{r['bytes']:,.0f}", r) for r in rows]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return (
        f"{results['tokens']} tokens of {results['text']}, sequences of {results['sequence_length']}. KL is "
        "KL(fine-tuned || model). Mean over seeds ± half the range.\n\n"
        f"{measure.table(lines)}\n\nMachine: {machine}\n"
    )


def picture(results: dict[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw KL against bytes, both on logarithmic axes, with one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9.5, 4.8), layout="constrained")
    # 10 colors and 11 markers have no common divisor, so their pairs suffice for all methods
    styles = zip(itertools.cycle(pyplot.get_cmap("tab10").colors), itertools.cycle("osD^vP*Xhp<"))
    for method in dict.fromkeys(row["method"] for row in rows):
        color, marker = next(styles)
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bytes"])
        sizes, values = [row["bytes"] for row in own], [max(row["kl"], 1e-9) for row in own]
        axes.plot(sizes, values, color=color, marker=marker, markersize=5, label=method)
        seeds = [r for r in results["runs"] if r["method"] == method]
        if len({r["seed"] for r in seeds}) > 1:  # each seed is a faint point
            axes.plot([r["bytes"] for r in seeds], [max(r["kl"], 1e-9) for r in seeds], ".", color=color, alpha=0.4)
    if math.isfinite(results["base"]["kl"]):
        axes.axhline(results["base"]["kl"], color="0.35", linestyle="--", linewidth=1, label="base (no delta)")
    measure.bytes_axes(
        axes, [row["bytes"] for row in rows], [row["asked"] for row in rows], results["runs"][0]["checkpoint_bytes"]
    )
    axes.set_xlabel("bytes on disk of the delta repository")
    axes.set_ylabel("KL(fine-tuned || compressed), nats per token")
    axes.grid(True, which="major", color="0.9")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_quality.py", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="local folder or Hub id")
    parser.add_argument("finetuned", help="local folder or Hub id")
    parser.add_argument(
        "--text", type=Path, required=True, help="text to measure on, which the fine-tune was not trained on"
    )
    parser.add_argument(
        "--methods", type=comma_separated(str), default=["impart", "lowrank", "dare"], help="methods, comma-separated"
    )
    parser.add_argument(
        "--ratios", type=comma_separated(float), default=[8.0, 16.0, 32.0], help="compression ratios, comma-separated"
    )
    parser.add_argument("--seeds", type=comma_separated(int), default=[0], help="seeds, comma-separated")
    parser.add_argument(
        "--tokens", type=int, default=16_384, help="largest number of tokens to measure on (default: 16384)"
    )
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences evaluated at a time")
    parser.add_argument("--calibration", type=Path, help="calibration text for methods written as METHOD+calibration")
    parser.add_argument("--distill", type=Path, help="distillation text for methods written as METHOD+distill")
    parser.add_argument(
        "--calibration-samples", type=int, default=128, help="largest number of sequences of either text"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("quality"), metavar="FOLDER")
    parser.add_argument(
        "--method-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting, for the methods that have it",
    )
    arguments = parser.parse_args(argv)
    for method in arguments.methods:
        name, *training = method.split("+")
        if name not in method_names():
            parser.error(f"unknown method {name}; choose one of {', '.join(method_names())}")
        for kind in training:
            if kind not in _TRAINING or getattr(arguments, kind) is None:
                parser.error(f"{method}: only {' or '.join(_TRAINING)} may follow +, and --{kind} must name a text")
            if kind == "calibration" and not method_class(name).quantises:
                parser.error(f"{method}: {name} does not quantise, so it has no use for calibration text")
    options = dict(option.partition("=")[::2] for option in arguments.method_option)
    classes = [method_class(method.split("+")[0]) for method in arguments.methods]
    known = {field.name for config in classes for field in dataclasses.fields(config)}
    if strange := sorted(set(options) - known):
        parser.error(f"none of the methods has a setting '{strange[0]}'")
    try:
        results = benchmark(arguments, options)
    except (ValueError, OSError) as error:
        print(f"benchmark_quality.py: error: {error}", file=sys.stderr)
        return 1
    rows = measure.over_seeds(results["runs"])
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "quality.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "quality.md").write_text(markdown(results, rows), encoding="utf-8")
    if rows:
        picture(results, rows, arguments.output / "quality.png")
    print(markdown(results, rows))
    print(f"Written: quality.md, quality.json and quality.png in {arguments.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
