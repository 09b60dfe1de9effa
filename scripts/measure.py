"""Helpers that the benchmarks share: machine description, fresh processes, tables, synthetic deltas."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# OpenMP reads this when torch is loaded. On cores shared with other programs, threads that spin while they wait make
# timings several times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from impart_hf.calibration.text import calibration_tokens
from impart_hf.common.machine import machine as machine
from impart_hf.compression.shapes import synthetic_delta as synthetic_delta
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.model_files import HubOptions

_RESULT = "RESULT "  # marks the line of a worker's output that holds its result


def comma_separated(kind: Callable[[str], Any]) -> Callable[[str], list]:
    """Return a parser of comma-separated values of a kind, for argparse."""

    def parse(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "comma-separated values"  # argparse uses it in its error message
    return parse


def text_sequences(source: Path, tokenizer: Any, tokens: int, length: int) -> torch.Tensor:
    """Return sequences of a text, int64 (sequences, length): as many as `tokens` fill, at least one."""
    return calibration_tokens(source, tokenizer, samples=max(1, tokens // length), length=length)


def machine_line(device: str = "cpu") -> str:
    return "Machine: " + ", ".join(f"{name} {value}" for name, value in machine(device).items())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a markdown table; the first row's keys are the columns."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def synchronize(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(work: Callable[[], Any], repeats: int, device: str | torch.device = "cpu") -> float:
    """Return the shortest of several runs, because other programs can only make a run longer."""
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def in_fresh_process(script: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """Run `script --worker TASK` in a process of its own and return what it passed to `report_result`.

    Raises:
        RuntimeError: if it failed; the message has the end of its output.
    """
    command = [sys.executable, str(Path(script).resolve()), "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    results = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not results:
        raise RuntimeError(f"{Path(script).name} failed on {dict(task)}:\n{done.stderr[-3000:]}")
    return json.loads(results[-1][len(_RESULT) :])


def report_result(result: Mapping[str, Any]) -> None:
    print(_RESULT + json.dumps(result), flush=True)


def drop_page_cache(folders: Iterable[Path]) -> None:
    """Drop the cached pages of all files in the folders, so that the next reader reads them from disk."""
    for folder in folders:
        for path in (p for p in folder.iterdir() if p.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # pages that are not yet written cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def llama_shards(config: LlamaConfig) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of a LLaMA's tensors by name, for one file after the other: one for each layer."""
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = config.num_key_value_heads * hidden // config.num_attention_heads
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, hidden)},
        {"lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)},
    ]
    for layer in range(config.num_hidden_layers):
        attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        names = {f"self_attn.{n}_proj": s for n, s in attention.items()} | {f"mlp.{n}_proj": s for n, s in mlp.items()}
        norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shards.append({f"model.layers.{layer}.{name}.weight": shape for name, shape in (names | norms).items()})
    return shards


def write_synthetic_pair(folder: Path, config: LlamaConfig, seed: int = 0) -> tuple[Path, Path, int]:
    """Write a LLaMA base and a fine-tune of it, bfloat16, one file per layer; every matrix has a `synthetic_delta`.

    Returns:
        The two folders, and the number of entries of the largest tensor.
    """
    shards = llama_shards(config)
    folders = folder / "base", folder / "finetuned"
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for target in folders:
        target.mkdir(parents=True)
        config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
        config.save_pretrained(target)
    for number, shard in enumerate(shards):
        filename = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        pair: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = {}, {}
        for name, shape in shard.items():
            weight_map[name] = filename
            if len(shape) == 1:
                weight, delta = torch.ones(shape), torch.randn(shape, generator=generator) * 1e-3
            else:
                weight = torch.randn(shape, generator=generator) * 0.02
                delta = synthetic_delta(*shape, seed=seed + len(weight_map))
            pair[0][name] = weight.bfloat16()
            pair[1][name] = (pair[0][name].float() + delta).bfloat16()
        for target, tensors in zip(folders, pair, strict=True):
            save_file(tensors, target / filename, metadata={"format": "pt"})
    for target in folders:
        index = {"metadata": {}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return *folders, max(math.prod(shape) for shard in shards for shape in shard.values())


def largest_tensor(folder: Path) -> int:
    """Return the number of entries of the largest tensor of a local checkpoint."""
    checkpoint = Checkpoint(str(folder), HubOptions())
    return max(math.prod(checkpoint.shape(name)) for name in checkpoint.names())


def llama_config(layers: int, *, tiny: bool = False) -> LlamaConfig:
    """Return LLaMA-7B's configuration with a given number of layers; `tiny` shapes are for trying out a benchmark."""
    shape = (64, 160, 4, 256) if tiny else (4096, 11008, 32, 32000)
    return LlamaConfig(
        hidden_size=shape[0], intermediate_size=shape[1], num_attention_heads=shape[2], num_key_value_heads=shape[2],
        vocab_size=shape[3], num_hidden_layers=layers,
    )  # fmt: skip
