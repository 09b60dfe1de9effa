"""Forecast compressions of models that are too large for this machine, from their shapes alone.

A table by model and method of time by stage, memory, disk and bytes, extrapolated from single matrices of the models'
shapes. The matrices are random, with a spectrum like that of a fine-tune. Reading is timed on a matrix in memory, and
a disk may be slower. With --texts, calibration and distillation are counted in operations, at the speed of a product of
matrices here; distillation's memory is another script's (forecast_distillation.py).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch

from impart_hf.compression.budgets import spectra_bytes
from impart_hf.compression.forecast import matrix_costs
from impart_hf.compression.matrix_timing import MatrixKind, kind_of, resident_bytes
from impart_hf.compression.pipeline import CompressionRequest
from impart_hf.compression.plan import make_plan
from impart_hf.compression.resources import RunTimes, duration, forecast_of
from impart_hf.compression.run_timing import allocation_seconds, training_speed
from impart_hf.compression.scan import TensorPlan
from impart_hf.compression.writer import CARD_BYTES
from impart_hf.methods import MethodConfig, method_class, method_names
from impart_hf.modeling.checkpoints import same_values
from impart_hf.modeling.checksums import tensor_checksum
from impart_hf.repository.report import human_bytes

_CONFIG_BYTES = 2000  # of config.json
_OPENING = 2.0  # seconds to open two models and to check their headers
# Of a decoder layer's forward pass, in how many calibration runs it: to each of four inputs, and to the end.
_CALIBRATION_PASSES = 3.5


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model.

    Attributes:
        experts: number of experts in each layer; 0 for one MLP.
        used: experts that a token is sent to.
        tied: whether the output projection is the embedding.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int
    experts: int = 0
    used: int = 0
    tied: bool = False

    def tensors(self) -> list[TensorPlan]:
        """Return all tensors, as if a fine-tune had changed them all."""
        queries, keys = self.heads * self.head, self.key_heads * self.head
        attention = {
            "q": (queries, self.hidden), "k": (keys, self.hidden), "v": (keys, self.hidden),
            "o": (self.hidden, queries),
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        mlp = {"gate": (self.inner, self.hidden), "up": (self.inner, self.hidden), "down": (self.hidden, self.inner)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
            for place in [f"experts.{n}." for n in range(self.experts)] or [""]:
                shapes |= {f"{prefix}.mlp.{place}{name}_proj.weight": shape for name, shape in mlp.items()}
            if self.experts:
                shapes[f"{prefix}.mlp.gate.weight"] = self.experts, self.hidden
            shapes |= {f"{prefix}.{norm}.weight": (self.hidden,) for norm in ("input_norm", "post_attention_norm")}
        return [
            TensorPlan(
                name, "encoded" if len(shape) == 2 else "kept", shape, torch.bfloat16,
                vocabulary=shape[0] == self.vocabulary,
            )
            for name, shape in sorted(shapes.items())
        ]  # fmt: skip

    def config(self) -> dict[str, Any]:
        """Return the fields of config.json that a forecast reads."""
        fields: dict[str, Any] = {"hidden_size": self.hidden, "num_hidden_layers": self.layers}
        return fields | ({"num_experts": self.experts, "num_experts_per_tok": self.used} if self.experts else {})


MODELS = {
    "LLaMA-7B": Shapes(4096, 11008, 32, 32, 32, 128, 32000),
    "LLaMA-13B": Shapes(5120, 13824, 40, 40, 40, 128, 32000),
    "LLaMA-70B": Shapes(8192, 28672, 80, 64, 8, 128, 32000),
    "Gemma-3-27B": Shapes(5376, 21504, 62, 32, 16, 128, 262208, tied=True),
    "Qwen3-30B-A3B": Shapes(2048, 768, 48, 32, 4, 128, 151936, experts=128, used=8),
}
TINY = {
    "tiny": Shapes(64, 128, 2, 4, 2, 16, 320),
    "tiny mixture": Shapes(64, 32, 2, 4, 2, 16, 320, experts=4, used=2, tied=True),
}


def part(kind: MatrixKind, rows: int, columns: int, number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return a random matrix, and one with a delta of one percent; see `matrix_timing.Source`."""
    delta = measure.synthetic_delta(rows, columns, seed=number)
    before = torch.randn(rows, columns, generator=torch.Generator().manual_seed(number))
    delta *= 0.01 * before.norm() / delta.norm()
    return before.bfloat16(), (before + delta).bfloat16(), number


def scan_rate() -> float:
    """Return how many bytes of two models are scanned in a second, if they are in memory."""
    before = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    after = before + 0.01
    started = time.perf_counter()
    same_values(before, after)
    for tensor in (before, after):
        tensor.aminmax()
        tensor_checksum(tensor)
    return 2 * before.numel() * before.element_size() / (time.perf_counter() - started)


def calibration_seconds(shapes: Shapes, tensors: list[TensorPlan], tokens: torch.Tensor, speed: float) -> float:
    """Return about how long calibration runs all layers, and adds up the second moments of their inputs."""
    inside = [t for t in tensors if len(t.shape) == 2 and not t.vocabulary]
    share = {t.name: shapes.used / shapes.experts if ".experts." in t.name else 1.0 for t in inside}
    forward = 2 * tokens.numel() * sum(math.prod(t.shape) * share[t.name] for t in inside)
    inputs = [shapes.hidden, shapes.heads * shapes.head, shapes.hidden, shapes.inner]
    moments = 2 * tokens.numel() * shapes.layers * sum(size**2 for size in inputs)
    return (_CALIBRATION_PASSES * forward + moments) / speed


def row_of(
    name: str, shapes: Shapes, method: MethodConfig, arguments: argparse.Namespace, times: RunTimes
) -> tuple[dict[str, str], dict[str, Any]]:
    """Forecast one compression; return a row of the table, and the whole forecast."""
    tensors = shapes.tensors()
    size = sum(t.dense_bytes for t in tensors)
    plan = make_plan(tensors, method, size, _CONFIG_BYTES, CARD_BYTES, 5 * 10**9)
    kinds = {t.name: kind_of(t, arguments.texts and method.quantises and not t.vocabulary) for t in plan.encoded}
    costs = matrix_costs(plan, kinds, method, part, torch.device(arguments.device), arguments.seconds)
    tokens = torch.zeros(arguments.samples, arguments.length, dtype=torch.int64)
    calibration = tokens if arguments.texts and method.quantises else None
    request = CompressionRequest(method, calibration=calibration, distillation=tokens if arguments.texts else None)
    found = forecast_of(
        plan, request, {"method": method.to_dict()}, kinds, costs,
        RunTimes(
            times.opening, times.scan_rate, allocation_seconds(plan.encoded, kinds, method),
            calibration_seconds(shapes, tensors, tokens, times.training_speed) if arguments.texts else 0.0,
            times.training_speed,
        ),
        kept_bytes=spectra_bytes(plan.encoded, method), model_config=shapes.config(),
        process_count=arguments.processes, resident=resident_bytes(),
    )  # fmt: skip
    row = {"model": name, "method": method.name}
    row |= {stage.name: duration(stage.seconds) for stage in found.stages}
    row |= {
        "time in all": duration(found.seconds), "memory": human_bytes(found.memory_bytes or 0),
        "disk": human_bytes(found.disk_bytes), "result": human_bytes(found.repository_bytes),
    }  # fmt: skip
    return row, {"model": name, **found.to_dict()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=measure.comma_separated(str), default=[], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--methods", type=measure.comma_separated(str), default=["impart-rd", "impart-qt"])
    parser.add_argument("--ratio", type=float, default=32)
    parser.add_argument(
        "--seconds", type=float, default=20, help="time for the matrices of a model with a method (default: 20)"
    )
    parser.add_argument("--processes", type=int, default=1, help="number of processes, each on a machine like this")
    parser.add_argument("--texts", action="store_true", help="with calibration and distillation, estimated")
    parser.add_argument("--samples", type=int, default=128, help="sequences of both texts (default: 128)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the forecasts to this file")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try out the script")
    arguments = parser.parse_args(argv)
    models = TINY if arguments.tiny else MODELS
    chosen = arguments.models or list(models)
    if unknown := sorted(set(chosen) - set(models)):
        parser.error(f"unknown model {unknown[0]}; choose of {', '.join(models)}")
    if unknown := sorted(set(arguments.methods) - set(method_names())):
        parser.error(f"unknown method {unknown[0]}; choose one of {', '.join(method_names())}")
    speed = training_speed(torch.device(arguments.device)) if arguments.texts else 0.0
    times = RunTimes(_OPENING, scan_rate(), training_speed=speed)
    rows, forecasts = [], []
    for name in chosen:
        for method in arguments.methods:
            settings = method_class(method)(compression_ratio=arguments.ratio)
            row, found = row_of(name, models[name], settings, arguments, times)
            rows.append(row)
            forecasts.append(found)
    columns = max(rows, key=len)  # of a method with all stages
    print(measure.machine_line(arguments.device))
    print(f"\nExtrapolated from single matrices of these shapes, ratio {arguments.ratio:g}:\n")
    print(measure.table([dict.fromkeys(columns, "") | row for row in rows]))
    if arguments.json:
        arguments.json.write_text(json.dumps(forecasts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
