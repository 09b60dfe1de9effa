"""Measure several deltas beside one base in transformers against merged models and PEFT's LoRA: tokens/s and memory.

python scripts/benchmark_delta_adapters.py BASE DELTA --counts 1,4,16

Every way of serving has a process of its own, in which all weights are anonymous memory. A batch of 16 rows, the rows
divided evenly among the tenants, is read (prefill) and then continued token by token (decode), through each way's own
calls:

* `base`: the base alone, for comparison;
* `merged`: a dense model for each tenant, each of which gets its own rows;
* `delta dense`, `delta packed`: `load_delta` with these factors, one batch;
* `LoRA 64`, `LoRA 512`: adapters of that rank made by `export-lora`, in PEFT, one batch;
* `LoRA, bytes of the delta`: adapters of at most the delta file's size.

Every tenant has a copy of the same delta or adapter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from measure import comma_separated, machine_line, table
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache

from impart_hf import load_delta
from impart_hf.evaluation.memory import anonymous_bytes, return_freed_memory
from impart_hf.lora.export import export_lora
from impart_hf.modeling.delta_file import DELTA_FILE
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository

ROWS = 16
LORA = {"LoRA 64": 64, "LoRA 512": 512, "LoRA, bytes of the delta": 512}
WAYS = ("base", "merged", "delta dense", "delta packed", *LORA)
Forward = Callable[[torch.Tensor, list[Any]], list[Any]]


def main(argv: list[str]) -> int:
    """Run every way in a process of its own, and print a table."""
    if argv[:1] == ["--worker"]:
        measure.report_result(worker(json.loads(argv[1])))
        return 0
    arguments = _parsed(argv)
    print(machine_line(), flush=True)
    found = []
    with tempfile.TemporaryDirectory() as work:
        places = {name: _adapter(arguments.delta, Path(work), name) for name in LORA if name in arguments.ways}
        for way in arguments.ways:
            for count in arguments.counts if way != "base" else [1]:
                task = {
                    "way": way, "count": count, "base": arguments.base, "source": places.get(way, arguments.delta),
                    "prompt": arguments.prompt_tokens, "new": arguments.new_tokens, "dtype": arguments.dtype,
                }  # fmt: skip
                found.append({"way": way, "count": count, **measure.in_fresh_process(__file__, task)})
                print(json.dumps(found[-1]), flush=True)
    print(table([_row(result, found) for result in found]))
    if arguments.picture is not None:
        _picture(found, arguments.picture)
    return 0


def _adapter(delta: str, work: Path, name: str) -> str:
    """Make an adapter of a delta, and return its folder."""
    size = (Path(delta) / DELTA_FILE).stat().st_size if "bytes" in name else None
    export_lora(open_repository(delta, HubOptions()), work / name, LORA[name], max_bytes=size)
    return str(work / name)


def worker(task: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one way; return seconds of prefill and of decode, and the bytes of all weights."""
    dtype = getattr(torch, task["dtype"])
    with tempfile.TemporaryDirectory() as copies:
        return_freed_memory()
        before = anonymous_bytes()
        forward, caches = _loaded(task, dtype, Path(copies))
        return_freed_memory()
        held = anonymous_bytes() - before
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(10, 300, (ROWS, task["prompt"]), generator=generator)
        with torch.inference_mode():
            forward(prompt[:, :4], caches())  # whatever is made at the first call
            state = caches()
            started = time.perf_counter()
            logits = forward(prompt, state)
            prefill = time.perf_counter() - started
            started = time.perf_counter()
            for _ in range(task["new"]):
                tokens = torch.cat([part[:, -1:].argmax(-1) for part in logits])
                logits = forward(tokens, state)
            decode = time.perf_counter() - started
    return {"prefill": ROWS * task["prompt"] / prefill, "decode": ROWS * task["new"] / decode, "bytes": held}


def _loaded(task: Mapping[str, Any], dtype: torch.dtype, copies: Path) -> tuple[Forward, Callable[[], list[Any]]]:
    """Load one way's models; return what runs a batch, giving logits by part, and what makes empty caches."""
    way, count, source = task["way"], task["count"], task["source"]
    sources = [source, *(str(shutil.copytree(source, copies / str(n))) for n in range(1, count))]
    owners = [f"tenant{row * count // ROWS}" for row in range(ROWS)]
    if way == "merged":
        models = [_dense(source, dtype) for source in sources]
        return partial(_each, models), lambda: [DynamicCache() for _ in models]
    base: Any = _dense(task["base"], dtype)
    if way == "base":
        return partial(_each, [base]), lambda: [DynamicCache()]
    model: Any
    if way.startswith("delta"):
        factors = way.removeprefix("delta ")
        model = load_delta(base, sources[0], adapter_name="tenant0", factors=factors)
        for number, place in enumerate(sources[1:], 1):
            model.load_adapter(place, f"tenant{number}", factors=factors)
    else:
        model = PeftModel.from_pretrained(base, sources[0], adapter_name="tenant0").eval()
        for number, place in enumerate(sources[1:], 1):
            model.load_adapter(place, f"tenant{number}")

    def forward(tokens: torch.Tensor, state: list[Any]) -> list[Any]:
        return [model(input_ids=tokens, past_key_values=state[0], use_cache=True, adapter_names=owners).logits]

    return forward, lambda: [DynamicCache()]


def _dense(source: str, dtype: torch.dtype) -> Any:
    """Load a model whose weights are anonymous memory, not a mapped file."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def _each(models: list[Any], tokens: torch.Tensor, state: list[Any]) -> list[Any]:
    """Run models on their own rows."""
    parts = tokens.chunk(len(models))
    return [
        model(input_ids=part, past_key_values=cache, use_cache=True).logits
        for model, part, cache in zip(models, parts, state, strict=True)
    ]


def _row(result: Mapping[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    base = next((other for other in found if other["way"] == "base"), None)
    more = f"{(result['bytes'] - base['bytes']) / result['count'] / 1e6:.1f}" if base else ""
    return {
        "way": result["way"],
        "tenants": result["count"],
        "prefill, tokens/s": round(result["prefill"]),
        "decode, tokens/s": round(result["decode"], 1),
        "weights, MB": f"{result['bytes'] / 1e6:.0f}",
        "beyond the base, MB a tenant": "" if result["way"] == "base" else more,
    }


def _picture(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4))
    for axes, field, title in zip(
        panels, ("prefill", "decode", "bytes"), ("prefill, tokens/s", "decode, tokens/s", "weights, GB"), strict=True
    ):
        for way in dict.fromkeys(result["way"] for result in found):
            scale = 1e-9 if field == "bytes" else 1
            points = [(result["count"], scale * result[field]) for result in found if result["way"] == way]
            axes.plot(*zip(*points, strict=True), "o-", label=way)
        axes.set(xlabel="tenants", ylabel=title, xscale="log", yscale="log")
    panels[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("delta", help="folder of a delta repository of the base")
    parser.add_argument(
        "--counts", type=comma_separated(int), default=[1, 4, 16], help="numbers of tenants, at most 16"
    )
    parser.add_argument("--ways", type=comma_separated(str), default=list(WAYS))
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
