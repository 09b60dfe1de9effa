"""Swapping the delta of a running engine: the tokens after a swap are those of an engine started on that delta."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_files import UP, forge_record
from test_vllm_models import HEADS, delta_of, reference
from tiny_models import (
    VOCABULARY,
    Pair,
    edit_json,
    edit_tensors,
    fine_tune,
    make_model,
    save_model,
    tiny_config,
)
from vllm_engines import PROMPTS, EngineError, EngineProcess

pytestmark = pytest.mark.vllm
LONG = [(11 * i) % VOCABULARY for i in range(100)]  # long enough for whole blocks of it to be cached


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three deltas of it: `base`, `one`, `two`, `three`."""
    folder = tmp_path_factory.mktemp("models")
    base = make_model(tiny_config("llama", **HEADS), dtype=torch.float32)
    save_model(base, folder / "base")
    for seed, name in enumerate(("one", "two", "three"), 1):
        tuned = save_model(fine_tune(base, seed), folder / f"{name}-dense")
        delta_of(Pair(folder / "base", tuned), folder / name)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[list[int]]]:
    """What an engine should say, by what it serves."""
    found = {name: reference(folder / name, [*PROMPTS, LONG]) for name in ("base", "one", "two", "three")}
    assert len({str(tokens) for tokens in found.values()}) == len(found)
    return found


@pytest.fixture(scope="module")
def process() -> Iterator[EngineProcess]:
    with EngineProcess() as process:
        yield process


@pytest.fixture
def engine(process: EngineProcess, folder: Path) -> EngineProcess:
    process.start(folder / "base")
    return process


def load(holder: Any, repo: Path | None) -> tuple[str | None, str | None, tuple[str, ...]]:
    from impart_hf.serving import DeltaSwitch

    if holder.deltas is None:
        holder.deltas = DeltaSwitch(holder.llm)
    checked = holder.deltas.load(repo if repo is None else str(repo))
    assert holder.deltas.loaded == checked.repo
    return checked.repo, checked.revision, checked.notes


def says(engine: EngineProcess, tokens: list[list[int]]) -> bool:
    return engine.tokens([*PROMPTS, LONG]) == tokens


@pytest.mark.parametrize("start", ["base", "one"])
def test_fifty_random_swaps(
    process: EngineProcess, folder: Path, expected: dict[str, list[list[int]]], start: str
) -> None:
    process.start(folder / start)
    assert says(process, expected[start])
    draw = random.Random(start)
    names = [draw.choice(list(expected)) for _ in range(50)]
    for number, name in enumerate(names):
        process.run(load, None if name == "base" else folder / name)
        if number % 5 == 0:
            assert says(process, expected[name]), (number, name)
    process.run(load, folder / "two")
    assert says(process, expected["two"])


def test_prefix_cache_does_not_outlive_its_delta(
    engine: EngineProcess, folder: Path, expected: dict[str, list[list[int]]]
) -> None:
    assert engine.tokens([LONG]) == expected["base"][-1:]
    engine.run(load, folder / "one")
    assert engine.tokens([LONG]) == expected["one"][-1:]
    engine.run(load, None)
    assert engine.tokens([LONG]) == expected["base"][-1:]


def test_compiled_engine(process: EngineProcess, folder: Path, expected: dict[str, list[list[int]]]) -> None:
    process.start(folder / "one", enforce_eager=False)
    for name in ("two", "base", "one"):
        process.run(load, None if name == "base" else folder / name)
        assert says(process, expected[name])


def test_notes_say_what_stays(engine: EngineProcess, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder / "one", tmp_path / "one")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    edit_json(other / "generation_config.json", temperature=0.5)
    assert engine.run(load, folder / "one")[2] == ()
    notes = engine.run(load, other)[2]
    assert [note.split()[0] for note in notes] == ["chat_template.jinja", "generation_config.json"]


@pytest.fixture(scope="class")
def serving(process: EngineProcess, folder: Path) -> EngineProcess:
    """An engine that serves delta `one`."""
    process.start(folder / "base")
    process.run(load, folder / "one")
    return process


class TestRefused:
    """What cannot be loaded changes nothing: the engine says what it said before, and swaps on."""

    @pytest.fixture(autouse=True)
    def unchanged(self, serving: EngineProcess, expected: dict[str, list[list[int]]]) -> Iterator[None]:
        yield
        assert says(serving, expected["one"])

    def refuses(self, engine: EngineProcess, repo: Path, message: str) -> None:
        with pytest.raises(EngineError, match=message):
            engine.run(load, repo)

    @pytest.fixture
    def two(self, folder: Path, tmp_path: Path) -> Path:
        """A copy of a delta to spoil."""
        return Path(shutil.copytree(folder / "two", tmp_path / "two"))

    def test_not_there(self, serving: EngineProcess, tmp_path: Path) -> None:
        self.refuses(serving, tmp_path / "nothing", "CheckpointError.*nothing")

    def test_dense(self, serving: EngineProcess, folder: Path) -> None:
        self.refuses(serving, folder / "two-dense", "CheckpointError.*'llama' model, not a delta repository")

    def test_truncated(self, serving: EngineProcess, two: Path) -> None:
        file = two / "delta_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        self.refuses(serving, two, "DeltaFormatError.*is damaged")

    def test_flipped_byte(self, serving: EngineProcess, two: Path) -> None:
        data = bytearray((two / "delta_model.safetensors").read_bytes())
        data[-50] ^= 1
        (two / "delta_model.safetensors").write_bytes(bytes(data))
        self.refuses(serving, two, "DeltaFormatError.*CRC-32 differs")

    def test_other_base(self, serving: EngineProcess, folder: Path, tmp_path: Path) -> None:
        pair = Pair(tmp_path / "base", folder / "two-dense")
        shutil.copytree(folder / "base", pair.base)
        edit_tensors(pair.base, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5))
        self.refuses(serving, delta_of(pair, tmp_path / "delta"), "WrongBaseError.*model.layers.1.mlp.up_proj.weight")

    def test_other_architecture(self, serving: EngineProcess, tmp_path: Path) -> None:
        model = make_model(tiny_config("qwen3", **HEADS), dtype=torch.float32)
        pair = Pair(save_model(model, tmp_path / "base"), save_model(fine_tune(model), tmp_path / "finetuned"))
        self.refuses(serving, delta_of(pair, tmp_path / "delta"), "WrongBaseError.*has other tensors")

    def test_other_model_on_the_same_weights(self, serving: EngineProcess, two: Path, folder: Path) -> None:
        fields = tiny_config("llama", **HEADS).to_dict() | {"rms_norm_eps": 0.25}
        edit_json(two / "config.json", text_config=fields)
        self.refuses(serving, two, r"DeltaRefusedError.*rms_norm_eps \(0.25 instead of 1e-06\).*engine of its own")

    def test_added_tokens(self, serving: EngineProcess, folder: Path, tmp_path: Path) -> None:
        tuned = fine_tune(make_model(tiny_config("llama", **HEADS), dtype=torch.float32))
        tuned.resize_token_embeddings(VOCABULARY + 5)
        pair = Pair(folder / "base", save_model(tuned, tmp_path / "finetuned"))
        message = f"DeltaRefusedError.*vocab_size .{VOCABULARY + 5} instead of {VOCABULARY}"
        self.refuses(serving, delta_of(pair, tmp_path / "delta"), message)

    @pytest.mark.parametrize("name", [UP, "model.layers.1.self_attn.k_proj.weight"])
    def test_found_out_while_loading(self, serving: EngineProcess, two: Path, name: str) -> None:
        """Every checksum holds: only decoding tells, when half of the weights have been replaced."""
        forge_record(two, lambda data: data[:-1], name)
        self.refuses(serving, two, f"SwapError.*the old weights are back: DeltaFormatError: {name}")

    def test_requests_are_running(self, serving: EngineProcess, folder: Path) -> None:
        self_message = "SwapError: requests are still running"
        with pytest.raises(EngineError, match=self_message):
            serving.run(load_among_requests, folder / "two")

    def test_after_all_that_it_swaps(
        self, serving: EngineProcess, folder: Path, expected: dict[str, list[list[int]]]
    ) -> None:
        serving.run(load, folder / "three")
        assert says(serving, expected["three"])
        serving.run(load, folder / "one")


def load_among_requests(holder: Any, repo: Path) -> None:
    holder.llm.enqueue([{"prompt_token_ids": PROMPTS[0]}], use_tqdm=False)
    try:
        load(holder, repo)
    finally:
        holder.llm.wait_for_completion(use_tqdm=False)


def test_weights_that_cannot_come_back(
    engine: EngineProcess, folder: Path, expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """The old delta is gone when the new one fails: an error of its own, and a way out of it."""
    one = Path(shutil.copytree(folder / "one", tmp_path / "one"))
    broken = Path(shutil.copytree(folder / "two", tmp_path / "two"))
    forge_record(broken, lambda data: data[:-1])
    engine.run(load, one)
    shutil.rmtree(one)
    with pytest.raises(EngineError, match="EngineUnsoundError.*put their files back"):
        engine.run(load, broken)
    engine.run(load, folder / "three")
    assert says(engine, expected["three"])


@pytest.mark.parametrize("option", [{"enable_lora": True}, {"data_parallel_size": 2}], ids=lambda o: next(iter(o)))
def test_engines_that_cannot_swap(process: EngineProcess, folder: Path, option: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="DeltaRefusedError"):
        process.run(make_switch, folder / "base", option)


def make_switch(holder: Any, model: Path, options: dict[str, Any]) -> None:
    """Of an engine that is not started: its configuration is all that is looked at."""
    from types import SimpleNamespace

    from vllm import EngineArgs

    from impart_hf.serving import DeltaSwitch

    config = EngineArgs(str(model), dtype="float32", max_model_len=128, **options).create_engine_config()
    DeltaSwitch(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config)))  # type: ignore[arg-type]
