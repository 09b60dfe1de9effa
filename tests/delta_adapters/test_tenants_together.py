"""Threads that load, choose and delete deltas while others generate; and what deltas take of memory."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from pathlib import Path

import pytest
import torch
from support.delta_tenants import IDS, Tenants, generates, load_dense, make_tenants
from support.tiny_models import tiny_config

from impart_hf import DeltaModel, ImPartQtConfig, load_delta

ROUNDS = 100


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return make_tenants(tmp_path_factory.mktemp("tenants"), tiny_config("llama", num_hidden_layers=1))


def test_changes_while_others_generate(tenants: Tenants) -> None:
    """Right or a clear error, and of a call that began, right."""
    wanted = {name: generates(load_dense(tenants.folder(name))) for name in ("one", "two", "__base__")}
    model = load_delta(tenants.load_base(), tenants.deltas["one"], "one")
    problems: list[str] = []
    counts = {"right": 0, "refused": 0, "changes": 0}
    done = threading.Event()

    def ask(seed: int) -> None:
        choose = random.Random(seed)
        while not done.is_set():
            names = [choose.choice(("one", "two", "__base__")) for _ in range(len(IDS))]
            try:
                found = generates(model, adapter_names=names)
            except ValueError as error:  # "two" is not loaded now
                counts["refused"] += 1
                if "there is no delta 'two'" not in str(error):
                    problems.append(str(error))
                continue
            except Exception as error:
                problems.append(repr(error))
                return
            counts["right"] += 1
            if not all(torch.equal(found[i], wanted[name][i]) for i, name in enumerate(names)):
                problems.append(f"wrong tokens of {names}")

    def ask_the_active_one() -> None:
        while not done.is_set():
            found = generates(model)
            if not any(torch.equal(found, tokens) for tokens in wanted.values()):
                problems.append("a mixture of two deltas")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2)]
    threads.append(threading.Thread(target=ask_the_active_one))
    for thread in threads:
        thread.start()
    choose = random.Random(0)
    try:
        for _ in range(ROUNDS):
            if "two" not in model.adapter_names:
                model.load_adapter(tenants.deltas["two"], "two")
            elif choose.random() < 0.5:
                model.set_adapter(choose.choice(("one", "two")))
            else:
                model.delete_adapter("two")
            counts["changes"] += 1
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not problems and counts["changes"] == ROUNDS and counts["right"] and counts["refused"], (problems, counts)


def test_a_deleted_delta_is_freed(tenants: Tenants) -> None:
    model = load_delta(tenants.load_base(), tenants.deltas["one"], "one")
    model.load_adapter(tenants.deltas["two"], "two")
    effects = [weakref.ref(effect) for effect in model._deltas["two"].effects.values()]
    generates(model, adapter_names=["two", "one", "two", "__base__"])
    model.delete_adapter("two")
    gc.collect()
    assert effects and not any(ref() for ref in effects)


def held_bytes(model: DeltaModel, name: str) -> int:
    """The bytes of all arrays and tensors that a delta holds and the base does not, by what the collector finds."""
    base = {tensor.data_ptr() for tensor in model.base_model.state_dict().values()}
    seen: set[int] = set()
    waiting: list[object] = [model._deltas[name].effects]
    total = 0
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, type) or type(found).__name__ in ("module", "function"):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            total += 0 if found.data_ptr() in base else found.untyped_storage().nbytes()
        elif type(found).__name__ == "ndarray":
            total += found.nbytes  # type: ignore[attr-defined]
        elif not isinstance(found, str | int | float):
            waiting += gc.get_referents(found)
    return total


def test_packed_deltas_take_the_room_of_their_files(tmp_path: Path) -> None:
    wide = tiny_config("llama-tied", hidden_size=256, intermediate_size=512)
    tenants = make_tenants(tmp_path, wide, ImPartQtConfig(compression_ratio=8))
    model = load_delta(tenants.load_base(), tenants.deltas["one"], "packed", factors="packed")
    model.load_adapter(tenants.deltas["one"], "dense", factors="dense")
    file = (tenants.deltas["one"] / "delta_model.safetensors").stat().st_size
    packed, dense = held_bytes(model, "packed"), held_bytes(model, "dense")
    assert 0.5 * file < packed <= 1.3 * file < dense
