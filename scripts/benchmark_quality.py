"""Measure quality against bytes: perplexity and KL divergence from the fine-tune, for each method, ratio and seed.

With --answers, also the share of right answers to held-out records that have exact ones, as scripts/exact_answers.py
and scripts/train_pair.py write them.

Writes quality.md (mean over seeds, and spread), quality.json (every run) and quality.png. Memory holds the fine-tune
and one other model at a time; next-token distributions are compared a few hundred tokens at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from answer_quality import binomial_error
from exact_answers import exact_score, read_tasks
from measure import comma_separated
from quality_curves import ANSWERS, NUMBERS, over_seeds, picture
from transformers import AutoTokenizer
from transformers.utils import logging

from impart_hf import compress
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.methods import MethodConfig, method_class, method_names, settings_of

STEPS = ("calibration", "distill")


def parts_of(name: str, texts: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the method and the steps of a name such as "impart-rd+calibration+distill".

    Args:
        texts: the text of each kind of step, or None.

    Raises:
        ValueError: if there is no such method or step, the method has no use for it, or its text is None.
    """
    method, *steps = name.split("+")
    if method not in method_names():
        raise ValueError(f"unknown method {method}; choose one of {', '.join(method_names())}")
    for kind in steps:
        if kind not in STEPS or texts[kind] is None:
            raise ValueError(f"{name}: only {' or '.join(STEPS)} may follow +, and --{kind} must name a text")
        if kind == "calibration" and not method_class(method).quantises:
            raise ValueError(f"{name}: {method} does not quantise, so it has no use for calibration text")
    return method, steps


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

    records = read_tasks(arguments.answers) if arguments.answers else []

    def measured(model: Any) -> dict[str, float]:
        perplexity, divergence = evaluate(model, reference, blocks, arguments.batch_size)
        answers = {ANSWERS: exact_score(model, tokenizer, records).share} if records else {}
        return {"perplexity": perplexity, "kl": divergence, **answers}

    runs: list[dict[str, Any]] = []
    results = {
        "machine": measure.machine(arguments.device),
        "base": measured(load(arguments.base, dtype, arguments.device)),
        "finetuned": measured(reference),
        "tokens": blocks.numel() - len(blocks),
        "sequence_length": blocks.shape[1],
        "text": arguments.text.name,
        "answers": len(records),
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
                    run |= measured(load(str(Path(folder, "delta")), dtype, arguments.device))
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
            **({"right answers": cell(ANSWERS, 3)} if ANSWERS in values else {}),
        }  # fmt: skip

    lines = [line("fine-tuned", "", "1", "", results["finetuned"]), line("base", "", "", "", results["base"])]
    lines += [line(r["method"], f"{r['asked']:g}", f"{r['ratio']:.2f}", f"{r['bytes']:,.0f}", r) for r in rows]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    count = results["answers"]
    answers = (
        f" Right answers: share of {count} held-out records, answered greedily; standard error up to "
        f"{binomial_error(0.5, count):.3f}."
        if count
        else ""
    )
    return (
        f"{results['tokens']} tokens of {results['text']}, sequences of {results['sequence_length']}. KL is "
        f"KL(fine-tuned || model).{answers} Mean over seeds ± half the range.\n\n"
        f"{measure.table(lines)}\n\nMachine: {machine}\n"
    )


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
    parser.add_argument("--answers", type=Path, metavar="FOLDER", help="tasks/ of a pair: also count right answers")
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
    try:
        for name in arguments.methods:
            parts_of(name, vars(arguments))
    except ValueError as error:
        parser.error(str(error))
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
    rows = over_seeds(results["runs"], NUMBERS + ((ANSWERS,) if results["answers"] else ()))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "quality.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "quality.md").write_text(markdown(results, rows), encoding="utf-8")
    if rows:
        shares = {name: results[name][ANSWERS] for name in ("base", "finetuned")} if results["answers"] else None
        picture(results["runs"], results["base"]["kl"], arguments.output / "quality.png", shares)
    print(markdown(results, rows))
    print(f"Written: quality.md, quality.json and quality.png in {arguments.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
