"""`vllm serve --enable-lora` with deltas as adapters: requests for several in one batch, each made on the fly."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from peft import PeftModel
from support.forged_files import forge, of_another_base
from support.vllm_engines import PROMPTS, greedy_tokens
from support.vllm_server import Server, ask
from transformers import AutoModelForCausalLM

from impart_hf.lora.export import export_lora
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository

pytestmark = pytest.mark.vllm
NAMES = ("base", "one", "two", "three")
RANK, REQUESTS = 64, 60
Expected = dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def expected(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What PEFT gives with the adapters that `export-lora` makes."""
    folder = tmp_path_factory.mktemp("adapters")
    tokens = {"base": greedy_tokens(AutoModelForCausalLM.from_pretrained(family / "base"))}
    for name in NAMES[1:]:
        export_lora(open_repository(str(family / name), HubOptions()), folder / name, RANK)
        base = AutoModelForCausalLM.from_pretrained(family / "base")
        tokens[name] = greedy_tokens(PeftModel.from_pretrained(base, folder / name))
    assert len({str(found) for found in tokens.values()}) == len(NAMES)
    return tokens


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def server(family: Path, tenants: Path, kept: Path) -> Iterator[Server]:
    env = {
        "VLLM_PLUGINS": "impart_hf",
        "IMPART_HF_DELTAS": f"{tenants},named={family / 'one'}",
        "IMPART_HF_ALLOW": f"{family}/t*,nobody/*",
        "IMPART_HF_ADAPTERS": str(kept),
    }
    lora = ("--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "3")
    with Server(family / "base", "--served-model-name", "family", *lora, env=env) as server:
        yield server


def tokens(server: Server, model: str, number: int = 0) -> list[int]:
    status, answer = ask(server, model, PROMPTS[number])
    assert status == 200, answer
    assert answer["model"] == model
    return answer["choices"][0]["token_ids"]


def test_listed_before_they_are_loaded(server: Server) -> None:
    listed = server.request("/v1/models")[1]["data"]
    assert {model["id"]: model["parent"] for model in listed} == {
        "family": None, "named": "family", "one": "family", "three": "family", "two": "family"
    }  # fmt: skip
    assert {delta["id"] for delta in server.request("/v1/deltas")[1]["data"]} == {*NAMES, "named"}


def test_mixed_requests_at_once(server: Server, expected: Expected) -> None:
    choose = random.Random(0)
    jobs = [(choose.choice(NAMES), choose.randrange(len(PROMPTS))) for _ in range(REQUESTS)]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda job: tokens(server, *job), jobs))
    assert found == [expected[name][number] for name, number in jobs]
    listed = server.request("/v1/models")[1]["data"]
    assert len(listed) == len({model["id"] for model in listed}) == 5
    assert all(delta["loaded"] for delta in server.request("/v1/deltas")[1]["data"] if delta["id"] in NAMES)


def test_by_folder(server: Server, family: Path, tenants: Path, kept: Path, expected: Expected) -> None:
    """Those of the catalogue, and those that a pattern permits; an adapter of the same files is made once."""
    before = set(kept.iterdir())
    assert tokens(server, str(tenants / "two")) == expected["two"][0]
    assert tokens(server, str(family / "two")) == expected["two"][0]
    assert tokens(server, "named") == expected["one"][0]
    assert set(kept.iterdir()) == before
    for model in (str(family / "base"), str(tenants / ".." / tenants.name / "none"), "nobody", "else/one", "../one"):
        status, answer = ask(server, model, PROMPTS[0])
        assert status == 404 and "one" in answer["error"]["deltas"], model


def test_chat_and_own_model(server: Server, expected: Expected) -> None:
    body = {"messages": [{"role": "user", "content": "The difference"}], "max_tokens": 4, "temperature": 0}
    status, answer = server.request("/v1/chat/completions", body | {"model": "two"})
    assert status == 200 and answer["model"] == "two"
    assert tokens(server, "family") == expected["base"][0]


def test_hub_id_that_is_permitted_but_missing(server: Server) -> None:
    status, answer = ask(server, "nobody/delta", PROMPTS[0])
    assert status == 422 and "nobody/delta" in answer["error"]["message"]


def test_replaced_and_removed(server: Server, tenants: Path, expected: Expected) -> None:
    place = tenants / "guest"
    shutil.copytree(tenants / "one", place)
    assert tokens(server, "guest") == expected["one"][0]
    new = Path(shutil.copytree(tenants / "two", tenants / ".guest"))
    shutil.rmtree(place)
    new.rename(place)
    assert tokens(server, "guest") == expected["two"][0]
    shutil.rmtree(place)
    assert ask(server, "guest", PROMPTS[0])[0] == 404
    assert "guest" not in [model["id"] for model in server.request("/v1/models")[1]["data"]]


def test_delta_of_another_base(server: Server, tenants: Path, kept: Path, expected: Expected) -> None:
    other = Path(shutil.copytree(tenants / "one", tenants / "other"))
    before = set(kept.iterdir())
    try:
        forge(other, of_another_base)
        status, answer = ask(server, "other", PROMPTS[0])
        assert status == 422 and "base" in answer["error"]["message"]
        edited = json.loads((other / "config.json").read_text())
        edited["text_config"]["rope_parameters"]["rope_theta"] = 5e5
        (other / "config.json").write_text(json.dumps(edited))
        status, answer = ask(server, "other", PROMPTS[0])
        assert status == 422 and "rope" in answer["error"]["message"]
    finally:
        shutil.rmtree(other)
    assert set(kept.iterdir()) == before
    assert tokens(server, "one") == expected["one"][0]


def test_swaps_are_refused(server: Server) -> None:
    status, answer = server.load("one")
    assert status == 501 and "model" in answer["error"]["message"]
