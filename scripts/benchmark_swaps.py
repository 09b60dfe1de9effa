"""Measure swaps between exact deltas that differ in some layers, against swaps that load every tensor.

A copy of the fine-tune is made for each number of decoder layers, the last ones, whose matrices are changed in a tenth
of their numbers, by one step. Each is compressed exactly. In one engine, started on the base, swaps go to the fine-tune
and on to the copy, back and forth. The full swaps are those between base and fine-tune, where all tensors differ, and
vLLM's own reload of the dense fine-tune. Seconds are those in which the engine is paused; the check before, while it
serves, is stated beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import torch
from benchmark_serving import ENVIRONMENT, start
from safetensors.torch import save_file

from impart_hf import ExactConfig, compress
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.model_files import HubOptions
from impart_hf.modeling.ordered_bits import moved

SHARE = 0.1  # of the numbers of a changed matrix


def write_copy(finetuned: Path, layers: int, output: Path) -> None:
    """Write a copy of a fine-tune whose last decoder layers' matrices differ in some numbers, by one step."""
    source = Checkpoint(str(finetuned), HubOptions())
    changed = [f"layers.{source.config['num_hidden_layers'] - number}." for number in range(1, layers + 1)]
    generator = torch.Generator().manual_seed(layers)
    tensors = {}
    for name in source.names():
        tensor = source.tensor(name).clone()
        if tensor.dim() == 2 and any(layer in name for layer in changed):
            chosen = torch.rand(tensor.shape, generator=generator) < SHARE
            steps = chosen.to({2: torch.int16, 4: torch.int32}[tensor.itemsize])
            tensor = moved(tensor, steps.view(-1))
        tensors[name] = tensor
    output.mkdir()
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    shutil.copy(finetuned / "config.json", output)


def timed_swaps(base: str, delta: str, copies: dict[str, str], dense: str, repeats: int) -> list[dict[str, Any]]:
    """Swap back and forth in one engine that was started on the base; return a row for each kind of swap."""
    from impart_hf.serving.deltas import DeltaChecker

    llm = start(base)
    checker = DeltaChecker(llm.llm_engine.vllm_config)

    def swap(repo: str | None) -> tuple[float, float, int]:
        """Do what `DeltaSwitch.load` does; return the seconds of the check and of the load, and the tensors loaded."""
        started = time.perf_counter()
        checked = checker.check(repo)
        between = time.perf_counter()
        (answer,) = llm.collective_rpc("impart_hf_load_delta", args=(checked.repo, checked.revision, None))
        llm.reset_prefix_cache()
        assert answer["error"] is None, answer
        return between - started, time.perf_counter() - between, answer["tensors"]

    def row(what: str, there: str | None, back: str | None) -> dict[str, Any]:
        times = []
        swap(back)
        swap(there)  # the first check of a delta reads the base, the first partial load asks the model what goes where
        for _ in range(repeats):
            swap(back)
            times.append(swap(there))
        checking, loading, tensors = (statistics.median(part) for part in zip(*times, strict=True))
        return {"swap": what, "tensors": int(tensors), "check, s": round(checking, 3), "load, s": round(loading, 3)}

    rows = [row("base to fine-tune", delta, None), row("fine-tune to base", None, delta)]
    for layers, copy in copies.items():
        rows.append(row(f"fine-tune to its copy, {layers} layers differ", copy, delta))
    rows.append(row("fine-tune to itself", delta, delta))
    reloads = []
    for _ in range(repeats):
        started = time.perf_counter()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": dense})
        reloads.append(time.perf_counter() - started)
    seconds = round(statistics.median(reloads), 3)
    return [
        *rows,
        {"swap": "vLLM's reload of the dense fine-tune", "tensors": "all", "check, s": "", "load, s": seconds},
    ]


def benchmark(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.pair:
        base, finetuned = arguments.pair
    else:
        config = measure.llama_config(2, tiny=True)
        # vLLM's attention on CPUs needs a head size of at least 32.
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 2, 32
        base, finetuned, _ = measure.write_synthetic_pair(folder, config)
    compress(str(base), str(finetuned), folder / "delta", ExactConfig(), progress=False)
    copies = {}
    for layers in arguments.differ:
        dense = folder / f"dense{layers}"
        write_copy(finetuned, layers, dense)
        copies[str(layers)] = str(folder / f"copy{layers}")
        compress(str(base), str(dense), copies[str(layers)], ExactConfig(), progress=False)
        shutil.rmtree(dense)
    with mock.patch.dict("os.environ", ENVIRONMENT):
        task = {"swaps": [str(base), str(folder / "delta"), copies, str(finetuned), arguments.repeats]}
        rows = measure.in_fresh_process(__file__, task)["rows"]
    return {
        "machine": measure.machine(),
        "model": str(finetuned) if arguments.pair else "tiny",
        "delta bytes": sum(path.stat().st_size for path in (folder / "delta").glob("*.safetensors")),
        "dense bytes": sum(path.stat().st_size for path in finetuned.glob("*.safetensors")),
        "swaps": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_swaps.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair", nargs=2, type=Path, metavar=("BASE", "FINETUNED"),
        help="local folders of a real pair (default: a tiny one is made)",
    )  # fmt: skip
    parser.add_argument(
        "--differ", type=measure.comma_separated(int), default=[1], metavar="LAYERS,...",
        help="decoder layers that differ between fine-tune and copy (default: 1)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="runs of every measurement (default: 5)")
    parser.add_argument("--work", type=Path, help="folder for the models (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        measure.report_result({"rows": timed_swaps(*json.loads(arguments.worker)["swaps"])})
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        results = benchmark(Path(folder), arguments)
    print(measure.machine_line())
    dense, delta = (f"{results[kind] / 1e6:.1f} MB" for kind in ("dense bytes", "delta bytes"))
    print(f"\n{results['model']}, {dense}; its exact delta, {delta}. Medians\n")
    print(measure.table(results["swaps"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
