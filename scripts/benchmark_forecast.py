"""Compare forecasts of compressions with the compressions: time by stage, peak memory, disk and bytes.

Forecast and compression run one after the other, each in a process of its own. On a machine that other programs use,
either may meet more of them: repeat, and look at the spread.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import measure

from impart_hf import compress
from impart_hf.compression import encoding, pair, pipeline
from impart_hf.compression.forecast import forecast
from impart_hf.evaluation.memory import PeakMemory, anonymous_bytes
from impart_hf.methods import MethodConfig, method_class, method_names

# The functions that are a run's stages: where they are looked up, and their names.
_STAGES = {
    "scan": (pair, "scan"),
    "singular values": (pipeline, "find_spectra"),
    "price": (pipeline, "budgets_or_exact"),
    "calibration": (pipeline, "stream_layers"),
    "vectors and encoding": (encoding.Encoding, "encode_all"),
    "distillation": (pipeline, "_distil"),
    "writing": (pipeline, "write_repository"),
}


@contextmanager
def stage_times() -> Iterator[dict[str, float]]:
    """Within this context, collect the seconds of every stage of a compression."""
    times = dict.fromkeys(_STAGES, 0.0)

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                times[name] += time.perf_counter() - started

        return run

    patches = [
        mock.patch.object(m, attribute, timed(name, getattr(m, attribute))) for name, (m, attribute) in _STAGES.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield times
    finally:
        for patch in patches:
            patch.stop()
    times["calibration"] = max(0.0, times["calibration"] - times["vectors and encoding"] * (times["calibration"] > 0))


class LargestFolder:
    """Context manager that measures how large the files in a folder get, together.

    Attributes:
        bytes: the most, so far.
    """

    def __init__(self, folder: Path):
        self.bytes, self._folder, self._done = 0, folder, threading.Event()

    def __enter__(self) -> LargestFolder:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            try:
                total = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
            except OSError:  # something was removed in between
                continue
            self.bytes = max(self.bytes, total)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Forecast or compress in this process, and return seconds by stage and in all, memory, disk and bytes."""
    method: MethodConfig = method_class(task["method"])(compression_ratio=task["ratio"])
    texts = {"calibration": task["calibration"], "distill": task["distill"]}
    sizes = {"calibration_samples": task["samples"], "calibration_length": task["length"]}
    with tempfile.TemporaryDirectory() as name:
        started, output = time.perf_counter(), Path(name) / "delta"
        if task["forecast"]:
            found = forecast(task["base"], task["finetuned"], method, output_dir=output, **texts, **sizes)
            stages = {stage.name: stage.seconds for stage in found.stages}
            return {
                "stages": stages, "seconds": found.seconds, "memory": found.memory_bytes, "disk": found.disk_bytes,
                "bytes": found.repository_bytes, "took": time.perf_counter() - started,
            }  # fmt: skip
        resident = anonymous_bytes()
        with PeakMemory() as memory, LargestFolder(Path(name)) as disk, stage_times() as times:
            report = compress(task["base"], task["finetuned"], output, method, **texts, **sizes)
        seconds = time.perf_counter() - started
        times["open and check"] = seconds - sum(times.values())
        return {
            "stages": {stage: value for stage, value in times.items() if value}, "seconds": seconds,
            "memory": resident + memory.bytes, "disk": disk.bytes, "bytes": report.repository_bytes, "took": seconds,
        }  # fmt: skip


def rows_of(method: str, repeat: int, told: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for everything that was forecast: forecast, measured, and the one by the other."""
    pairs = {f"{stage}, s": (seconds, found["stages"].get(stage)) for stage, seconds in told["stages"].items()}
    pairs["time in all, s"] = told["seconds"], found["seconds"]
    pairs["peak memory, MB"] = told["memory"] / 1e6, found["memory"] / 1e6
    pairs["disk while running, MB"] = told["disk"] / 1e6, found["disk"] / 1e6
    pairs["result, MB"] = told["bytes"] / 1e6, found["bytes"] / 1e6
    return [
        {
            "method": method, "run": repeat, "what": what, "forecast": forecast_value, "measured": measured or 0.0,
            "forecast / measured": forecast_value / measured if measured else "",
        }
        for what, (forecast_value, measured) in pairs.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="base model: local folder or Hub id")
    parser.add_argument("finetuned", nargs="?", help="fine-tuned model")
    parser.add_argument("--methods", type=measure.comma_separated(str), default=["impart-rd", "impart-qt", "dare-qt"])
    parser.add_argument("--ratio", type=float, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--calibration", metavar="TEXT", help="text for calibration")
    parser.add_argument("--distill", metavar="TEXT", help="text for distillation")
    parser.add_argument("--samples", type=int, default=128, help="the most sequences of a text (default: 128)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        measure.report_result(work(json.loads(arguments.worker)))
        return 0
    if arguments.base is None or arguments.finetuned is None:
        parser.error("give a base and a fine-tuned model")
    if unknown := sorted(set(arguments.methods) - set(method_names())):
        parser.error(f"unknown method {unknown[0]}; choose one of {', '.join(method_names())}")
    fields = ("base", "finetuned", "ratio", "calibration", "distill", "samples", "length")
    settings = {name: getattr(arguments, name) for name in fields}
    rows: list[dict[str, Any]] = []
    print(measure.machine_line(), flush=True)
    for repeat in range(1, arguments.repeats + 1):
        for method in arguments.methods:
            task = settings | {"method": method}
            told, found = (measure.in_fresh_process(__file__, task | {"forecast": first}) for first in (True, False))
            rows += rows_of(method, repeat, told, found)
            took = f"found in {told['took']:.1f} s"
            print(f"{method}: forecast {told['seconds']:.1f} s ({took}), measured {found['seconds']:.1f} s", flush=True)
    print(f"\n{measure.table(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
