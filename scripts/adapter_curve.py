"""How far LoRA adapters of a delta are from the fine-tune, by rank: cut off, under a budget, and of bounded deltas.

python scripts/adapter_curve.py BASE FINETUNED OUT --text TEXT --report docs/results.md

One ratio, so that all deltas have equal bytes:
* `cut`: the adapter of the unbounded delta, with one rank for all matrices;
* `budget`: an adapter of as many bytes, in which each matrix has the rank that it is worth;
* `bounded`: the delta made with `--max-rank`, and its adapter, which is the whole delta.

OUT/results.jsonl has a line for each; running the command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import measure
from measure import comma_separated, machine, machine_line, table
from peft import PeftModel
from results_log import Log, write_between

from impart_hf import ImPartRdConfig, compress
from impart_hf.calibration.text import calibration_tokens, load_tokenizer
from impart_hf.evaluation.metrics import load
from impart_hf.evaluation.reference import Reference
from impart_hf.lora.export import export_lora
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.delta_file import DELTA_FILE
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository

MARKERS = "adapter curve"
KINDS = ("cut", "budget", "bounded")
_COLOURS = {"cut": "tab:grey", "budget": "tab:blue", "bounded": "tab:orange"}


def main(arguments: argparse.Namespace) -> None:
    """Measure what is missing, and write the report."""
    out: Path = arguments.output
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "ratio": arguments.ratio, "text": Path(arguments.text).name, "samples": arguments.samples,
        "length": arguments.length, "calibration": arguments.calibration,
    }  # fmt: skip
    log = Log(out / "results.jsonl", settings, "OUT")
    missing = [key for key in _jobs(arguments.ranks) if not log.has(key)]
    if missing:
        study = _Study(arguments)
        for key in missing:
            print(*key.values(), flush=True)
            log.append({**key, **study.measured(**key), "machine": machine()})
    rows = [line for key in _jobs(arguments.ranks) for line in log.lines if key.items() <= line.items()]
    print(table([_shown(row) for row in rows]))
    _picture(rows, out / "adapter-curve.png")
    if arguments.report is not None:
        text = f"{table([_shown(row) for row in rows])}\n\n{_machine_of(rows)}"
        write_between(arguments.report, MARKERS, text)
        shutil.copy(out / "adapter-curve.png", arguments.report.parent / "adapter-curve.png")


def _jobs(ranks: list[int]) -> Iterator[dict[str, Any]]:
    """Return every measurement: of the unbounded delta itself, rank 0, then of each kind and rank."""
    yield {"kind": "delta", "rank": 0}
    for kind in KINDS:
        for rank in ranks:
            yield {"kind": kind, "rank": rank}


class _Study:
    """Makes deltas and adapters, and compares them with the fine-tune."""

    def __init__(self, arguments: argparse.Namespace):
        self._arguments, self._out = arguments, Path(arguments.output)
        self._dtype = next(iter(_dtypes(arguments.finetuned)))
        tokenizer = load_tokenizer(arguments.finetuned, HubOptions())
        tokens = calibration_tokens(arguments.text, tokenizer, samples=arguments.samples, length=arguments.length)
        self._reference = Reference(load(arguments.finetuned, self._dtype, "cpu"), tokens, batch_size=4)

    def measured(self, kind: str, rank: int) -> dict[str, Any]:
        delta = self._delta(rank if kind == "bounded" else None)
        found: dict[str, Any] = {"delta_bytes": (delta / DELTA_FILE).stat().st_size}
        if kind in ("delta", "bounded"):
            found["delta_kl"] = self._reference.compare(load(str(delta), self._dtype, "cpu"))[1]
        if kind == "delta":
            base = load(self._arguments.base, self._dtype, "cpu")
            return found | {"base_kl": self._reference.compare(base)[1]}
        budget = self._adapter(delta, rank).adapter_bytes if kind == "budget" else None
        report = self._adapter(delta, 4 * rank if kind == "budget" else rank, budget)
        base = load(self._arguments.base, self._dtype, "cpu")
        adapted: Any = PeftModel.from_pretrained(base, self._out / "adapter").eval().get_base_model()
        return found | {
            "adapter_bytes": report.adapter_bytes,
            "relative_error": report.relative_error,
            "kl": self._reference.compare(adapted)[1],
        }

    def _delta(self, max_rank: int | None) -> Path:
        folder = self._out / f"delta-{max_rank or 'unbounded'}"
        if not folder.exists():
            method = ImPartRdConfig(compression_ratio=self._arguments.ratio, max_rank=max_rank)
            calibration = None if self._arguments.calibration == "none" else self._arguments.calibration
            compress(self._arguments.base, self._arguments.finetuned, folder, method, calibration=calibration)
        return folder

    def _adapter(self, delta: Path, rank: int, max_bytes: int | None = None) -> Any:
        shutil.rmtree(self._out / "adapter", ignore_errors=True)
        repository = open_repository(str(delta), HubOptions())
        return export_lora(repository, self._out / "adapter", rank, max_bytes=max_bytes)


def _dtypes(model: str) -> set[Any]:
    checkpoint = Checkpoint(model, HubOptions())
    return {checkpoint.dtype(name) for name in checkpoint.names()}


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    def megabytes(name: str) -> str:
        return f"{row[name] / 1e6:.1f}" if name in row else ""

    return {
        "": row["kind"],
        "rank": row["rank"] or "",
        "delta, MB": megabytes("delta_bytes"),
        "KL of the delta": row.get("delta_kl", ""),
        "adapter, MB": megabytes("adapter_bytes"),
        "KL of the adapter": row.get("kl", ""),
    }


def _machine_of(rows: list[dict[str, Any]]) -> str:
    machines = {", ".join(f"{name} {row['machine'][name]}" for name in ("cpu", "cores", "torch")) for row in rows}
    base = next(row["base_kl"] for row in rows if "base_kl" in row)
    said = f"KL(fine-tune || …), nats/token; of the base itself {measure.cell(base)}."
    return f"{said} Machine: {'; '.join(sorted(machines))}."


def _picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for kind in KINDS:
        points = [(row["rank"], row["kl"]) for row in rows if row["kind"] == kind]
        axes.plot(*zip(*points, strict=True), "o-", color=_COLOURS[kind], label=f"adapter, {kind}")
    whole = next(row["delta_kl"] for row in rows if row["kind"] == "delta")
    axes.axhline(whole, color="black", linestyle=":", label="unbounded delta, by any other way")
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="KL from the fine-tune, nats/token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("finetuned")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--text", required=True, help="text on which models are compared")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=32.0)
    parser.add_argument("--ranks", type=comma_separated(int), default=[16, 64, 256, 512])
    parser.add_argument("--calibration", default="built-in", help="calibration of the deltas; none for none")
    parser.add_argument("--report", type=Path, help="document whose table is replaced, as docs/results.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(machine_line())
    main(parsed())
