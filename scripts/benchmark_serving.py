"""Measure the cost of serving a delta with vLLM: start-up and memory against the dense fine-tune, and swaps.

Each engine runs in a fresh process, without a second process of its own, eager, and with the same KV cache size for
all. "LLM(...)" is the time that this call takes, without imports. "restart" is the time from the start of Python to
the first token, which a swap saves. A swap has two parts: the delta is checked while the engine continues to serve,
then the engine is paused and loads it. With IMPART_HF_SCRATCH the first part also decodes the delta. Both parts are
compared with the least that any swap must do: read every byte of the base once from memory.
"""

from __future__ import annotations

import argparse
import json
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

from impart_hf import compress
from impart_hf.evaluation.memory import PeakMemory, return_freed_memory
from impart_hf.methods import method_class, method_names
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.model_files import HubOptions

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def start(model: str) -> Any:
    """Start an engine without a tokenizer; prompts are token ids."""
    from vllm import LLM

    settings = {"enforce_eager": True, "max_model_len": 256, "disable_log_stats": True, "skip_tokenizer_init": True}
    return LLM(model, **settings)


def timed_start(model: str) -> dict[str, float]:
    """Start an engine; return the seconds, the peak of anonymous memory until then, and one generated token."""
    import vllm.entrypoints.llm  # noqa: F401  (otherwise its import would be timed)

    return_freed_memory()
    with PeakMemory() as memory:
        started = time.perf_counter()
        llm = start(model)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": memory.bytes, "held": memory.grown, "token": _token(llm)}


def _token(llm: Any) -> int:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    return llm.generate([{"prompt_token_ids": [5, 6, 7]}], parameters, use_tqdm=False)[0].outputs[0].token_ids[0]


def timed_swaps(base: str, deltas: list[str], dense: str, scratch: str, repeats: int) -> dict[str, Any]:
    """Swap back and forth between deltas in one engine that was started on their base; return the median seconds."""
    from impart_hf.serving.deltas import DeltaChecker

    llm = start(base)
    found = {"reading the base once from memory": measure.best_seconds(lambda: _read(base), 5)}

    def swap(checker: DeltaChecker, delta: str) -> tuple[float, float]:
        """Do what `DeltaSwitch.load` does; return the seconds of the check and of the load."""
        started = time.perf_counter()
        checked = checker.check(delta)
        between = time.perf_counter()
        arguments = (checked.repo, checked.revision, checked.dense)
        answers = llm.collective_rpc("impart_hf_load_delta", args=arguments)
        llm.reset_prefix_cache()
        assert answers[0]["error"] is None, answers
        return between - started, time.perf_counter() - between

    def median_swap(what: str, checker: DeltaChecker) -> None:
        swap(checker, deltas[0])  # only the first check reads the whole base
        times = [swap(checker, deltas[(number + 1) % len(deltas)]) for number in range(repeats)]
        checking, loading = (statistics.median(part) for part in zip(*times, strict=True))
        found[f"{what}: check, while serving"], found[f"{what}: load, engine paused"] = checking, loading

    with PeakMemory() as memory:
        median_swap("swap", DeltaChecker(llm.llm_engine.vllm_config))
    _token(llm)
    with mock.patch.dict("os.environ", {"IMPART_HF_SCRATCH": scratch}):
        median_swap("swap with IMPART_HF_SCRATCH", DeltaChecker(llm.llm_engine.vllm_config))
    reloads = []
    for _ in range(repeats):
        started = time.perf_counter()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": dense})
        reloads.append(time.perf_counter() - started)
    found["vLLM's reload of the dense fine-tune, engine paused"] = statistics.median(reloads)
    return {"seconds": found, "peak": memory.bytes}


def _read(base: str) -> None:
    checkpoint = Checkpoint(base, HubOptions())
    for name in checkpoint.names():
        checkpoint.tensor(name).flatten().view(torch.int64).sum()


def benchmark(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    config = measure.llama_config(arguments.layers, tiny=arguments.tiny)
    if arguments.tiny:
        # vLLM's attention on CPUs needs a head size of at least 32.
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 2, 32
    if arguments.pair:
        base, finetuned = arguments.pair
        largest = measure.largest_tensor(base)
    else:
        base, finetuned, largest = measure.write_synthetic_pair(folder, config)
    settings = method_class(arguments.method)
    deltas = [str(folder / f"delta-{seed}") for seed in (0, 1)]
    for seed, delta in enumerate(deltas):
        compress(
            str(base), str(finetuned), delta, settings(compression_ratio=arguments.ratio, seed=seed), progress=False
        )
    rows: list[dict[str, Any]] = []
    with mock.patch.dict("os.environ", ENVIRONMENT):
        for name, model in (("dense fine-tune", str(finetuned)), ("delta repository", deltas[0])):
            if not arguments.tiny:  # the first start of an architecture fills vLLM's cache
                measure.in_fresh_process(__file__, {"start": model})
            starts, restarts = [], []
            for _ in range(arguments.repeats):
                started = time.perf_counter()
                starts.append(measure.in_fresh_process(__file__, {"start": model}))
                restarts.append(time.perf_counter() - started)
            rows.append(
                {
                    "served": name,
                    "restart, seconds": round(statistics.median(restarts), 2),
                    "LLM(...), seconds": round(statistics.median(run["seconds"] for run in starts), 2),
                    "peak, GB": round(statistics.median(run["peak"] for run in starts) / 1e9, 2),
                    "held then, GB": round(statistics.median(run["held"] for run in starts) / 1e9, 2),
                }
            )
        task = {"swaps": [str(base), deltas, str(finetuned), str(folder), arguments.repeats]}
        swaps = measure.in_fresh_process(__file__, task)
    reading = swaps["seconds"]["reading the base once from memory"]
    restart = rows[1]["restart, seconds"]
    return {
        "machine": measure.machine(),
        "model": str(finetuned) if arguments.pair else f"LLaMA-7B shapes, {arguments.layers} layers",
        "method": arguments.method,
        "ratio": arguments.ratio,
        "base bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
        "starts": rows,
        "swaps": [
            {
                "what": what,
                "seconds": round(seconds, 3),
                "of reading the base": round(seconds / reading, 1),
                "of a restart": round(seconds / restart, 3),
            }
            for what, seconds in swaps["seconds"].items()
        ],
        "peak of swaps, of the largest tensor in float32": round(swaps["peak"] / (4 * largest), 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_serving.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair", nargs=2, type=Path, metavar=("BASE", "FINETUNED"),
        help="local folders of a real pair, in place of the synthetic one",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the synthetic model (default: 2)")
    parser.add_argument("--ratio", type=float, default=32.0, help="compression ratio (default: 32)")
    parser.add_argument(
        "--method", choices=method_names(), default="impart", help="compression method (default: impart)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of every measurement (default: 5)")
    parser.add_argument("--work", type=Path, help="folder for the models, a few GB (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--tiny", action="store_true", help="use tiny matrices, to try out the script")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        task = json.loads(arguments.worker)
        measure.report_result(timed_start(task["start"]) if "start" in task else timed_swaps(*task["swaps"]))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        results = benchmark(Path(folder), arguments)
    print(measure.machine_line())
    size = results["base bytes"] / 1e9
    print(f"\n{results['model']}, {size:.2f} GB; {arguments.method}, ratio {arguments.ratio:g}\n")
    print(measure.table(results["starts"]))
    print("\nSwaps, medians\n")
    print(measure.table(results["swaps"]))
    share = results["peak of swaps, of the largest tensor in float32"]
    print(f"\nPeak memory of swaps beyond the engine: {share} of the largest tensor in float32")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
