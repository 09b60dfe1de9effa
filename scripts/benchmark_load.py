"""Measure how long loading a delta repository takes, against loading the dense fine-tune, and where the time goes.

Every load is timed in a process of its own, without imports, until every page of every parameter has been read. That
matters because files are mapped: a dense load that touched nothing would have read nothing. "cold" means that the
pages of all weight files were dropped from the page cache first (posix_fadvise DONTNEED); "warm" means that they are in
it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from impart_hf import DeltaCompressedForCausalLM, compress
from impart_hf.evaluation.memory import PeakMemory
from impart_hf.methods import method_class, method_names
from impart_hf.modeling import compact_planes, delta_decode
from impart_hf.modeling.checksums import tensor_checksum
from impart_hf.modeling.configuration_delta_compressed import DeltaCompressedConfig
from impart_hf.modeling.delta_file import RECORD_SUFFIX
from impart_hf.modeling.delta_record import FACTORED, MAX_THRESHOLD, parse_record
from impart_hf.modeling.delta_repository import DeltaRepository
from impart_hf.modeling.model_files import HubOptions
from impart_hf.modeling.modeling_delta_compressed import inner_class
from impart_hf.modeling.seeded_mask import kept_positions

_PAGE = 4096


def load_timed(source: str, device: str) -> tuple[Any, dict[str, float]]:
    """Load a model in bfloat16 and touch all of it.

    Returns:
        The model; the seconds; the peak of anonymous memory beyond the model itself.
    """
    inner_class(_text_config(source))  # the class is imported lazily otherwise, which would be timed
    options = {} if device == "cpu" else {"device_map": device}
    with PeakMemory() as memory:
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
        total = 0.0
        for parameter in model.parameters():
            total += float(parameter.detach().view(-1)[:: _PAGE // parameter.element_size()].float().sum())
        measure.synchronize(device)
        seconds = time.perf_counter() - started
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == "cpu")
    # A dense model's parameters are mapped files, which are not anonymous memory; a decoded model's are.
    peak = memory.bytes - min(size, max(0, memory.grown))
    return model, {"seconds": seconds, "peak": peak, "checksum": total}


def _text_config(source: str) -> Any:
    config = AutoConfig.from_pretrained(source)
    return config.text_config if isinstance(config, DeltaCompressedConfig) else config


def timed_load(source: str, device: str) -> dict[str, float]:
    """Return what `load_timed` measures, and the seconds it takes a delta's model to compare its weights.

    The comparison with those loaded reads what loading read to take its checksums.
    """
    model, found = load_timed(source, device)
    started = time.perf_counter()
    changed = isinstance(model, DeltaCompressedForCausalLM) and model.weights_changed()
    return found | {"compared": time.perf_counter() - started, "checksum": found["checksum"] + changed}


def compare_loads(sources: dict[str, list[Path]], device: str, repeats: int) -> list[dict[str, Any]]:
    """Return median load times; the others are compared with the first source.

    Args:
        sources: by name, the folder to load, followed by other folders whose files it reads.
    """
    rows: list[dict[str, Any]] = []
    for cache in ("cold", "warm"):
        times: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
        for _ in range(repeats):
            for name, folders in sources.items():
                if cache == "cold":
                    measure.drop_page_cache(folders)
                # The last cold loads leave all files in the page cache for the first warm loads
                times[name].append(measure.in_fresh_process(__file__, {"load": str(folders[0]), "device": device}))
        medians = {name: statistics.median(t["seconds"] for t in runs) for name, runs in times.items()}
        dense = next(iter(medians.values()))
        for name, runs in times.items():
            rows.append(
                {
                    "page cache": cache,
                    "loaded": name,
                    "seconds (median)": medians[name],
                    "fastest": min(t["seconds"] for t in runs),
                    "of the dense load": medians[name] / dense,
                    "weights compared, of the load": statistics.median(t["compared"] for t in runs) / medians[name],
                    "peak": max(t["peak"] for t in runs),
                }
            )
    return rows


def breakdown(repository: Path, names: Sequence[str], device: str, repeats: int) -> list[dict[str, Any]]:
    """Return the milliseconds of each step of decoding, for some tensors of a repository."""
    delta = DeltaRepository(str(repository), DeltaCompressedConfig.from_pretrained(repository), HubOptions())
    rows = []
    for name in names:
        if f"{name}{RECORD_SUFFIX}" not in delta.file:  # equal to the base's, or the model has none
            continue
        on_disk = delta.base.tensor(name)
        base = on_disk.to(device)
        data = delta.file.read_records(name)
        record, _ = parse_record(data, tuple(base.shape), name)
        finetuned = torch.empty_like(base)

        def best(work: Any) -> float:
            return 1000 * measure.best_seconds(work, repeats, device)

        def masks(record: Any = record) -> None:
            numbers = np.flatnonzero(record.thresholds < MAX_THRESHOLD)
            step = max(1, compact_planes.PIECE_ENTRIES // min(record.plane_rows(side) for side in range(record.sides)))
            for side in range(record.sides):
                for first in range(0, len(numbers), step):
                    own = numbers[first : first + step]
                    rows, limits = record.plane_rows(side), record.thresholds[own]
                    kept_positions(record.mask_seed, side, limits, rows, device, own)

        mask_time = best(masks)
        plane_time = best(lambda r=record, n=name: delta_decode.decode_planes(r, n, device))
        all_time = best(lambda d=data, b=base, n=name: delta_decode.add_delta(b, d, n, b.dtype))
        # In tiles, as the decoder does on a CPU
        step = delta_decode.TILE_ROWS if device == "cpu" else delta_decode.DEVICE_TILE_ROWS
        cast_time = best(
            lambda o=finetuned, b=base, n=step: [
                to.copy_(rows.to(torch.float32, copy=True)) for to, rows in zip(o.split(n), b.split(n), strict=True)
            ]
        )
        row = {
            "tensor": name.removeprefix("model.").removesuffix(".weight"),
            "rank": record.rank if record.layout == FACTORED else "direct",
            "kept": float(record.keep_ratios().mean()) if record.plane_columns else 0.0,
            "masks": mask_time,
            "unpacking": plane_time - mask_time,
            "product": all_time - plane_time - cast_time,
            "add and cast": cast_time,
            "peak, of the matrix in float32": peak_bytes(data, base, name) / (4 * base.numel()),
            "base checksum": best(lambda b=on_disk: tensor_checksum(b)),
            "CRC of the delta": best(lambda n=name: delta.file.read_records(n)),
            "whole": best(lambda n=name: delta.tensor(n, device)),
        }
        rows.append(
            {
                key: round(v, 3 if key in ("kept", "peak, of the matrix in float32") else 1)
                if isinstance(v, float)
                else v
                for key, v in row.items()
            }
        )
    return rows


def peak_bytes(data: np.ndarray, base: torch.Tensor, name: str) -> int:
    """Return the most bytes of tensors that decoding a tensor holds at once beside base and result, on base's device.

    They are counted by torch's profiler; on a CPU only, elsewhere the answer is 0.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = delta_decode.add_delta(base, data, name, base.dtype)
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(0, int(np.cumsum(changes or [0]).max()) - out.nbytes)


def product_times(sizes: Sequence[tuple[int, int, int]], repeats: int) -> list[dict[str, Any]]:
    """Return the milliseconds of a product (m, k) (k, n) on the CPU: of float32, and of narrower numbers.

    Bfloat16 needs two products if U is levels, which are exact in bfloat16 as odd integers, and V is split in a high
    and a low part; three otherwise (docs/FORMAT.md, "Rounding"). torch rounds each of them to bfloat16 on a CPU, so
    these times are only what the processor could do. Products of 8-bit integers are exact; V would need three.
    """
    rows = []
    for m, n, k in sizes:
        generator = torch.Generator().manual_seed(0)
        u, v = torch.randn(k, m, generator=generator), torch.randn(k, n, generator=generator)
        parts = [u.to(torch.bfloat16), v.to(torch.bfloat16)]
        whole = [torch.randint(-127, 128, (size, k), generator=generator).to(torch.int8) for size in (m, n)]
        products = {
            "float32": lambda u=u, v=v: u.t() @ v,
            "one of bfloat16": lambda parts=parts: parts[0].t() @ parts[1],
            "splitting V": lambda v=v: (v - v.to(torch.bfloat16)).to(torch.bfloat16),
            "one of int8": lambda whole=whole: torch._int_mm(whole[0], whole[1].t()),
        }
        times = {name: 1000 * measure.best_seconds(work, repeats) for name, work in products.items()}
        rows.append({"m, n, k": f"{m}, {n}, {k}", **times})
    return rows


def multiply_add_costs(size: int, repeats: int) -> list[dict[str, float]]:
    """Return the time per multiply-add of a sparse product over that of a dense one, at several keep ratios.

    The decoder should use sparse products where the whole product takes clearly less time.
    """
    rank = max(1, size // 8)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(size, rank, generator=generator)
    other = torch.randn(rank, size, generator=generator)
    dense_time = measure.best_seconds(lambda: dense @ other, repeats)
    rows = []
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    for kept in (0.01, 0.02, 0.04, 0.1, 0.2):
        drawn = torch.rand(size, rank, generator=generator) < kept
        sparse = torch.where(drawn, dense, torch.zeros(())).to_sparse_csr()
        sparse_time = measure.best_seconds(lambda sparse=sparse: sparse @ other, repeats)
        factor = sparse_time / dense_time * dense.numel() / max(1, sparse.values().numel())
        rows.append({"kept": kept, "sparse product, of a dense one's time": sparse_time / dense_time, "factor": factor})
    return rows


def benchmark(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    config = measure.llama_config(arguments.layers, tiny=arguments.tiny)
    if arguments.pair:
        base, finetuned = arguments.pair
        largest = measure.largest_tensor(base)
    else:
        base, finetuned, largest = measure.write_synthetic_pair(folder, config)
    sources = {"dense fine-tune": [finetuned]}
    for method in arguments.methods:
        output = folder / method
        settings = method_class(method)(compression_ratio=arguments.ratio)
        compress(str(base), str(finetuned), output, settings, device=arguments.device)
        sources[f"{method} delta"] = [output, base]
        print(f"made the {method} delta", file=sys.stderr)
    loads = compare_loads(sources, arguments.device, arguments.repeats)
    for row in loads:
        row["peak, of the largest tensor in float32"] = round(row.pop("peak") / (4 * largest), 2)
    names = [f"model.layers.0.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    names.append("lm_head.weight")
    return {
        "machine": measure.machine(arguments.device),
        "ratio": arguments.ratio,
        "model": str(finetuned) if arguments.pair else f"LLaMA-7B shapes, {arguments.layers} layers",
        "loads": loads,
        "decoding": {m: breakdown(folder / m, names, arguments.device, arguments.repeats) for m in arguments.methods},
        "products": product_times(
            [(256, 320, 32)] if arguments.tiny else [(4096, 4096, 775), (4096, 4096, 388), (2048, 640, 200)],
            arguments.repeats,
        ),
        "sparse products": multiply_add_costs(config.hidden_size, arguments.repeats),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_load.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair", nargs=2, type=Path, metavar=("BASE", "FINETUNED"),
        help="local folders of a real pair, in place of the synthetic one",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the synthetic model (default: 2)")
    parser.add_argument("--ratio", type=float, default=32.0, help="compression ratio (default: 32)")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["impart", "lowrank", "dare"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="runs of every measurement (default: 5)")
    parser.add_argument("--work", type=Path, help="folder for the models, a few GB (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--tiny", action="store_true", help="use tiny matrices, to try out the script")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        task = json.loads(arguments.worker)
        measure.report_result(timed_load(task["load"], task["device"]))
        return 0
    if unknown := sorted(set(arguments.methods) - set(method_names())):
        parser.error(f"unknown method {unknown[0]}; choose one of {', '.join(method_names())}")
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        results = benchmark(Path(folder), arguments)
    print(measure.machine_line(arguments.device))
    print(f"\nLoading, {results['model']}, ratio {arguments.ratio:g}\n")
    print(measure.table(results["loads"]))
    for method, rows in results["decoding"].items():
        print(f"\nDecoding, {method}, milliseconds\n")
        print(measure.table(rows))
    print("\nProducts on the CPU, milliseconds\n")
    print(measure.table(results["products"]))
    print("\nSparse products on this processor (factor: time of a multiply-add over a dense one's)\n")
    print(measure.table(results["sparse products"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
