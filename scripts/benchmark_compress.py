"""Measure compression: time, accuracy of the singular value decomposition, and memory.

Three measurements: the decomposition of a synthetic delta, for as many components as each method needs, and values
before vectors, as impart-rd has it, against `torch.linalg.svd` of the same matrix; the time to encode the delta by each
method; and the peak of anonymous memory
during a whole compression of LLaMA-7B-shaped layers. The delta's singular values fall as k^-0.5 into a floor of noise
at a tenth of the largest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from impart_hf import compress
from impart_hf.coding.spectrum import leading_components, singular_values
from impart_hf.coding.svd import leading_svd
from impart_hf.distillation import DistillSettings
from impart_hf.evaluation.memory import PeakMemory
from impart_hf.methods import method_class, method_names

SHARES = 0.1, 0.25, 0.4  # of the shorter side; impart-rd stores about a quarter of the components at ratio 32


def wanted_ranks(sigma: torch.Tensor, rows: int, columns: int, ratio: float) -> dict[str, int]:
    """Return how many components of a matrix of 16-bit numbers each factored method needs at a ratio."""
    spectrum = sigma.double().cpu().numpy()
    classes = [method_class(name) for name in method_names()]
    methods = [c(compression_ratio=ratio) for c in classes if c.factored and not c.shares_budget]
    budget = int(2 * rows * columns / ratio)
    return {m.name: max(1, min(len(spectrum), m.rank_for(spectrum, rows, columns, budget))) for m in methods}


def accuracy(delta: torch.Tensor, parts: Sequence[torch.Tensor], exact: torch.Tensor) -> dict[str, float]:
    """Return the errors of the leading components against the exact singular values."""
    u, sigma, v = parts
    rank = len(sigma)
    remains = float((delta - (u * sigma) @ v.t()).double().norm())
    optimum = float(exact[rank:].double().norm())
    eye = torch.eye(rank, device=delta.device)
    return {
        "excess error": remains / optimum - 1 if optimum else 0.0,  # with all components there is no remaining error
        "singular values": float((sigma / exact[:rank] - 1).abs().max()),
        "orthogonality": float(torch.stack([(w.t() @ w - eye).abs().max() for w in (u, v)]).max()),
    }


def decompositions(shape: tuple[int, int], ratios: Sequence[float], device: str, repeats: int) -> list[dict[str, Any]]:
    """Time `leading_svd` and the passes of impart-rd against `torch.linalg.svd`: seconds (best of several runs)."""
    delta = measure.synthetic_delta(*shape, seed=0, device=device)
    exact = torch.linalg.svdvals(delta.double())
    name = f"{shape[0]}x{shape[1]}"
    full = measure.best_seconds(lambda: torch.linalg.svd(delta, full_matrices=False), repeats, device)
    rows = [
        {"matrix": name, "for": "torch.linalg.svd", "components": min(shape), "seconds": full, "times as fast": 1.0}
    ]
    for ratio in ratios:
        for method, rank in wanted_ranks(exact, *shape, ratio).items():
            seconds = measure.best_seconds(lambda rank=rank: leading_svd(delta, rank), repeats, device)
            row = {"matrix": name, "for": f"{method} at {ratio:g}", "components": rank, "seconds": seconds}
            row["times as fast"] = full / seconds
            rows.append(row | accuracy(delta, leading_svd(delta, rank), exact.float()))
    known = singular_values(delta)
    seconds = measure.best_seconds(lambda: singular_values(delta), repeats, device)
    values = {"matrix": name, "for": "values alone", "components": min(shape), "seconds": seconds}
    error = float(np.abs(known / exact.cpu().numpy() - 1)[: min(shape) // 2].max())
    rows.append(values | {"times as fast": full / seconds, "singular values": error})
    for share in SHARES:
        rank = max(1, int(share * min(shape)))
        seconds = measure.best_seconds(lambda rank=rank: leading_components(delta, rank, known), repeats, device)
        row = {"matrix": name, "for": "vectors, values known", "components": rank, "seconds": seconds}
        row["times as fast"] = full / seconds
        rows.append(row | accuracy(delta, leading_components(delta, rank, known), exact.float()))
    return rows


def encodings(shape: tuple[int, int], ratio: float, device: str, repeats: int) -> list[dict[str, Any]]:
    """Time the encoding of one matrix by each method: seconds (best of several runs) and bytes."""
    delta = measure.synthetic_delta(*shape, seed=0, device=device)
    rows = []
    for name in method_names():
        config = method_class(name)(compression_ratio=ratio)
        budget = max(int(2 * delta.numel() / ratio), config.least_bytes(*shape))
        seconds = measure.best_seconds(lambda c=config, b=budget: c.encode(delta, b, 1), repeats, device)
        size = len(config.encode(delta, budget, 1).data)
        rows.append({"method": name, "matrix": f"{shape[0]}x{shape[1]}", "seconds": seconds, "bytes": size})
    return rows


def whole_compression(task: dict[str, Any]) -> dict[str, Any]:
    """Compress a pair on disk in this process.

    Args:
        task: base, finetuned, output, device, the method's name and its `settings`; optionally `training`, additional
            arguments of `compress`, and `distill_settings`.

    Returns:
        The seconds, the peak of anonymous memory, and the repository's bytes; or {"failed": why} if the method cannot
        do what is asked.
    """
    # Memory that is allocated once, when a device or library is first used, is not counted
    leading_svd(torch.from_numpy(np.eye(8, dtype=np.float32)).to(task["device"]), 1)
    training = dict(task.get("training", {}))
    if "distill_settings" in task:
        training["distill_settings"] = DistillSettings(**task["distill_settings"])
    try:
        method = method_class(task["method"])(**task["settings"])
        with PeakMemory() as memory:
            report = compress(
                task["base"], task["finetuned"], task["output"], method, device=task["device"], **training
            )
    except ValueError as error:
        return {"failed": str(error)}
    sizes = {"bytes": report.repository_bytes, "sidecar_bytes": report.sidecar_bytes}
    sizes |= {"reader_bytes": report.reader_bytes, "checkpoint_bytes": report.checkpoint_bytes}
    return {
        "seconds": report.seconds,
        "peak": memory.bytes,
        "ratio": report.ratio,
        "shortfall": report.shortfall,
    } | sizes


def memory_of_compression(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        config = measure.llama_config(arguments.layers, tiny=arguments.tiny)
        base, finetuned, largest = measure.write_synthetic_pair(folder, config)
        for method in arguments.methods:
            task = {"base": str(base), "finetuned": str(finetuned), "output": str(folder / method), "method": method}
            task |= {"settings": {"compression_ratio": arguments.ratios[-1]}, "device": arguments.device}
            result = measure.in_fresh_process(__file__, task)
            if "failed" in result:
                raise ValueError(f"{method}: {result['failed']}")
            row = {"method": method, "layers": arguments.layers, "seconds": result["seconds"], "ratio": result["ratio"]}
            row["peak bytes"] = result["peak"]
            row["of the largest tensor in float32"] = result["peak"] / (4 * largest)
            rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_compress.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="side of the square matrix (default: 4096)")
    parser.add_argument("--wide", type=int, help="columns of the wide matrix (default: 11008/4096 of --size)")
    parser.add_argument(
        "--ratios", type=lambda text: [float(part) for part in text.split(",")], default=[16.0, 32.0, 64.0],
        help="compression ratios, comma-separated (default: 16,32,64); the last is used for encoding and memory",
    )  # fmt: skip
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["impart", "lowrank", "dare"])
    parser.add_argument(
        "--layers", type=int, default=1, help="decoder layers of the pair for the memory measurement; 0: skip it"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="folder for the models, a few GB (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--tiny", action="store_true", help="use tiny layers, to try out the script")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        measure.report_result(whole_compression(json.loads(arguments.worker)))
        return 0
    if unknown := sorted(set(arguments.methods) - set(method_names())):
        parser.error(f"unknown method {unknown[0]}; choose one of {', '.join(method_names())}")
    square = (arguments.size, arguments.size)
    wide = (arguments.size, arguments.wide or round(arguments.size * 11008 / 4096))
    device, repeats, ratios = arguments.device, arguments.repeats, arguments.ratios
    results: dict[str, Any] = {
        "machine": measure.machine(device),
        "decomposition": [row for shape in (square, wide) for row in decompositions(shape, ratios, device, repeats)],
        "encoding": encodings(square, ratios[-1], device, repeats),
        "memory": memory_of_compression(arguments) if arguments.layers else [],
    }
    titles = {
        "decomposition": "Leading singular components: seconds, and errors relative to exact values",
        "encoding": f"Encoding one matrix at ratio {ratios[-1]:g}",
        "memory": f"A whole compression at ratio {ratios[-1]:g}: peak anonymous memory",
    }
    print(measure.machine_line(device))
    for key, title in titles.items():
        if results[key]:
            # The row of torch.linalg.svd comes first but has no accuracy, so columns are collected from all rows
            columns = dict.fromkeys(column for row in results[key] for column in row)
            print(f"\n{title}\n\n{measure.table([dict.fromkeys(columns, '') | row for row in results[key]])}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
