"""Quality against bytes: perplexity, and KL divergence from the fine-tune, of each method at each ratio and seed.

Writes quality.md (mean over seeds, and spread), quality.json (every run) and quality.png. The fine-tune stays loaded
beside one other model at a time; next-token distributions are compared a few hundred tokens at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from impart_hf import compress
from impart_hf.methods import MethodConfig, method_class, method_names

_CHUNK_ENTRIES = 1 << 25  # logits compared at a time: 128 MiB in float32


def blocks_of(tokenizer: Any, text: str, length: int, tokens: int) -> torch.Tensor:
    """int64 (blocks, length): the text cut into sequences, evenly over the whole of it if it has more than `tokens`.

    Every sequence begins with the tokenizer's begin-of-sequence token, if it has one.

    Raises:
        ValueError: if the text is shorter than one sequence.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    inner = length - len(begin)
    count = len(ids) // inner
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a sequence of {length}")
    blocks = torch.tensor(ids[: count * inner]).view(count, inner)
    wanted = max(1, tokens // length)
    if count > wanted:
        blocks = blocks[torch.arange(wanted) * count // wanted]
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(len(blocks), -1), blocks], 1)


def load(source: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, reference: PreTrainedModel, blocks: torch.Tensor, batch_size: int
) -> tuple[float, float]:
    """Perplexity of the blocks' tokens but the first, and mean KL(reference || model) in nats per token.

    The KL is NaN if the vocabularies differ in size.
    """
    loss, divergence, tokens = 0.0, 0.0, 0
    for rows in blocks.split(batch_size):
        rows = rows.to(model.device)
        targets = rows[:, 1:].reshape(-1)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        expected = logits if model is reference else reference(input_ids=rows, use_cache=False).logits[:, :-1]
        expected = expected.reshape(len(targets), -1)
        chunk = max(1, _CHUNK_ENTRIES // logits.shape[1])
        for part, other, target in zip(*(t.split(chunk) for t in (logits, expected, targets)), strict=True):
            found = part.float().log_softmax(-1)
            loss -= found.gather(1, target[:, None]).double().sum().item()
            if part.shape == other.shape:
                wanted = other.float().log_softmax(-1)
                divergence += (wanted.exp() * (wanted - found)).sum(-1).double().sum().item()
            else:
                divergence = math.nan
        tokens += len(targets)
    return math.exp(loss / tokens), divergence / tokens


def settings_of(method: str, ratio: float, seed: int, options: dict[str, str]) -> MethodConfig:
    """A method's configuration; of the options, those that it has."""
    config = method_class(method)
    values: dict[str, Any] = {"compression_ratio": ratio, "seed": seed}
    for field in dataclasses.fields(config):
        if field.name in options:
            text = options[field.name]
            kind = type(field.default)
            values[field.name] = text == "true" if kind is bool else kind(text) if kind in (int, float) else text
    return config(**values)


def benchmark(arguments: argparse.Namespace, options: dict[str, str]) -> dict[str, Any]:
    """Every run's numbers."""
    logging.disable_progress_bar()
    dtype = getattr(torch, arguments.dtype)
    reference = load(arguments.finetuned, dtype, arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.finetuned)
    text = arguments.text.read_text(encoding="utf-8")
    blocks = blocks_of(tokenizer, text, arguments.sequence_length, arguments.tokens)

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
        for ratio in arguments.ratios:
            for seed in arguments.seeds:
                config = settings_of(method, ratio, seed, options)
                run: dict[str, Any] = {"method": method, "asked": ratio, "seed": seed, "settings": config.to_dict()}
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        report = compress(
                            arguments.base, arguments.finetuned, Path(folder, "delta"), config, device=arguments.device
                        )
                    except ValueError as error:  # such a ratio is out of this method's reach
                        print(f"{method} at {ratio:g}: {error}", file=sys.stderr)
                        break
                    run |= {"bytes": report.repository_bytes, "ratio": report.ratio, "seconds": report.seconds}
                    run |= {"checkpoint_bytes": report.checkpoint_bytes, "shortfall": report.shortfall}
                    run |= measured(str(Path(folder, "delta")))
                runs.append(run)
                print(f"{method} at {ratio:g}, seed {seed}: KL {run['kl']:.5f}", file=sys.stderr)
    return results


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each method and ratio: mean over the seeds, and half the range between them."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        groups.setdefault((run["method"], run["asked"]), []).append(run)
    rows = []
    for (method, asked), runs in groups.items():
        row: dict[str, Any] = {"method": method, "asked": asked, "seeds": len(runs)}
        for name in ("bytes", "ratio", "perplexity", "kl"):
            values = [run[name] for run in runs]
            row[name], row[f"{name}_spread"] = statistics.fmean(values), (max(values) - min(values)) / 2
        rows.append(row)
    return rows


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
    """KL against bytes, both logarithmic, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    styles = zip(pyplot.get_cmap("tab10").colors, "osD^vP*Xhp", strict=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        color, marker = next(styles)
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bytes"])
        sizes, values = [row["bytes"] for row in own], [max(row["kl"], 1e-9) for row in own]
        axes.plot(sizes, values, color=color, marker=marker, markersize=5, label=method)
        seeds = [r for r in results["runs"] if r["method"] == method]
        if len({r["seed"] for r in seeds}) > 1:  # each seed's own point, faint
            axes.plot([r["bytes"] for r in seeds], [max(r["kl"], 1e-9) for r in seeds], ".", color=color, alpha=0.4)
    if math.isfinite(results["base"]["kl"]):
        axes.axhline(results["base"]["kl"], color="0.35", linestyle="--", linewidth=1, label="base (no delta)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({round(math.log2(row["bytes"])) for row in rows})
    axes.set_xticks([2.0**tick for tick in range(ticks[0] - 1, ticks[-1] + 2)])
    axes.set_xlim(min(r["bytes"] for r in rows) / 1.2, max(r["bytes"] for r in rows) * 1.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _human(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes on disk of the delta repository")
    axes.set_ylabel("KL(fine-tuned || compressed), nats per token")
    whole = results["runs"][0]["checkpoint_bytes"]
    top = axes.secondary_xaxis("top", functions=(lambda x: whole / _positive(x), lambda x: whole / _positive(x)))
    asked = sorted({row["asked"] for row in rows})
    top.set_xticks(asked, [f"{value:g}x" for value in asked])
    top.minorticks_off()
    top.set_xlabel("compression ratio")
    axes.grid(True, which="major", color="0.9")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _positive(values: Any) -> Any:
    import numpy as np

    return np.maximum(values, 1e-9)  # matplotlib tries zero


def _human(size: float) -> str:
    power = min(3, int(math.log(size, 1024)))
    return f"{size / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _list(kind: Any) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_quality.py", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="local folder or Hub id")
    parser.add_argument("finetuned", help="local folder or Hub id")
    parser.add_argument("--text", type=Path, required=True, help="what to measure on: held out from the fine-tuning")
    parser.add_argument("--methods", type=_list(str), default=["impart", "lowrank", "dare"], help="comma-separated")
    parser.add_argument("--ratios", type=_list(float), default=[8.0, 16.0, 32.0], help="comma-separated")
    parser.add_argument("--seeds", type=_list(int), default=[0], help="comma-separated")
    parser.add_argument("--tokens", type=int, default=16_384, help="at most so many (default: 16384)")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("quality"), metavar="FOLDER")
    parser.add_argument(
        "--method-option", action="append", default=[], metavar="NAME=VALUE", help="a setting of those that have it"
    )
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.methods) - set(method_names())):
        parser.error(f"unknown method {unknown[0]}; there are {', '.join(method_names())}")
    options = dict(option.partition("=")[::2] for option in arguments.method_option)
    known = {field.name for method in arguments.methods for field in dataclasses.fields(method_class(method))}
    if strange := sorted(set(options) - known):
        parser.error(f"none of the methods has a setting '{strange[0]}'")
    try:
        results = benchmark(arguments, options)
    except (ValueError, OSError) as error:
        print(f"benchmark_quality.py: error: {error}", file=sys.stderr)
        return 1
    rows = summary(results)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "quality.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "quality.md").write_text(markdown(results, rows), encoding="utf-8")
    if rows:
        picture(results, rows, arguments.output / "quality.png")
    print(markdown(results, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
