"""The first section of gpu_check.py: whether everything works."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from gpu_exact import check_exact
from gpu_material import (
    FLOAT32_ERROR,
    Notes,
    distance,
    every_kind,
    expect,
    kernels_run,
    levels_record,
    ways,
    write_delta,
)
from transformers import AutoModelForCausalLM

from impart_hf.methods import method_class, method_names
from impart_hf.modeling import triton_decode
from impart_hf.modeling.delta_decode import add_delta, decode_planes, decode_record
from impart_hf.modeling.delta_record import FACTORED, Record
from impart_hf.modeling.triton_planes import available


def checks(notes: Notes) -> None:
    """Whether everything works, on matrices so small that it takes less than a minute."""
    notes.attempt("environment", _environment)
    for name in method_names():
        notes.attempt(f"method {name}", _method, name)
    notes.attempt("exact records", check_exact)
    with tempfile.TemporaryDirectory() as folder:
        folders = notes.attempt("writing a delta", lambda notes: write_delta(
            Path(folder), measure.llama_config(1, tiny=True), notes.device, 4.0
        ))  # fmt: skip
        if folders:
            expected = notes.attempt("load on the CPU", lambda _: _logits(folders["delta"], "cpu"))
            places: tuple[Any, ...] = ("cuda", 0, {"": 0}, "auto") if notes.on_gpu else ({"": "cpu"},)
            for place in (*places, "default device"):
                notes.attempt(f"load, device_map {place}", _load_tiny, folders, place, expected)
    m, n = (160, 136) if notes.small else (700, 530)
    for name, record in every_kind(m, n, notes.device).items():
        notes.attempt(f"kernels, {name}", kernels_against_float64, name, record)


def _environment(notes: Notes) -> None:
    versions = {}
    for name in ("triton", "transformers", "peft", "accelerate", "safetensors", "numpy", "huggingface_hub", "pytest"):
        found = importlib.util.find_spec(name)
        versions[name] = importlib.metadata.version(name) if found else "absent"
    started = time.perf_counter()
    works = kernels_run(notes)
    seconds = round(time.perf_counter() - started, 1) if notes.on_gpu else None
    notes.row("environment", **versions, CUDA=torch.version.cuda, kernels_work=works, first_launch_seconds=seconds)
    if available and not works:  # decoding without a guard says why
        out = torch.zeros(160, 136, device=notes.device)
        triton_decode.Decoder(notes.device).add_record(out, out, levels_record(160, 136, 8), "a small record")
        raise RuntimeError("the kernels give wrong numbers")


def _method(notes: Notes, name: str) -> None:
    """The device decodes the CPU's bytes to the CPU's values, and encodes as closely as the CPU."""
    m, n = (48, 40) if notes.small else (256, 192)
    config = method_class(name)(compression_ratio=8)
    delta = measure.synthetic_delta(m, n, seed=0)
    budget = max(2 * m * n // 8, config.least_bytes(m, n))
    on_cpu = config.encode(delta, budget, 1).data
    on_device = config.encode(delta.to(notes.device), budget, 1).data
    zero, values, errors = torch.zeros(m, n), [], []
    for data in (on_cpu, on_device):
        values.append(add_delta(zero, np.frombuffer(data, np.uint8), name, torch.float32, kernels=False))
        errors.append(distance(values[-1], delta))
    decode = partial(add_delta, zero.to(notes.device), np.frombuffer(on_cpu, np.uint8), name, torch.float32)
    by_torch = distance(decode(kernels=False).cpu(), values[0])
    by_kernels = distance(decode(kernels=True).cpu(), values[0]) if kernels_run(notes) else None
    notes.row(
        "methods", method=name, same_bytes=on_cpu == on_device, CPU_error=errors[0], device_error=errors[1],
        torch_against_CPU=by_torch, kernels_against_CPU=by_kernels,
    )  # fmt: skip
    expect(max(by_torch, by_kernels or 0) < FLOAT32_ERROR, f"{name}: the device decodes to other values")
    expect(errors[1] < 1.05 * errors[0] + 1e-6, f"{name}: the device encodes with a larger error")


def kernels_against_float64(notes: Notes, name: str, record: Record) -> None:
    m, n, device = record.rows, record.columns, notes.device
    by_torch = decode_record(record, name, device)
    if record.layout == FACTORED:
        u, v = (plane.dense().double() for plane in decode_planes(record, name, device))
        sigma = torch.from_numpy(record.sigma.astype(np.float64) * record.scale).to(device)
        exact = (u * sigma[:, None]).t() @ v
    else:
        exact = by_torch.double()
    shape = f"{m}x{n}"
    torch_error = distance(by_torch, exact)
    notes.row("errors against float64", record=name, shape=shape, by="torch", error=torch_error)
    wrong = [] if torch_error < FLOAT32_ERROR else ["torch"]
    zero, out = torch.zeros(m, n, device=device), torch.empty(m, n, device=device)

    def by_kernels(notes: Notes, precision: str, fused: bool, way: str) -> None:
        decoder = triton_decode.Decoder(device, precision, fused)
        decoder.add_record(out, zero, record, name)
        error = distance(out, exact)
        notes.row("errors against float64", record=name, shape=shape, by=way, error=error)
        if error > FLOAT32_ERROR or not decoder.finite():
            wrong.append(way)

    for precision, fused in ways(notes, record):
        way = f"kernels, {precision}{', fused' if fused else ''}"
        notes.attempt(f"{name}, {way}", by_kernels, precision, fused, way)
    expect(not wrong, f"{name}: errors above {FLOAT32_ERROR:g}, or numbers that are not finite, by {wrong}")


def _logits(folder: Path, place: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], set[str]]:
    """Load a model, and return its logits, its weights and where these are."""
    if place == "default device":
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=place)
    tokens = torch.arange(24, device=model.device).view(2, 12)
    with torch.no_grad():
        logits = model(tokens).logits.cpu()
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    return logits, weights, {str(p.device) for p in model.parameters()}


def _load_tiny(notes: Notes, folders: dict[str, Path], place: Any, expected: Any) -> None:
    found, weights, devices = _logits(folders["delta"], place)
    dense = _logits(folders["dense"], "cpu")[1]
    differ = sum(int((weights[name] != dense[name]).sum()) for name in dense)
    share = differ / sum(weight.numel() for weight in dense.values())
    off = distance(found, expected[0]) if expected else None
    where = " ".join(sorted(devices))
    notes.row("loading", device_map=str(place), weights_on=where, logits_off=off, share_of_weights_that_differ=share)
    expect(devices == {str(notes.device)}, f"the weights are on {where}")
    expect(share < 1e-3 and (off or 0) < 1e-3, "the model is not the one that the CPU loads")
