"""Forecast compressions of models that are too large for this machine, from their shapes alone.

A table by model and method of time by stage, memory, disk and bytes, extrapolated from single matrices of the models'
shapes. The matrices are random, with a spectrum like that of a fine-tune. Reading is timed on a matrix in memory, and
a disk may be slower. With --texts, calibration and distillation are counted in operations, at the speed of a product of
matrices here; distillation's memory is another script's (forecast_distillation.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import torch

from impart_hf.compression.resources import RunTimes, duration
from impart_hf.compression.shapes import Shapes, forecast_shapes, machine_times
from impart_hf.methods import MethodConfig, method_class, method_names
from impart_hf.repository.report import human_bytes

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


def row_of(
    name: str, shapes: Shapes, method: MethodConfig, arguments: argparse.Namespace, times: RunTimes
) -> tuple[dict[str, str], dict[str, Any]]:
    """Forecast one compression; return a row of the table, and the whole forecast."""
    tokens = torch.zeros(arguments.samples, arguments.length, dtype=torch.int64) if arguments.texts else None
    found = forecast_shapes(
        shapes, method, times, seconds=arguments.seconds, device=arguments.device, process_count=arguments.processes,
        calibration=tokens, distillation=tokens,
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
    times = machine_times(arguments.device, arguments.texts)
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
