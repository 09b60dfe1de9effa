"""The sections of gpu_check.py that measure, in the order of their worth; each is a function of `Notes`."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import benchmark_load
import measure
import torch
from gpu_correctness import kernels_against_float64
from gpu_exact import time_exact
from gpu_material import (
    FLOAT32_ERROR,
    RATIO,
    Notes,
    as_array,
    distance,
    every_kind,
    expect,
    kernels_run,
    levels_record,
    over,
    random_record,
    ways,
    write_delta,
)

from impart_hf.coding.spectrum import decomposed
from impart_hf.compression.batches import Batches
from impart_hf.compression.encoding import bytes_for
from impart_hf.methods import EncodingTask, ImPartRdConfig, method_class
from impart_hf.modeling import delta_repository, triton_decode
from impart_hf.modeling.delta_decode import add_delta, decode_record
from impart_hf.modeling.delta_record import FACTORED, Record, pack_record
from impart_hf.modeling.model_files import HubOptions
from impart_hf.modeling.packed_deltas import PackedDeltas, RowGroups
from impart_hf.modeling.triton_planes import pack
from impart_hf.repository.open import open_repository

ROOT = Path(__file__).resolve().parents[1]


def decode(notes: Notes) -> None:
    side = 128 if notes.small else 4096
    square = every_kind(side, side, notes.device) | {
        "levels": levels_record(side, side),
        "levels, high rank": random_record(side, side, FACTORED, [(2 * side // 5, 1, 1, 1)]),
    }
    wide = "levels", levels_record(*((192, 128) if notes.small else (11008, 4096)))
    notes.attempt("decode of 4096x4096, levels", _time_decode, "levels", square["levels"])
    notes.attempt("decode of 11008x4096, levels", _time_decode, *wide)
    notes.attempt("exact records", time_exact)
    notes.attempt("output projection", _output_projection)
    for name, record in square.items():
        if name != "levels":
            notes.attempt(f"decode of 4096x4096, {name}", _time_decode, name, record)
    if not notes.small:
        notes.attempt("errors of 4096x4096", kernels_against_float64, "levels", square["levels"])


def _time_decode(notes: Notes, name: str, record: Record) -> None:
    m, n = record.rows, record.columns
    base = torch.randn(m, n, device=notes.device).to(notes.dtype)
    data, with_kernels = as_array(record), kernels_run(notes)
    fields = {"record": name, "shape": f"{m}x{n}", "rank": record.rank or None}
    for by, kernels in (("torch", False), ("kernels", True)):
        if kernels and not with_kernels:
            continue
        work = partial(add_delta, base, data, name, notes.dtype, kernels=kernels)
        took, peak = notes.milliseconds(work), notes.peak_bytes(work)
        share = over(peak and peak - base.nbytes, 4 * m * n)  # beyond the base and the result, which has its size
        notes.row("decode", **fields, by=by, milliseconds=took, extra_memory_of_float32=share)
        if name == "levels":
            notes.goal(f"decode of {m}x{n} by {by}, memory beyond base and result, of float32", share, most=0.3)
            notes.goal(f"decode of {m}x{n} by {by}, milliseconds", took, most=m * n / 4096**2)
    if not with_kernels:
        return
    notes.row("decode", **fields, by="copying and counting", milliseconds=notes.milliseconds(
        lambda: pack(record, name, notes.device)
    ))  # fmt: skip
    packed, out = pack(record, name, notes.device), torch.empty_like(base)
    bad = torch.zeros(1, dtype=torch.int32, device=notes.device)
    for precision, fused in ways(notes, record):
        launch = partial(triton_decode.launch, base, out, bad, record, packed, precision, fused)
        by = f"kernels alone, {precision}{', fused' if fused else ''}"
        notes.attempt(f"{name}, {by}", lambda notes, launch=launch, by=by: notes.row(
            "decode", **fields, by=by, milliseconds=notes.milliseconds(launch)
        ))  # fmt: skip


def _output_projection(notes: Notes) -> None:
    m, n = (400, 64) if notes.small else (128256, 8192)
    record = levels_record(m, n, widths=(36, 34))
    base, data = torch.randn(m, n, device=notes.device, dtype=notes.dtype), as_array(record)
    for by, kernels in (("kernels", True), ("torch", False)):
        if kernels and not kernels_run(notes):
            continue
        work = partial(add_delta, base, data, "lm_head", notes.dtype, kernels=kernels)
        peak, took = notes.peak_bytes(work), notes.milliseconds(work, 3)
        extra = over(peak and peak - base.nbytes, 1e9)
        fields = {"shape": f"{m}x{n}", "rank": record.rank, "by": by, "milliseconds": took}
        notes.row("output projection", **fields, extra_memory_GB=extra)
        notes.goal(f"output projection by {by}, GB beyond base and result", extra, most=2)


def encode(notes: Notes) -> None:
    side = 64 if notes.small else 4096
    full = notes.attempt("torch.linalg.svd", _time_svd, side)
    for name in ("impart-rd", "impart-qt", "bitdelta", "dare-qt"):
        notes.attempt(f"encode by {name}", _time_encode, name, (side, side), full)
    notes.attempt("encode by impart-qt, calibrated", _time_encode, "impart-qt", (side, side), full, True)
    notes.attempt("encode of experts", _time_experts)


def _time_experts(notes: Notes) -> None:
    """Encode a layer's small experts together, in batches as compression makes them, and one at a time."""
    count, m, n = (4, 32, 48) if notes.small else (128, 768, 2048)
    config = ImPartRdConfig(compression_ratio=RATIO)
    budget = max(2 * m * n // RATIO, config.least_bytes(m, n))
    deltas = [measure.synthetic_delta(m, n, seed=seed, device=notes.device) for seed in range(count)]
    tasks = [
        EncodingTask(delta, budget, seed, None, decomposed, None, None, False, False)
        for seed, delta in enumerate(deltas)
    ]

    def together() -> None:
        batches = Batches[EncodingTask](notes.device, config.encode_all)
        for task in tasks:
            batches.add(task.delta.shape, task, bytes_for(task))
        batches.finish()

    alone = tasks[: max(1, count // 8)]  # a part, because all would take long
    peak = notes.peak_bytes(together)
    took = over(notes.milliseconds(together, 1), count)
    single = over(notes.milliseconds(lambda: [config.encode_all([task]) for task in alone], 1), len(alone))
    faster = over(single, took)
    fields = {"matrices": f"{count} of {m}x{n}", "by": config.name, "milliseconds each": took}
    notes.row("experts", **fields, one_at_a_time=single, times_as_fast=faster, memory_GB=over(peak, 1e9))
    notes.goal(f"encode of {count} experts of {m}x{n} together, times as fast as one at a time", faster, least=5)


def _time_svd(notes: Notes, side: int) -> float | None:
    delta = measure.synthetic_delta(side, side, seed=0, device=notes.device)
    if notes.on_gpu:
        torch.linalg.svd(delta[:512, :512], full_matrices=False)  # sets the library up
    took = notes.milliseconds(lambda: torch.linalg.svd(delta, full_matrices=False), 1)
    notes.row("encode", matrix=f"{side}x{side}", by="torch.linalg.svd", seconds=over(took, 1000))
    return took


def _time_encode(notes: Notes, name: str, shape: tuple[int, int], full: float | None, calibrated: bool = False) -> None:
    m, n = shape
    delta = measure.synthetic_delta(m, n, seed=0, device=notes.device)
    config = method_class(name)(compression_ratio=RATIO)
    budget = max(2 * m * n // RATIO, config.least_bytes(m, n))
    hessian = None
    if calibrated:
        inputs = torch.randn(2 * n, n, device=notes.device)
        hessian = inputs.t() @ inputs / len(inputs)
    work = partial(config.encode, delta, budget, 1, hessian=hessian)
    took, launches = notes.milliseconds(work, 2), None
    if notes.on_gpu and notes.seconds_left() > 5 + (took or 0) / 100:
        launches = notes.attempt(f"launches of {name}", lambda _: _launches(work))
    by, faster = name + (", calibrated" if calibrated else ""), over(full, took)
    fields = {"matrix": f"{m}x{n}", "by": by, "seconds": over(took, 1000), "times_as_fast_as_svd": faster}
    notes.row("encode", **fields, launches=launches)
    if name == "impart-rd":
        notes.goal(f"encode of {m}x{n} by impart-rd, seconds", over(took, 1000), most=0.3 * m * n / 4096**2)
        notes.goal(f"encode of {m}x{n} by impart-rd, times as fast as torch.linalg.svd", faster, least=10)
        notes.goal(f"encode of {m}x{n} by impart-rd, launches", launches, most=2000)


def _launches(work: Callable[[], Any]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.key.startswith(("cudaLaunch", "cuLaunch")))


def load(notes: Notes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layers = 1 if notes.small else 8 if notes.seconds_left() > 90 and shutil.disk_usage(folder).free > 12e9 else 2
        config = measure.llama_config(layers, tiny=notes.small)
        started = time.perf_counter()
        folders = notes.attempt("writing a delta", lambda notes: write_delta(
            folder, config, notes.device, 4.0 if notes.small else RATIO
        ))  # fmt: skip
        if folders is None:
            return
        took = round(time.perf_counter() - started, 1) if notes.on_gpu else None
        sizes = {n: sum(p.stat().st_size for p in f.glob("*.safetensors")) for n, f in folders.items()}
        ratio = sizes["dense"] / sizes["delta"]
        notes.row("the model", layers=layers, dense_bytes=sizes["dense"], ratio=ratio, seconds_to_make=took)
        torch.cuda.empty_cache()
        if notes.on_gpu:  # compiles the kernels, which stay on disk
            base = torch.zeros(256, 256, device=notes.device, dtype=notes.dtype)
            add_delta(base, as_array(levels_record(256, 256)), "a matrix", notes.dtype)
        notes.attempt("decoding all tensors", _time_copies, folders["delta"])
        for cache in ("warm", "cold"):
            notes.attempt(f"load, {cache} page cache", _time_loads, folders, layers, cache)


def _time_copies(notes: Notes, delta: Path) -> None:
    """Decode all tensors, one after the other, with and without pinned memory and reading ahead; the files are warm."""
    repository = open_repository(str(delta), HubOptions())

    def each() -> None:
        for name in repository.names():
            repository.tensor(name, notes.device)

    def ahead() -> None:
        for _ in repository.tensors(notes.device):
            pass

    staged, ways = delta_repository.to_device, {"ordinary memory": each, "pinned memory": each, "pinned, ahead": ahead}
    seconds: dict[str, list[float]] = {by: [] for by in ways}
    for _ in range(3 if notes.on_gpu else 1):
        for by, work in ways.items():
            delta_repository.to_device = torch.Tensor.to if by == "ordinary memory" else staged  # type: ignore[assignment]
            try:
                measure.synchronize(notes.device.type)
                started = time.perf_counter()
                work()
                measure.synchronize(notes.device.type)
                seconds[by].append(time.perf_counter() - started)
            finally:
                delta_repository.to_device = staged
    for by, times in seconds.items():
        took = min(times) if notes.on_gpu else None
        ratio = over(took, min(seconds["ordinary memory"]))
        notes.row("decoding all tensors", base_by=by, seconds=took, of_ordinary_memory=ratio)


def _time_loads(notes: Notes, folders: dict[str, Path], layers: int, cache: str) -> None:
    """Time each load twice, in processes of its own on a device, and compare the medians."""
    read = {"dense": [folders["dense"]], "delta": [folders["delta"], folders["base"]]}
    seconds: dict[str, list[float]] = {name: [] for name in read}
    for _ in range(2 if notes.on_gpu else 1):
        if notes.on_gpu and notes.seconds_left() < 30:
            break
        for name, sources in read.items():
            if cache == "cold":
                measure.drop_page_cache(sources)
            task = {"load": str(sources[0]), "device": notes.device.type}
            if notes.on_gpu:
                seconds[name].append(measure.in_fresh_process(benchmark_load.__file__, task)["seconds"])
            else:
                benchmark_load.timed_load(*task.values())
    if not notes.on_gpu:
        notes.row("load", layers=layers, page_cache=cache, loaded=True)
    elif not seconds["delta"]:
        notes.leave_out(f"load, {cache} page cache", "not enough time left")
    else:
        dense, delta = (statistics.median(seconds[name]) for name in read)
        fields = {"layers": layers, "page_cache": cache, "runs": len(seconds["delta"])}
        notes.row("load", **fields, dense_seconds=dense, delta_seconds=delta, of_dense=delta / dense)
        notes.goal(f"load of {layers} layers of a 7B model, {cache}, of the dense load", delta / dense, most=1.1)


def apply(notes: Notes) -> None:
    side = 64 if notes.small else 4096
    records = [levels_record(side, side, 8 if notes.small else RATIO, seed=seed) for seed in range(16)]
    for tenants in (1, 4, 16):
        layers = notes.attempt(f"{tenants} tenants", _Tenants, records[:tenants])
        if layers is None:
            continue
        cases = [(1, 1), (16, 1), (tenants, 512)] if tenants == 1 else [(16, 1), (tenants, 512)]
        for sequences, tokens in cases:
            what = f"{tenants} tenants, {sequences} sequences of {tokens} tokens"
            notes.attempt(what, layers.measure, sequences, 8 if notes.small and tokens > 1 else tokens)


class _Tenants:
    """One linear layer without delta, with packed deltas, and with PEFT's LoRA adapters of the same bytes.

    On a device there are four such layers with weights of their own, which together do not fit in its cache.
    """

    def __init__(self, notes: Notes, records: list[Record]):
        self.m, self.n, self.tenants = records[0].rows, records[0].columns, len(records)
        self.first, options = records[0], {"device": notes.device, "dtype": notes.dtype}
        count = 4 if notes.on_gpu else 1
        self.linear = [torch.nn.Linear(self.n, self.m, bias=False, **options) for _ in range(count)]
        kernels = kernels_run(notes)
        self.deltas = [PackedDeltas(records, "the matrix", notes.device, kernels=kernels) for _ in self.linear]
        self.rank = max(1, len(pack_record(self.first)) // (2 * (self.m + self.n)))
        self.lora = notes.attempt("PEFT", lambda _: [self._lora(linear) for linear in self.linear])

    def _lora(self, linear: torch.nn.Linear) -> Any:
        if importlib.util.find_spec("peft") is None:
            return None
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=["0"])
        model = get_peft_model(torch.nn.Sequential(linear), config, "0", autocast_adapter_dtype=False)
        for number in range(1, self.tenants):
            model.add_adapter(str(number), config, autocast_adapter_dtype=False)
        return model.eval().base_model.model[0]

    @torch.no_grad()
    def measure(self, notes: Notes, sequences: int, tokens: int) -> None:
        inputs = torch.randn(sequences, tokens, self.n, device=notes.device).to(notes.dtype)
        tenant = torch.arange(sequences, device=notes.device) % self.tenants
        groups = RowGroups.of(tenant.repeat_interleave(tokens), self.tenants)

        def dense() -> list[torch.Tensor]:
            return [torch.nn.functional.linear(inputs, linear.weight) for linear in self.linear]

        def packed() -> None:
            for outputs, deltas in zip(dense(), self.deltas, strict=True):
                deltas.add_to(outputs, inputs, groups)

        delta = decode_record(self.first, "the matrix", notes.device)
        zero = torch.zeros(sequences, tokens, self.m, device=notes.device)
        found = self.deltas[0].add_to(zero, inputs, groups)[0]
        error = distance(found, inputs[0].double() @ delta.double().t())
        fields: dict[str, Any] = {"tenants": self.tenants, "sequences": sequences, "tokens": tokens, "error": error}
        took = {"dense": notes.milliseconds(dense), "packed": notes.milliseconds(packed)}
        names = [str(number) for number in tenant.tolist()]
        if self.lora and self.lora[0]:
            took["LoRA"] = notes.milliseconds(lambda: [layer(inputs, adapter_names=names) for layer in self.lora])
        fields |= {"rank_of_LoRA": self.rank, "dense_ms": took["dense"]}
        fields |= {"speed_of_dense": over(took["dense"], took["packed"])}
        fields |= {"LoRA_of_dense": over(took["dense"], took.get("LoRA")), "kernels": self.deltas[0].kernels}
        in_graphs = None
        if notes.on_gpu and self.deltas[0].kernels:  # without the host's share, as in an engine
            times = [notes.attempt("CUDA graph", lambda notes, w=work: _in_graph(notes, w)) for work in (dense, packed)]
            in_graphs = over(*times)
        notes.row("apply", **fields, speed_of_dense_in_CUDA_graphs=in_graphs)
        if self.tenants == 16 and tokens == 1:
            best = max(fields["speed_of_dense"] or 0, in_graphs or 0) or None
            notes.goal("tokens a second of 16 tenants at batch 16, of the base's (a linear layer)", best, least=0.5)
        expect(error < FLOAT32_ERROR, f"the delta's outputs are off by {error:g}")


def _in_graph(notes: Notes, work: Callable[[], Any]) -> float | None:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return notes.milliseconds(graph.replay)


def more(notes: Notes) -> None:
    """A 13B model's shapes, and the tests that run on a device where there is one."""
    square, wide = ((64, 64), (96, 64)) if notes.small else ((5120, 5120), (13824, 5120))
    for m, n in (square, wide):
        notes.attempt(f"decode of {m}x{n}", _time_decode, "levels", levels_record(m, n))
        notes.attempt(f"encode of {m}x{n}", _time_encode, "impart-rd", (m, n), None)
    notes.attempt("tests", _tests)


def _tests(notes: Notes) -> None:
    if not notes.on_gpu or importlib.util.find_spec("pytest") is None:
        notes.leave_out("tests", "pytest is not installed" if notes.on_gpu else "there is no GPU")
        return
    files = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in p.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--noconftest", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=notes.seconds_left())
    lines = done.stdout.strip().splitlines() or [done.stderr[-300:]]
    notes.row("tests", files=len(files), exit_code=done.returncode, said=lines[-1])
    expect(done.returncode == 0, "\n".join(lines[-15:]))
