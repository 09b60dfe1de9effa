"""What two processes find that load a delta together: `torchrun --nproc-per-node 2 -m support.spread_runs FOLDER`.

FOLDER has the deltas of two models. The first process writes found.json there, with what each process found.
tests/modeling/test_spread_models.py judges it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from impart_hf.modeling.delta_repository import DeltaRepository
from support.loaded_models import logits

KINDS = ("llama", "qwen2")


def largest_difference(model: Any, other: Any) -> float:
    return (logits(model).float() - logits(other).float()).abs().max().item()


def loaded(delta: Path, **options: Any) -> tuple[Any, dict[str, int]]:
    """Load a delta, and return how many entries of each tensor this process has decoded."""
    entries: dict[str, int] = {}
    part = DeltaRepository.part

    def counting(self: DeltaRepository, name: str, index: Any, device: Any = "cpu") -> torch.Tensor:
        tensor = part(self, name, index, device)
        entries[name] = entries.get(name, 0) + tensor.numel()
        return tensor

    def no_whole(self: DeltaRepository, name: str, device: Any = "cpu") -> torch.Tensor:
        if self.parts[name].records and not name.endswith("embed_tokens.weight"):
            raise AssertionError(f"{name} is decoded whole")
        return tensor(self, name, device)

    tensor = DeltaRepository.tensor
    DeltaRepository.part, DeltaRepository.tensor = counting, no_whole  # type: ignore[method-assign]
    try:
        return AutoModelForCausalLM.from_pretrained(delta, dtype=torch.float32, **options), entries
    finally:
        DeltaRepository.part, DeltaRepository.tensor = part, tensor  # type: ignore[method-assign]


def spread(folder: Path, kind: str, way: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load, run, save, change one rank's weights and save again."""
    delta, out = folder / f"{kind}-delta", folder / f"{kind}-{way}"
    whole = AutoModelForCausalLM.from_pretrained(delta, dtype=torch.float32)
    model, entries = loaded(delta, **options)
    found: dict[str, Any] = {"entries": entries, "changed": [model.weights_changed()]}
    found["off"] = [largest_difference(model, whole)]
    found["changed"].append(model.weights_changed())
    model.save_pretrained(out / "same")
    weight = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        whole.get_parameter(weight)[0, 0] += 1
        if distributed.get_rank() == 0:
            model.get_parameter(weight).to_local()[0, 0] += 1
    found["changed"].append(model.weights_changed())
    model.save_pretrained(out / "changed")
    found["off"].append(largest_difference(AutoModelForCausalLM.from_pretrained(out / "changed"), whole))
    return found


def sent(folder: Path) -> dict[str, Any]:
    """Load as accelerate's FSDP has it, which sends the first process's weights to the others."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    checked = []
    original = DeltaRepository.base_tensor

    def counting(self: DeltaRepository, name: str) -> torch.Tensor:
        checked.append(name)
        return original(self, name)

    DeltaRepository.base_tensor = counting  # type: ignore[method-assign]
    try:
        model = AutoModelForCausalLM.from_pretrained(folder / "llama-delta", dtype=torch.float32)
    finally:
        DeltaRepository.base_tensor = original  # type: ignore[method-assign]
        del os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
    for parameter in model.parameters():
        distributed.broadcast(parameter.data, 0)
    whole = AutoModelForCausalLM.from_pretrained(folder / "llama-delta", dtype=torch.float32)
    return {"read": len(checked), "off": largest_difference(model, whole)}


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore", FutureWarning)
    found = {}
    for kind in KINDS:
        found[f"{kind} tp"] = spread(folder, kind, "tp", {"tp_plan": "auto"})
    found["llama fsdp"] = spread(folder, "llama", "fsdp", {"distributed_config": DistributedConfig(fsdp_size=2)})
    found["sent"] = sent(folder)
    of_all: list[Any] = [None, None]
    distributed.all_gather_object(of_all, found)
    if distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(of_all))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
