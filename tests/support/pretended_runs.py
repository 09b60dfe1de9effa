"""What runs on the pretended device, in a process of its own: `python -m support.pretended_runs FOLDER`.

Prints JSON: by the name of a run, what it found, or what it raised. tests/common/test_pretended_device.py judges it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, TrainingArguments

from impart_hf import ImPartConfig, ImPartRdConfig, compress, diff
from impart_hf.coding.spectrum import singular_values
from impart_hf.compression.tune import tune
from impart_hf.distillation import DistillSettings
from impart_hf.distillation.distillation import distill
from impart_hf.evaluation.metrics import load as load_dense
from impart_hf.evaluation.metrics import perplexity
from impart_hf.lora.export import export_lora
from impart_hf.merging.merge import merge
from impart_hf.methods import method_class, method_names
from impart_hf.modeling.delta_decode import add_delta, add_delta_part, decode_record
from impart_hf.modeling.delta_record import parse_record
from impart_hf.modeling.delta_repository import DeltaRepository
from impart_hf.modeling.model_files import HubOptions
from impart_hf.modeling.planes import Run, StoredRun
from impart_hf.repository.open import open_repository
from impart_hf.repository.reconstruct import reconstruct
from impart_hf.repository.verify import verify
from support import pretended_device
from support.distilled import TOKENS, checkpoints, encode, spoiled
from support.merge_family import config, make_family
from support.pretended_device import NAME, MixedDevices, counted, with_kernels
from support.random_deltas import make_delta, make_deltas, make_hessian, make_tasks
from support.tiny_models import Pair, load_tensors, save_pair, tiny_config

ROWS, COLUMNS, RATIO = 192, 256, 8
FIRST, SECOND = f"{NAME}:0", f"{NAME}:1"
TEXT = Path(str(shlex.__file__)).read_text("utf-8")
SIZE = {"calibration_samples": 8, "calibration_length": 64}


def kind_of(device: str) -> str:
    return device.partition(":")[0]


@contextmanager
def decoded_on(found: dict[str, Any], what: str) -> Iterator[None]:
    """Write down on which devices columns of codes are decoded, by any thread."""
    places, init = set(), StoredRun.__init__

    def watched(run: StoredRun, *args: Any, **others: Any) -> None:
        init(run, *args, **others)
        places.add(str(run.packed.device))

    StoredRun.__init__ = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        StoredRun.__init__ = init  # type: ignore[method-assign]
        found[what] = sorted(places)


def methods() -> dict[str, Any]:
    """Encode and decode one matrix by every method, without and with second moments of inputs."""
    delta, hessian = make_delta(ROWS, COLUMNS), make_hessian(COLUMNS)
    base = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    there = [tensor.to(SECOND) for tensor in (delta, hessian, base)]
    found = {}
    for name in method_names():
        method = method_class(name)(compression_ratio=RATIO)
        for calibrated in (False, True) if method.quantises else (False,):
            data = method.encode(delta, delta.numel() * 2 // RATIO, 1, hessian=hessian if calibrated else None).data
            with counted() as encoding:
                again = method.encode(
                    there[0], delta.numel() * 2 // RATIO, 1, hessian=there[1] if calibrated else None
                ).data
            records = np.frombuffer(data, np.uint8)
            decoded = add_delta(base, records, name, torch.bfloat16)
            with counted() as decoding:
                on_device = add_delta(there[2], records, name, torch.bfloat16)
            rows, columns = slice(10, 70), slice(3, 200)
            part = add_delta_part(
                there[2][rows, columns], records, name, torch.bfloat16, (ROWS, COLUMNS), rows, columns
            )
            record = parse_record(records, (ROWS, COLUMNS), name)[0]
            found[f"{name} calibrated" if calibrated else name] = {
                "same bytes": again == data,
                "device": str(on_device.device),
                "same values": torch.equal(on_device.cpu(), decoded)
                and torch.equal(decode_record(record, name, SECOND).cpu(), decode_record(record, name)),
                "part": (part.cpu().float() - decoded[rows, columns].float()).abs().max().item(),
                "encode": asdict(encoding),
                "decode": asdict(decoding),
            }
    return found


def kernels() -> dict[str, Any]:
    """Encode by impart-rd with GPTQ's kernel, matrices of different sizes; nothing without Triton."""
    found: dict[str, Any] = {}
    if find_spec("triton") is None:
        return found
    for columns in (128, 256):
        delta = make_delta(64, columns)
        method, size = ImPartRdConfig(compression_ratio=RATIO), delta.numel() * 2 // RATIO
        there, errors = delta.to(SECOND), []
        with with_kernels():
            with counted() as counts:
                data = method.encode(there, size, 1).data
        for record in (data, method.encode(delta, size, 1).data):
            parsed = parse_record(np.frombuffer(record, np.uint8), (64, columns), "the matrix")[0]
            errors.append((decode_record(parsed, "the matrix") - delta).norm().item())
        found[str(columns)] = {**asdict(counts), "error": errors[0], "error on the CPU": errors[1]}
    return found


def stacks() -> dict[str, Any]:
    """Encode one matrix, and 32 together, by the methods that can; by GPTQ's kernel too, if there is Triton."""
    found: dict[str, Any] = {}
    shape = 64, 128
    deltas = [delta.to(SECOND) for delta in make_deltas(*shape, 32)]
    hessian = make_hessian(shape[1]).to(SECOND)
    tasks = make_tasks(deltas, RATIO, [hessian] * len(deltas))
    for name in ("delta-come", "impart-qt", "impart-rd"):
        method = method_class(name)(compression_ratio=RATIO)
        for kernel in (False, True) if find_spec("triton") and name == "impart-rd" else (False,):
            counts = []
            with with_kernels() if kernel else nullcontext():
                method.encode_all(tasks[:2])  # tables are made once
                for several in (tasks[:1], tasks):
                    with counted() as counting:
                        method.encode_all(several)
                    counts.append(asdict(counting))
            found[f"{name} by the kernel" if kernel else name] = counts
    counts = []
    for matrices in (deltas[0], torch.stack(deltas)):
        with counted() as counting:
            singular_values(matrices)
        counts.append(asdict(counting))
    return found | {"singular values": counts}


def compression(folder: Path, pair: Pair) -> dict[str, Any]:
    """Compress on the CPU and on a device, without and with calibration text; use the repositories there."""
    found: dict[str, Any] = {}
    errors: dict[str, dict[str, float]] = {}
    texts: dict[str, dict[str, Any]] = {"rounded": {"calibration": None}, "calibrated": {"calibration": [TEXT], **SIZE}}
    for name, more in texts.items():
        pretended = FIRST if name == "calibrated" else SECOND  # sensitivity needs autograd
        for device in ("cpu", pretended):
            out = folder / f"{name}-{kind_of(device)}"
            # A device that has no attention of its own computes it by formula; the CPU's differs in the last bits.
            with counted() as counts, sdpa_kernel(SDPBackend.MATH), decoded_on(found, f"{name} decodes on {device}"):
                report = compress(
                    str(pair.base), str(pair.finetuned), out, ImPartRdConfig(compression_ratio=4), device=device, **more
                )
            errors[device] = {t.name: t.relative_error for t in report.tensors if t.kind == "encoded"}
            found[f"{name} on {kind_of(device)}"] = sum(counts.launches)
        # Matrices of one shape are encoded together, so that a few codes differ.
        differing = differing_entries(folder / f"{name}-cpu", folder / f"{name}-{NAME}")
        found[name] = [entry for entry in differing if entry != "crc32" and not entry.endswith(".delta")]
        found[f"{name} errors"] = max(abs(errors[pretended][n] / error - 1) for n, error in errors["cpu"].items())
    return found


def differing_entries(one: Path, other: Path) -> list[str]:
    before, after = load_tensors(one), load_tensors(other)
    if before.keys() != after.keys():
        return sorted(before.keys() ^ after.keys())
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


def use(folder: Path) -> dict[str, Any]:
    """Verify, reconstruct, export and evaluate a delta on a device."""
    delta = folder / "rounded-cpu"
    opened = open_repository(str(delta), HubOptions())
    found: dict[str, Any] = {}
    with counted() as counts, decoded_on(found, "verify decodes on"):
        verify(opened, device=SECOND)
    found["verify"] = counts.launches
    for device in ("cpu", SECOND):
        kind = kind_of(device)
        with counted() as counts, decoded_on(found, f"reconstruct on {kind} decodes on"):
            reconstruct(opened, folder / f"dense-{kind}", device=device)
        found[f"reconstruct on {kind}"] = counts.launches
        with counted() as counts, decoded_on(found, f"export on {kind} decodes on"):
            export_lora(opened, folder / f"lora-{kind}", 4, device=device)
        found[f"export on {kind}"] = counts.launches
        with counted() as counts, decoded_on(found, f"evaluate on {kind} decodes on"):
            found[f"perplexity on {kind}"] = perplexity(load_dense(str(delta), torch.float32, device), TOKENS, 8)
        found[f"evaluate on {kind}"] = counts.launches
    found["reconstruct"] = differing_entries(folder / "dense-cpu", folder / f"dense-{NAME}")
    found["export"] = differing_entries(folder / "lora-cpu", folder / f"lora-{NAME}")
    return found


def tuning(folder: Path, pair: Pair) -> dict[str, Any]:
    """Search on a device, where models are loaded and compared."""
    found: dict[str, Any] = {}
    with decoded_on(found, "decodes on"), counted() as counts, sdpa_kernel(SDPBackend.MATH):
        report = tune(
            str(pair.base), str(pair.finetuned), folder / "tuned", ImPartConfig(compression_ratio=4), betas=[0.5, 0.7],
            cs=[1.0], validation=[TEXT], samples=4, length=32, device=SECOND,
        )  # fmt: skip
    return found | {"launches": counts.launches, "scores": [candidate.score for candidate in report.candidates]}


def differences(pair: Pair) -> dict[str, Any]:
    """Compare two models on the CPU and on a device."""
    found: dict[str, Any] = {}
    for device in ("cpu", SECOND):
        with counted() as counts:
            report = diff(str(pair.base), str(pair.finetuned), device=device, progress=False)
        found[kind_of(device)] = {"launches": counts.launches, "tensors": [t.to_dict() for t in report.tensors]}
    return found


def merging(family: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in ("ties", "dare_linear", "impart_ties"):
        models = {"a": {"weight": 0.7, "density": 0.5}, "c-delta": {"weight": 0.4, "density": 0.6}}
        for device in ("cpu", SECOND):
            decoded: dict[str, Any] = {}
            with counted() as counts, decoded_on(decoded, "decodes on"):
                merge(config(family, method, models), folder / f"{method}-{kind_of(device)}", device=device)
        found[method] = decoded | {
            "launches": counts.launches,
            "differs": largest_difference(folder / f"{method}-cpu", folder / f"{method}-{NAME}"),
        }
    return found


def largest_difference(one: Path, other: Path) -> float:
    before, after = load_tensors(one), load_tensors(other)
    assert before.keys() == after.keys()
    return max((tensor.float() - after[name].float()).abs().max().item() for name, tensor in before.items())


def loading(folder: Path) -> dict[str, Any]:
    """Load a delta with every kind of device map."""
    delta = str(folder / "rounded-cpu")
    expected = AutoModelForCausalLM.from_pretrained(delta)
    layers = {"model.layers.0": FIRST, "model.layers.1": SECOND}
    split = {"model.embed_tokens": FIRST, **layers, "model.norm": SECOND, "model.rotary_emb": SECOND, "lm_head": SECOND}
    maps: dict[str, Any] = {
        "name": NAME, "index": 1, "name and index": SECOND, "device": torch.device(SECOND), "whole": {"": SECOND},
        "split": split,
    }  # fmt: skip
    found = {name: load(delta, expected, device_map=device_map) for name, device_map in maps.items()}
    with torch.device(SECOND):
        found["context"] = load(delta, expected)
    torch.set_default_device(SECOND)
    found["default"] = load(delta, expected)
    torch.set_default_device(None)
    return found


def offloading(folder: Path) -> dict[str, Any]:
    """Load a delta on a device and the CPU, and on the CPU to be moved to a device."""
    delta = str(folder / "rounded-cpu")
    places = {"model": SECOND, "lm_head": "cpu"}
    made: dict[str, Any] = {}
    with recorded(made):
        partly = AutoModelForCausalLM.from_pretrained(delta, device_map=places)
    moved = AutoModelForCausalLM.from_pretrained(delta).to(SECOND)
    return {
        "decoded on": {name: each["on"] for name, each in made.items()},
        "weights are on": {name: str(parameter.device) for name, parameter in partly.named_parameters()},
        "changed": [partly.weights_changed(), moved.weights_changed()],
        "moved to": sorted({str(parameter.device) for parameter in moved.parameters()}),
    }


def threads(folder: Path) -> dict[str, Any]:
    """Decode on this thread's device, which is not that of the thread that reads the base."""
    opened = open_repository(str(folder / "rounded-cpu"), HubOptions())
    module = torch.get_device_module(NAME)
    module.set_device(1)
    try:
        return {name: str(tensor.device) for name, tensor in opened.tensors(NAME)}
    finally:
        module.set_device(0)


@contextmanager
def recorded(made: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Write down where each tensor is decoded, and what that took."""
    part = DeltaRepository.part

    def watched(self: DeltaRepository, name: str, index: Any, device: Any = "cpu") -> torch.Tensor:
        with counted() as counts:
            tensor = part(self, name, index, device)
        made[name] = {
            "asked": str(device), "on": str(tensor.device), "records": bool(self.parts[name].records), **asdict(counts)
        }  # fmt: skip
        return tensor

    DeltaRepository.part = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        DeltaRepository.part = part  # type: ignore[method-assign]


def load(delta: str, expected: Any, **options: Any) -> dict[str, Any]:
    made: dict[str, dict[str, Any]] = {}
    with recorded(made):
        model = AutoModelForCausalLM.from_pretrained(delta, **options)
    known = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        made[name]["ends on"] = str(parameter.device)
        made[name]["same"] = torch.equal(parameter.detach().cpu(), known[name])
    return made


def distillation(pair: Pair) -> dict[str, Any]:
    """Train records for a few steps on the first device, end to end and by blocks."""
    records = spoiled(encode(pair, ImPartRdConfig(), 24))
    runs = {
        "end to end": DistillSettings(steps=3, batch_size=4, trains="codes"),
        "by blocks": DistillSettings(steps=3, batch_size=4, trains="scales", blocks=1),
    }
    expected = {name: distill(*checkpoints(pair), records, TOKENS, settings)[1] for name, settings in runs.items()}
    # The Trainer and accelerate choose among the accelerators whose names they know.
    os.environ["ACCELERATE_TORCH_DEVICE"] = FIRST
    TrainingArguments.device = property(lambda self: torch.device(FIRST))  # type: ignore[assignment]
    found = {}
    for name, settings in runs.items():
        decoded: dict[str, Any] = {}
        with counted() as counts, decoded_on(decoded, "decodes on"):
            report = distill(*checkpoints(pair), records, TOKENS, settings, device=FIRST)[1]
        found[name] = decoded | {
            "launches": counts.launches,
            "losses": [report.before, report.after],
            "losses on the CPU": [expected[name].before, expected[name].after],
        }
    return found


def cpu_tensor(run: Run) -> torch.Tensor:
    out = torch.zeros(run.columns * run.rows)
    out[run.positions] = run.values
    return out.view(run.columns, run.rows)


def other_index(run: Run) -> torch.Tensor:
    out = torch.zeros(run.columns * run.rows, device=run.values.device)
    out[run.positions.to(FIRST)] = run.values  # type: ignore[union-attr]
    return out.view(run.columns, run.rows)


def numpy_of_it(run: Run) -> torch.Tensor:
    out = np.zeros(run.columns * run.rows, np.float32)
    out[run.positions.numpy()] = run.values.numpy()  # type: ignore[union-attr]
    return torch.from_numpy(out).view(run.columns, run.rows)


def number_by_number(run: Run) -> torch.Tensor:
    out = torch.zeros(run.columns * run.rows, device=run.values.device)
    for at, value in zip(run.positions[:100], run.values[:100], strict=True):  # type: ignore[index]
        out[at.item()] = value
    return out.view(run.columns, run.rows)


def faults() -> dict[str, Any]:
    """Decode on a device with faults that a GPU would not forgive."""
    data = np.frombuffer(method_class("impart")().encode(make_delta(ROWS, COLUMNS), 12288, 1).data, np.uint8)
    record, _ = parse_record(data, (ROWS, COLUMNS), "faulty")
    dense, found = Run.dense, {}
    for fault in (cpu_tensor, other_index, numpy_of_it, number_by_number):
        Run.dense = lambda run, fault=fault: dense(run) if run.positions is None else fault(run)
        try:
            with counted() as counts:
                decode_record(record, "faulty", SECOND)
            found[fault.__name__] = {"waits": counts.waits}
        except (MixedDevices, TypeError) as error:
            found[fault.__name__] = {"refused": f"{type(error).__name__}: {error}"}
        finally:
            Run.dense = dense  # type: ignore[method-assign]
    try:
        torch.randn(3, generator=torch.Generator(), device=SECOND)
    except MixedDevices as error:
        found["generator"] = {"refused": f"{type(error).__name__}: {error}"}
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    pair = save_pair(folder / "pair", tiny_config("llama"))
    family = make_family(folder / "family")
    pretended_device.register()
    runs: dict[str, Callable[[], Any]] = {
        "methods": methods,
        "kernels": kernels,
        "stacks": stacks,
        "faults": faults,
        "compression": lambda: compression(folder, pair),
        "use": lambda: use(folder),
        "tuning": lambda: tuning(folder, pair),
        "differences": lambda: differences(pair),
        "merging": lambda: merging(family, folder),
        "loading": lambda: loading(folder),
        "offloading": lambda: offloading(folder),
        "threads": lambda: threads(folder),
        "distillation": lambda: distillation(pair),
    }
    found = {}
    for name, run in runs.items():
        try:
            found[name] = run()
        except Exception:
            found[name] = {"raised": traceback.format_exc()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
