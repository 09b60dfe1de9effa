"""Requests for several deltas in one batch, the deltas packed: each gets the tokens of its own dense fine-tune."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forged_files import Entries, forge, forge_record
from support.messages import naming
from support.tiny_models import Pair, edit_json, fine_tune, load_tensors, make_model, save_model, save_pair, tiny_config
from support.vllm_engines import HEADS, LONG, NEW_TOKENS, PROMPTS, EngineError, EngineProcess, delta_of, tokens_of
from support.vllm_server import Server

from impart_hf import ExactConfig, LowRankConfig
from impart_hf.lora.export import export_lora
from impart_hf.modeling.model_files import HubOptions, read_json
from impart_hf.repository.open import open_repository

pytestmark = pytest.mark.vllm
OPTIONS = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 8}
ALL = [*PROMPTS, LONG]


@pytest.fixture(scope="module")
def process() -> Iterator[EngineProcess]:
    with EngineProcess(IMPART_HF_PACKED="1") as process:
        yield process


@pytest.fixture
def engine(process: EngineProcess, family: Path) -> EngineProcess:
    process.start(family / "base", **OPTIONS)
    return process


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of another base of the same shape."""
    folder = tmp_path_factory.mktemp("elsewhere")
    base = make_model(tiny_config("llama", **HEADS), seed=9, dtype=torch.float32)
    pair = Pair(save_model(base, folder / "base"), save_model(fine_tune(base), folder / "tuned"))
    return delta_of(pair, folder / "delta")


def test_mixed_batch(engine: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]]) -> None:
    """Every prompt for every delta and the base, all in one batch, twice: the second time blocks are cached."""
    names = [name for _ in ALL for name in ("two", "base", "one", "three")]
    numbers = [number for number in range(len(ALL)) for _ in range(4)]
    expected = [family_tokens[name][number] for name, number in zip(names, numbers, strict=True)]
    deltas = [None if name == "base" else family / name for name in names]
    for _ in range(2):
        found, mixed = engine.run(generate, [ALL[number] for number in numbers], deltas)
        assert found == expected
        assert mixed


def test_more_deltas_than_slots(
    process: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]]
) -> None:
    process.start(family / "base", **{**OPTIONS, "max_loras": 1})
    for name in ("one", "two", "one", "base", "three"):
        delta = None if name == "base" else family / name
        assert process.run(generate, ALL, [delta] * len(ALL))[0] == family_tokens[name], name


def test_adapter_beside_a_delta(
    process: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    base = make_model(tiny_config("llama", **HEADS), dtype=torch.float32)
    tuned = save_model(fine_tune(base, 5, only=lambda name: "up_proj" in name), tmp_path / "tuned")
    delta = delta_of(Pair(family / "base", tuned), tmp_path / "delta")
    export_lora(open_repository(str(delta), HubOptions()), tmp_path / "adapter", 64)
    process.start(family / "base", **{**OPTIONS, "max_lora_rank": 64})
    found, _ = process.run(generate, [LONG] * 3, [tmp_path / "adapter", family / "one", None])
    assert found == [tokens_of(delta, [LONG])[0], family_tokens["one"][-1], family_tokens["base"][-1]]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("llama-tied", HEADS), ("mistral", HEADS), ("qwen2", {"num_attention_heads": 2}), ("qwen3", HEADS)],
)
def test_architectures(process: EngineProcess, tmp_path: Path, kind: str, fields: dict[str, int]) -> None:
    """Tied embeddings, biases of joined layers, norms of heads."""
    base = make_model(tiny_config(kind, **fields), dtype=torch.float32)
    save_model(base, tmp_path / "base")
    deltas = []
    for seed in (1, 2):
        tuned = save_model(fine_tune(base, seed), tmp_path / f"tuned{seed}")
        deltas.append(delta_of(Pair(tmp_path / "base", tuned), tmp_path / f"delta{seed}"))
    expected = [tokens_of(folder, ALL) for folder in (*deltas, tmp_path / "base")]
    assert len({str(tokens) for tokens in expected}) == 3
    process.start(tmp_path / "base", **OPTIONS)
    found, _ = process.run(generate, [*ALL, *ALL, *ALL], [one for one in (*deltas, None) for _ in ALL])
    assert found == [tokens for one in expected for tokens in one]


def test_tensors_that_are_stored_as_they_are(engine: EngineProcess, family: Path, tmp_path: Path) -> None:
    """Matrices and embeddings may be in the delta's file whole."""
    dense = load_tensors(family / "one-dense")
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.k_proj.weight")

    def put_whole(entries: Entries) -> None:
        for name in names:
            del entries[f"{name}.delta"]
            entries[name] = ("F32", list(dense[name].shape), dense[name].numpy().tobytes())

    delta = Path(shutil.copytree(family / "one", tmp_path / "whole"))
    forge(delta, put_whole)
    found, _ = engine.run(generate, [*ALL, LONG], [delta] * len(ALL) + [None])
    assert found == [*tokens_of(delta, ALL), *tokens_of(family / "base", [LONG])]


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_exact_deltas(process: EngineProcess, tmp_path: Path, kind: str) -> None:
    """Their values take the place of the base's, as those of tensors that are stored as they are."""
    pair = save_pair(tmp_path, tiny_config(kind, **HEADS), dtype=torch.float32)
    exact = delta_of(pair, tmp_path / "exact", ExactConfig())
    lossy = delta_of(pair, tmp_path / "lossy", LowRankConfig(compression_ratio=12))
    process.start(pair.base, **OPTIONS)
    found, _ = process.run(generate, [*ALL, *ALL, LONG], [exact] * len(ALL) + [lossy] * len(ALL) + [None])
    assert found == [*tokens_of(pair.finetuned, ALL), *tokens_of(lossy, ALL), *tokens_of(pair.base, [LONG])]


class TestRefused:
    """What cannot be served is an error when the delta is added, after which the engine goes on."""

    def refuses(self, engine: EngineProcess, delta: Path, *names: object) -> None:
        with pytest.raises(EngineError, match=naming(*names)):
            engine.run(add, delta)
        assert len(engine.tokens([LONG])) == 1

    def test_nothing_there(self, engine: EngineProcess, tmp_path: Path) -> None:
        self.refuses(engine, tmp_path / "nothing", "nothing")

    def test_another_base(self, engine: EngineProcess, elsewhere: Path) -> None:
        self.refuses(engine, elsewhere, "WrongBaseError", elsewhere)

    def test_another_model(self, engine: EngineProcess, family: Path, tmp_path: Path) -> None:
        delta = Path(shutil.copytree(family / "one", tmp_path / "other"))
        text_config = read_json(delta / "config.json")["text_config"]
        edit_json(delta / "config.json", text_config={**text_config, "rms_norm_eps": 0.25})
        self.refuses(engine, delta, "DeltaRefusedError", "rms_norm_eps", 0.25)

    def test_damaged(self, engine: EngineProcess, family: Path, tmp_path: Path) -> None:
        delta = Path(shutil.copytree(family / "one", tmp_path / "damaged"))
        forge_record(delta, lambda data: data[:-1])
        self.refuses(engine, delta, "DeltaFormatError")

    def test_prompt_logprobs(self, engine: EngineProcess, family: Path) -> None:
        for delta in (family / "one", None):
            with pytest.raises(EngineError, match=naming("prompt_logprobs")):
                engine.run(generate, [LONG], [delta], prompt_logprobs=1)
        assert len(engine.tokens([LONG])) == 1

    def test_no_place_in_the_model(self, engine: EngineProcess, family: Path) -> None:
        with pytest.raises(EngineError, match=naming("DeltaRefusedError", "model.embed_tokens.weight", "15 more")):
            engine.run(read_without_places, family / "one")


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("llama", {"enforce_eager": False}, ("--enforce-eager",)),
        ("gemma", {}, ("GemmaForCausalLM",)),
    ],
)  # fmt: skip
def test_engines_without_deltas(
    process: EngineProcess, tmp_path: Path, kind: str, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    save_model(make_model(tiny_config(kind, **HEADS), dtype=torch.float32), tmp_path / "base")
    with pytest.raises(EngineError, match=naming("IMPART_HF_PACKED", *names)):
        process.start(tmp_path / "base", **{**OPTIONS, **options})


def test_rows_that_are_not_the_batchs(engine: EngineProcess, family: Path) -> None:
    """Rather than give some rows the wrong delta, the model fails."""
    engine.run(generate, [LONG], [family / "one"])
    for module in ("logits_processor", "model.norm"):
        with pytest.raises(EngineError, match=naming("RuntimeError", module, "2 rows", 3)):
            engine.run(call_with_two_rows, module)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_memory_of_a_delta(process: EngineProcess, tmp_path: Path, kind: str) -> None:
    """A further delta takes what its file does; what tied layers share, once."""
    pair = save_pair(tmp_path, tiny_config(kind, **HEADS), dtype=torch.float32)
    delta = delta_of(pair, tmp_path / "delta")
    process.start(pair.base, **OPTIONS)
    assert 0 < process.run(memory, delta) < 1.1 * (delta / "delta_model.safetensors").stat().st_size


def test_server(family: Path, family_tokens: dict[str, list[list[int]]], elsewhere: Path) -> None:
    """A request's `model` is the name of a delta; one that cannot be loaded is an answer, and the server goes on."""
    env = {
        "IMPART_HF_PACKED": "1",
        "VLLM_PLUGINS": "impart_hf",
        "IMPART_HF_DELTAS": f"two={family / 'two'},three={family / 'three'},other={elsewhere}",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    static = ("--lora-modules", f"one={family / 'one'}")
    with Server(
        family / "base", "--enable-lora", "--max-loras", "3", "--max-lora-rank", "1", *static, env=env
    ) as server:
        names = ["one", "two", "base", "three"] * 2

        def say(name: str) -> list[list[int]]:
            return server.all_tokens(ALL, NEW_TOKENS, model=str(family / "base") if name == "base" else name)

        wrong = {"lora_name": "wrong", "lora_path": str(elsewhere)}
        status, answer = server.request("/v1/load_lora_adapter", wrong)
        # vLLM leaves out paths.
        assert status == 500 and re.search(naming("engine's base", "lm_head.weight"), answer["error"]["message"])
        body = {"model": "other", "prompt": "The", "max_tokens": 1}
        status, answer = server.request("/v1/completions", body)
        assert status == 422 and re.search(naming("is not the base of", elsewhere), answer["error"]["message"])
        with ThreadPoolExecutor(len(names)) as pool:
            assert list(pool.map(say, names)) == [family_tokens[name] for name in names]


# What follows runs in the engine's process.


def request_for(folder: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(str(folder), 1 + hash(str(folder)) % 1_000_000, str(folder))


def generate(
    holder: Any, prompts: list[list[int]], adapters: list[Path | None], **options: Any
) -> tuple[list[list[int]], bool]:
    """What each prompt's adapter or delta says, by one call; and whether several deltas were in one batch."""
    from unittest import mock

    from vllm import SamplingParams

    from impart_hf.serving.packed_batches import Batch

    most = 0
    divide = Batch.divide

    def counted(batch: Batch, *arguments: Any) -> None:
        nonlocal most
        divide(batch, *arguments)
        most = max(most, len(batch.tokens))

    parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, **options)
    requests = [folder and request_for(folder) for folder in adapters]
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    with mock.patch.object(Batch, "divide", counted):
        outputs = holder.llm.generate(given, parameters, use_tqdm=False, lora_request=requests)
    return [list(output.outputs[0].token_ids) for output in outputs], most > 1


def add(holder: Any, folder: Path) -> None:
    holder.llm.llm_engine.add_lora(request_for(folder))


def manager_of(holder: Any) -> Any:
    return holder.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager


def call_with_two_rows(holder: Any, module: str) -> None:
    from vllm.lora.layers import LoRAMapping

    manager = manager_of(holder)
    (delta,) = manager.list_adapters()
    manager.set_adapter_mapping(LoRAMapping((delta,) * 3, (delta,) * 3, is_prefill=True))
    rows = torch.zeros(2, 64)
    if module == "logits_processor":
        manager.model.compute_logits(rows)
    else:
        manager.model.get_submodule(module)(rows)


def read_without_places(holder: Any, folder: Path) -> None:
    from torch import nn

    from impart_hf.serving.packed_effects import read_effects

    read_effects(open_repository(str(folder), HubOptions()), nn.Sequential(nn.Linear(1, 1)), torch.float32, False)


def memory(holder: Any, folder: Path) -> int:
    """Bytes of the arrays and tensors that a delta holds."""
    import gc
    from types import FunctionType, ModuleType

    import numpy as np

    add(holder, folder)
    manager = manager_of(holder)
    (delta,) = manager.list_adapters().values()
    seen = {id(thing) for thing in (*manager.model.modules(), *manager.model.parameters())}
    found: dict[int, int] = {}  # by address
    pending: list[Any] = list(delta.effects.by_module.values())
    while pending:
        thing = pending.pop()
        if id(thing) in seen or isinstance(thing, type | FunctionType | ModuleType):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, np.ndarray):
            while isinstance(thing.base, np.ndarray):
                thing = thing.base
            found[thing.ctypes.data] = thing.nbytes
        else:
            pending += gc.get_referents(thing)
    assert sum(found.values()) <= 1.1 * delta.effects.nbytes
    return sum(found.values())
