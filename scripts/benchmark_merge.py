"""Measure the time and memory of merging, against mergekit where it has the merge method.

The models are synthetic: LLaMA-13B's embeddings, output projection and one decoder layer, and fine-tunes of them. Every
merge runs in a process of its own. Memory is the peak of anonymous memory, which does not include mapped files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from impart_hf import merge
from impart_hf.evaluation.memory import PeakMemory
from impart_hf.merging.config import MERGE_METHODS

_MERGEKIT = ("task_arithmetic", "ties")  # methods that both tools define the same way


def timed_merge(tool: str, config: dict[str, Any], output: str) -> dict[str, float]:
    """Merge once, and return the seconds and the peak of anonymous memory."""
    if tool == "mergekit":
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        content = MergeConfiguration.model_validate(config)
        with PeakMemory() as memory:
            started = time.perf_counter()
            run_merge(content, output, MergeOptions(copy_tokenizer=False, quiet=True))
            seconds = time.perf_counter() - started
    else:
        import peft  # noqa: F401  (imported lazily otherwise, which would be timed)

        with PeakMemory() as memory:
            started = time.perf_counter()
            merge(config, output)
            seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": memory.bytes}


def write_models(folder: Path, config: LlamaConfig, count: int) -> tuple[Path, list[Path]]:
    """Write a base and fine-tunes of it, in bfloat16."""
    base, first, _ = measure.write_synthetic_pair(folder, config)
    finetunes = [first]
    for number in range(1, count):
        target = folder / f"finetuned{number}"
        shutil.copytree(base, target)
        generator = torch.Generator().manual_seed(number)
        for path in target.glob("*.safetensors"):
            tensors = {
                name: (tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
                for name, tensor in load_file(path).items()
            }
            save_file(tensors, path, metadata={"format": "pt"})
        finetunes.append(target)
    return base, finetunes


def benchmark(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    shape = (64, 160, 4, 256) if arguments.tiny else (5120, 13824, 40, 32000)
    config = LlamaConfig(
        hidden_size=shape[0], intermediate_size=shape[1], num_attention_heads=shape[2], num_key_value_heads=shape[2],
        vocab_size=shape[3], num_hidden_layers=1,
    )  # fmt: skip
    base, finetunes = write_models(folder, config, arguments.models)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    rows = []
    for method in arguments.methods:
        parameters = {"density": 0.5, "weight": 1 / len(finetunes)}
        content = {
            "merge_method": method,
            "base_model": str(base),
            "models": [{"model": str(model), "parameters": parameters} for model in finetunes],
            "dtype": "float32" if arguments.tiny else "bfloat16",
        }
        for tool in ("impart-hf", "mergekit") if method in _MERGEKIT else ("impart-hf",):
            output = folder / "merged"
            task = {"tool": tool, "config": content, "output": str(output)}
            found = measure.in_fresh_process(__file__, task)
            shutil.rmtree(output)
            rows.append({"method": method, "tool": tool, "seconds": found["seconds"], "peak, GB": found["peak"] / 1e9})
            print(f"{method}, {tool}: {found}", file=sys.stderr)
    return {"machine": measure.machine(), "models": len(finetunes), "bytes of each": size, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_merge.py", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=5, help="number of fine-tunes to merge (default: 5)")
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), default=["task_arithmetic", "ties"],
        help="merge methods, comma-separated (default: task_arithmetic,ties)",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, help="folder for the models, 10 GB (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--tiny", action="store_true", help="use tiny matrices, to try out the script")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        measure.report_result(timed_merge(**json.loads(arguments.worker)))
        return 0
    if unknown := sorted(set(arguments.methods) - set(MERGE_METHODS)):
        parser.error(f"unknown method {unknown[0]}; choose one of {', '.join(MERGE_METHODS)}")
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        results = benchmark(Path(folder), arguments)
    print(f"{measure.machine_line()}\n\n{results['models']} models of {results['bytes of each'] / 1e9:.2f} GB\n")
    print(measure.table(results["rows"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
