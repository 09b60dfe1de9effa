"""Swapping the delta of a running engine: the tokens after a swap are those of an engine started on that delta."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forged_files import UP, forge_record
from support.messages import naming
from support.tiny_models import (
    VOCABULARY,
    Pair,
    edit_json,
    edit_tensors,
    fine_tune,
    make_model,
    rewrite,
    save_model,
    save_pair,
    tiny_config,
)
from support.vllm_engines import (
    HEADS,
    LONG,
    PROMPTS,
    EngineError,
    EngineProcess,
    delta_of,
    generate_by_delta,
    swap_to,
    tokens_of,
)

from impart_hf import PrunedLlamaConfig

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def process() -> Iterator[EngineProcess]:
    with EngineProcess() as process:
        yield process


@pytest.fixture
def engine(process: EngineProcess, family: Path) -> EngineProcess:
    process.start(family / "base")
    return process


def says(engine: EngineProcess, tokens: list[list[int]]) -> bool:
    return engine.tokens([*PROMPTS, LONG]) == tokens


def test_a_delta_for_each_prompt(
    engine: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]]
) -> None:
    names = ["two", "base", "one", "two", "base", "one"]
    numbers = [0, 0, 1, 2, 1, 0]
    deltas = [None if name == "base" else str(family / name) for name in names]
    found = engine.run(generate_by_delta, [PROMPTS[number] for number in numbers], deltas)
    assert found == [family_tokens[name][number] for name, number in zip(names, numbers, strict=True)]
    with pytest.raises(EngineError, match=naming("prompts")):
        engine.run(generate_by_delta, PROMPTS, deltas[:2])


@pytest.mark.parametrize("start", ["base", "one"])
def test_fifty_random_swaps(
    process: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]], start: str
) -> None:
    process.start(family / start)
    assert says(process, family_tokens[start])
    draw = random.Random(start)
    names = [draw.choice(list(family_tokens)) for _ in range(50)]
    for number, name in enumerate(names):
        process.run(swap_to, None if name == "base" else family / name)
        if number % 5 == 0:
            assert says(process, family_tokens[name]), (number, name)
    process.run(swap_to, family / "two")
    assert says(process, family_tokens["two"])


def test_tied_embeddings(process: EngineProcess, tmp_path: Path) -> None:
    """The output projection is the input embedding, whose weights a delta changes: both must follow a swap."""
    pair = save_pair(tmp_path, tiny_config("llama-tied", **HEADS), dtype=torch.float32)
    delta = delta_of(pair, tmp_path / "delta")
    expected = {folder: tokens_of(folder, [*PROMPTS, LONG]) for folder in (pair.base, delta)}
    assert expected[pair.base] != expected[delta]
    process.start(pair.base)
    for repo in (delta, None, delta):
        process.run(swap_to, repo)
        assert says(process, expected[pair.base if repo is None else repo]), repo


def test_prefix_cache_does_not_outlive_its_delta(
    engine: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]]
) -> None:
    assert engine.tokens([LONG]) == family_tokens["base"][-1:]
    engine.run(swap_to, family / "one")
    assert engine.tokens([LONG]) == family_tokens["one"][-1:]
    engine.run(swap_to, None)
    assert engine.tokens([LONG]) == family_tokens["base"][-1:]


def test_compiled_engine(process: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]]) -> None:
    process.start(family / "one", enforce_eager=False)
    for name in ("two", "base", "one"):
        process.run(swap_to, None if name == "base" else family / name)
        assert says(process, family_tokens[name])


def test_decoded_beforehand(
    family: Path, family_tokens: dict[str, list[list[int]]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(family / "three", tmp_path / "broken"))
    forge_record(broken, lambda data: data[:-1])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with EngineProcess(IMPART_HF_SCRATCH=str(scratch)) as process:
        process.start(family / "base")
        for name in ("one", "two", "base", "one"):
            process.run(swap_to, None if name == "base" else family / name)
            assert says(process, family_tokens[name])
            assert [[p.name for p in folder.iterdir()] for folder in scratch.iterdir()] == [["lock"]]
        # What only decoding tells is found out before the engine is touched.
        with pytest.raises(EngineError, match="^DeltaFormatError"):
            process.run(swap_to, broken)
        assert says(process, family_tokens["one"])
    assert not list(scratch.iterdir())
    with EngineProcess(IMPART_HF_SCRATCH=str(tmp_path / "nowhere")) as process:
        process.start(family / "base")
        with pytest.raises(EngineError, match=naming("IMPART_HF_SCRATCH", tmp_path / "nowhere")):
            process.run(swap_to, family / "one")


def test_no_room_to_decode_beforehand(
    family: Path, family_tokens: dict[str, list[list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the engine decodes itself. What a server that was killed left there is removed, what is in use is not."""
    left, used = tmp_path / "impart-hf-left", tmp_path / "impart-hf-used"
    for folder in (left, used):
        folder.mkdir()
        (folder / "copy").mkdir()
        (folder / "lock").touch()
    with (used / "lock").open() as lock, EngineProcess(IMPART_HF_SCRATCH=str(tmp_path)) as process:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process.start(family / "base")
        process.run(load_without_room, family / "one")
        assert says(process, family_tokens["one"])
        assert not left.exists() and used.exists()


def load_without_room(holder: Any, repo: Path) -> None:
    from unittest.mock import patch

    with patch("impart_hf.serving.scratch.reconstruct", side_effect=OSError(28, "No space left on device")):
        swap_to(holder, repo)


def test_notes_say_what_stays(engine: EngineProcess, family: Path, tmp_path: Path) -> None:
    other = shutil.copytree(family / "one", tmp_path / "one")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    edit_json(other / "tokenizer_config.json", chat_template="{{ messages }}", padding_side="left")
    edit_json(other / "generation_config.json", temperature=0.5)
    assert engine.run(swap_to, family / "one")[2] == ()
    notes = engine.run(swap_to, other)[2]
    assert [note.split()[0] for note in notes] == [
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ]


@pytest.fixture(scope="class")
def serving(process: EngineProcess, family: Path) -> EngineProcess:
    """An engine that serves delta `one`."""
    process.start(family / "base")
    process.run(swap_to, family / "one")
    return process


def test_differences_that_do_not_matter(
    engine: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(family / "one", tmp_path / "one"))
    fields = json.loads((other / "config.json").read_text())["text_config"]
    changes = {"attention_dropout": 0.1, "eos_token_id": 7, "trained_by": "me", "dtype": "bfloat16"}
    edit_json(other / "config.json", text_config={**fields, **changes})
    engine.run(swap_to, other)
    assert says(engine, family_tokens["one"])


def test_deltas_of_a_pruned_model(process: EngineProcess, tmp_path: Path) -> None:
    llama = tiny_config("llama", num_attention_heads=8, num_key_value_heads=4, **HEADS)
    widths = {"num_attention_heads": [4, 6], "num_key_value_heads": [4, 1], "intermediate_size": [72, 33]}
    base = make_model(PrunedLlamaConfig.with_widths(llama, **widths), dtype=torch.float32)
    save_model(base, tmp_path / "base")
    for seed, name in ((1, "one"), (2, "two")):
        tuned = save_model(fine_tune(base, seed), tmp_path / f"{name}-dense")
        delta_of(Pair(tmp_path / "base", tuned), tmp_path / name)
    process.start(tmp_path / "one")
    for name in ("two", "base", "one"):
        process.run(swap_to, None if name == "base" else tmp_path / name)
        assert process.tokens() == tokens_of(tmp_path / name)


class TestRefused:
    """What cannot be loaded changes nothing: the engine says what it said before, and swaps on."""

    @pytest.fixture(autouse=True)
    def unchanged(self, serving: EngineProcess, family_tokens: dict[str, list[list[int]]]) -> Iterator[None]:
        yield
        assert says(serving, family_tokens["one"])

    def refuses(self, engine: EngineProcess, repo: Path, *names: object) -> None:
        with pytest.raises(EngineError, match=naming(names)):
            engine.run(swap_to, repo)

    @pytest.fixture
    def two(self, family: Path, tmp_path: Path) -> Path:
        """A copy of a delta to spoil."""
        return Path(shutil.copytree(family / "two", tmp_path / "two"))

    def test_not_there(self, serving: EngineProcess, tmp_path: Path) -> None:
        self.refuses(serving, tmp_path / "nothing", "CheckpointError", tmp_path / "nothing")

    def test_dense(self, serving: EngineProcess, family: Path) -> None:
        self.refuses(serving, family / "two-dense", "CheckpointError", "'llama'", family / "two-dense")

    def test_truncated(self, serving: EngineProcess, two: Path) -> None:
        file = two / "delta_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        self.refuses(serving, two, "DeltaFormatError", "delta_model.safetensors")

    def test_flipped_byte(self, serving: EngineProcess, two: Path) -> None:
        data = bytearray((two / "delta_model.safetensors").read_bytes())
        data[-50] ^= 1
        (two / "delta_model.safetensors").write_bytes(bytes(data))
        self.refuses(serving, two, "DeltaFormatError", "CRC-32")

    def test_other_base(self, serving: EngineProcess, family: Path, tmp_path: Path) -> None:
        pair = Pair(tmp_path / "base", family / "two-dense")
        shutil.copytree(family / "base", pair.base)
        edit_tensors(pair.base, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5))
        self.refuses(serving, delta_of(pair, tmp_path / "delta"), "WrongBaseError", "model.layers.1.mlp.up_proj.weight")

    def test_other_architecture(self, serving: EngineProcess, tmp_path: Path) -> None:
        model = make_model(tiny_config("qwen3", **HEADS), dtype=torch.float32)
        pair = Pair(save_model(model, tmp_path / "base"), save_model(fine_tune(model), tmp_path / "finetuned"))
        self.refuses(serving, delta_of(pair, tmp_path / "delta"), "WrongBaseError", "tensors")

    def test_other_model_on_the_same_weights(self, serving: EngineProcess, two: Path, family: Path) -> None:
        fields = tiny_config("llama", **HEADS).to_dict() | {"rms_norm_eps": 0.25}
        edit_json(two / "config.json", text_config=fields)
        self.refuses(serving, two, "DeltaRefusedError", "rms_norm_eps", 0.25, 1e-06)

    def test_added_tokens(self, serving: EngineProcess, family: Path, tmp_path: Path) -> None:
        tuned = fine_tune(make_model(tiny_config("llama", **HEADS), dtype=torch.float32))
        tuned.resize_token_embeddings(VOCABULARY + 5)
        pair = Pair(family / "base", save_model(tuned, tmp_path / "finetuned"))
        names = ("DeltaRefusedError", "vocab_size", VOCABULARY + 5, VOCABULARY)
        self.refuses(serving, delta_of(pair, tmp_path / "delta"), *names)

    @pytest.mark.parametrize("name", [UP, "model.layers.1.self_attn.k_proj.weight"])
    def test_found_out_while_loading(self, serving: EngineProcess, two: Path, name: str) -> None:
        """Every checksum holds: only decoding tells, when half of the weights have been replaced."""
        forge_record(two, lambda data: data[:-1], name)
        self.refuses(serving, two, "SwapError", "DeltaFormatError", name)

    def test_requests_are_running(self, serving: EngineProcess, family: Path) -> None:
        with pytest.raises(EngineError, match=naming("SwapError", "requests")):
            serving.run(load_among_requests, family / "two")

    def test_after_all_that_it_swaps(
        self, serving: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]]
    ) -> None:
        serving.run(swap_to, family / "three")
        assert says(serving, family_tokens["three"])
        serving.run(swap_to, family / "one")


def load_among_requests(holder: Any, repo: Path) -> None:
    holder.llm.enqueue([{"prompt_token_ids": PROMPTS[0]}], use_tqdm=False)
    try:
        swap_to(holder, repo)
    finally:
        holder.llm.wait_for_completion(use_tqdm=False)


def test_weights_that_cannot_come_back(
    engine: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """The old delta is gone when the new one fails: an error of its own, and a way out of it."""
    one = Path(shutil.copytree(family / "one", tmp_path / "one"))
    broken = Path(shutil.copytree(family / "two", tmp_path / "two"))
    forge_record(broken, lambda data: data[:-1])
    engine.run(swap_to, one)
    shutil.rmtree(one)
    with pytest.raises(EngineError, match=naming("EngineUnsoundError", one)):
        engine.run(swap_to, broken)
    engine.run(swap_to, family / "three")
    assert says(engine, family_tokens["three"])


@pytest.mark.parametrize("option", [{"enable_lora": True}, {"data_parallel_size": 2}], ids=lambda o: next(iter(o)))
def test_engines_that_cannot_swap(process: EngineProcess, family: Path, option: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="DeltaRefusedError"):
        process.run(make_switch, family / "base", option)


def test_experts_cannot_be_swapped(process: EngineProcess, tmp_path: Path) -> None:
    save_model(make_model(tiny_config("mixtral", **HEADS)), tmp_path / "base")
    with pytest.raises(EngineError, match=naming("DeltaRefusedError", "experts")):
        process.run(make_switch, tmp_path / "base", {})


class TestBaseItself:
    """What has become of the base's files is seen before its own weights are loaded again."""

    @pytest.fixture
    def base(self, process: EngineProcess, family: Path, tmp_path: Path) -> Path:
        """A base to spoil, whose engine serves delta `one`."""
        base = Path(shutil.copytree(family / "base", tmp_path / "base"))
        process.start(base)
        process.run(swap_to, family / "one")
        return base

    @pytest.fixture(autouse=True)
    def unchanged(
        self, base: Path, process: EngineProcess, family_tokens: dict[str, list[list[int]]]
    ) -> Iterator[None]:
        yield
        with pytest.raises(EngineError, match=naming(self.names)):
            process.run(swap_to, None)
        assert says(process, family_tokens["one"])

    def test_edited(self, base: Path) -> None:
        self.names = ("WrongBaseError", base, "model.layers.1.mlp.up_proj.weight")
        edit_tensors(base, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5))

    def test_lost_tensor(self, base: Path) -> None:
        self.names = ("DeltaFormatError", "1 tensors", "model.layers.1.mlp.up_proj.weight")
        edit_tensors(base, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))

    def test_truncated(self, base: Path) -> None:
        self.names = ("CheckpointError",)
        rewrite(base / "model.safetensors", (base / "model.safetensors").read_bytes()[:-1])

    def test_gone(self, base: Path) -> None:
        self.names = ("CheckpointError",)
        shutil.rmtree(base)


def test_two_threads(engine: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]]) -> None:
    assert engine.run(load_from_threads, family) == 5
    assert says(engine, family_tokens["one"])


def load_from_threads(holder: Any, family: Path) -> int:
    """How many of six swaps at once were refused; the one that is not is slow."""
    import threading
    from concurrent.futures import ThreadPoolExecutor
    from unittest.mock import patch

    from impart_hf.serving import DeltaSwitch
    from impart_hf.serving.deltas import DeltaChecker
    from impart_hf.serving.swap import SwapInProgressError

    holder.deltas = DeltaSwitch(holder.llm)
    check, others_are_done = DeltaChecker.check, threading.Event()

    def slow_check(*arguments: Any) -> Any:
        assert others_are_done.wait(60)
        return check(*arguments)

    def refused(_: int) -> bool:
        try:
            holder.deltas.load(str(family / "one"))
        except SwapInProgressError:
            return True
        return False

    with patch.object(DeltaChecker, "check", slow_check), ThreadPoolExecutor(6) as pool:
        swaps = [pool.submit(refused, number) for number in range(6)]
        while sum(swap.done() for swap in swaps) < 5:
            pass
        others_are_done.set()
        return sum(swap.result() for swap in swaps)


def make_switch(holder: Any, model: Path, options: dict[str, Any]) -> None:
    """Of an engine that is not started: its configuration is all that is looked at."""
    from types import SimpleNamespace

    from vllm import EngineArgs

    from impart_hf.serving import DeltaSwitch

    config = EngineArgs(str(model), dtype="float32", max_model_len=128, **options).create_engine_config()
    DeltaSwitch(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config)))  # type: ignore[arg-type]
