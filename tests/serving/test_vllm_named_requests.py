"""`vllm serve` with deltas as models: a request's `model` chooses its weights."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import shutil
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.forged_files import forge, of_another_base
from support.load_script import load_script
from support.tiny_models import Pair, fine_tune, save_model
from support.vllm_engines import LONG, PROMPTS, delta_of
from support.vllm_server import Server, ask
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.vllm
Expected = dict[str, list[list[int]]]
NAMES = ("base", "one", "two", "three")
REQUESTS = 120


@pytest.fixture(scope="module")
def server(family: Path, tenants: Path) -> Iterator[Server]:
    env = {"VLLM_PLUGINS": "impart_hf", "IMPART_HF_DELTAS": str(tenants), "IMPART_HF_MAX_WAIT": "2"}
    with Server(family / "base", "--served-model-name", "family", env=env | {"IMPART_HF_MIN_RESIDENCE": "0"}) as server:
        yield server


def test_listed_with_their_parent(server: Server) -> None:
    status, listed = server.request("/v1/models")
    assert status == 200
    assert [(model["id"], model["parent"]) for model in listed["data"]] == [
        ("family", None), ("one", "family"), ("three", "family"), ("two", "family"),
    ]  # fmt: skip


def test_each_request_has_its_own_delta(server: Server, family_tokens: Expected) -> None:
    for name in ("one", "base", "two", "two", "three", "one"):
        status, answer = ask(server, name, PROMPTS[0])
        assert status == 200 and answer["model"] == name
        assert answer["choices"][0]["token_ids"] == family_tokens[name][0]
    status, answer = ask(server, "family", PROMPTS[0])
    assert answer["model"] == "family" and answer["choices"][0]["token_ids"] == family_tokens["base"][0]


def test_chat_stream_and_tokens(server: Server, family: Path) -> None:
    """Other routes, and an answer in parts, name the delta as well."""
    messages = [{"role": "user", "content": "The difference"}]
    body = {"model": "two", "messages": messages, "max_tokens": 4, "temperature": 0}
    status, answer = server.request("/v1/chat/completions", body)
    assert status == 200 and answer["model"] == "two"
    whole = answer["choices"][0]["message"]["content"]
    place = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": True}), headers)
    lines = connection.getresponse().read().decode().splitlines()
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert {part["model"] for part in parts} == {"two"}
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"]) == whole
    assert server.request("/tokenize", {"model": "three", "prompt": "The"})[0] == 200


def test_unknown_model(server: Server) -> None:
    status, answer = ask(server, "four", PROMPTS[0])
    assert status == 404 and answer["error"]["deltas"] == ["family", "base", "one", "three", "two"]
    assert "'four'" in answer["error"]["message"] and answer["error"]["type"] == "NotFoundError"


def test_a_delta_that_cannot_be_loaded_fails_alone(
    server: Server, family: Path, tenants: Path, family_tokens: Expected
) -> None:
    """One of another base, and one that is removed while requests wait for it."""
    other = Path(shutil.copytree(tenants / "one", tenants / "other"))
    forge(other, of_another_base)
    removed = Path(shutil.copytree(tenants / "one", tenants / "removed"))
    results: dict[str, tuple[int, Any]] = {}

    def slow(_: int) -> None:
        ask(server, "two", LONG[:20], max_tokens=100)

    try:
        with ThreadPoolExecutor(8) as pool:
            busy = [pool.submit(slow, i) for i in range(3)]
            time.sleep(0.2)
            asked = {name: pool.submit(ask, server, name, PROMPTS[1]) for name in ("removed", "other", "three")}
            time.sleep(0.1)
            shutil.rmtree(removed)
            results = {name: future.result() for name, future in asked.items()}
            [future.result() for future in busy]
    finally:
        shutil.rmtree(other)
    assert results["three"][1]["choices"][0]["token_ids"] == family_tokens["three"][1]
    assert results["other"][0] == 422
    assert results["removed"][0] in (200, 404)  # 200 if it was its turn before it went
    assert ask(server, "one", PROMPTS[1])[1]["choices"][0]["token_ids"] == family_tokens["one"][1]


def test_many_at_once(server: Server, family_tokens: Expected) -> None:
    """None is lost or mixed, whoever comes first; and nobody waits for long although one delta is always asked for."""
    choose = random.Random(0)
    jobs = [(choose.choice(NAMES), choose.randrange(len(PROMPTS))) for _ in range(REQUESTS)]

    def one(job: tuple[str, int]) -> bool:
        name, number = job
        status, answer = ask(server, name, PROMPTS[number])
        return status == 200 and answer["choices"][0]["token_ids"] == family_tokens[name][number]

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, jobs))
    done = threading.Event()

    def always() -> None:
        while not done.is_set():
            ask(server, "one", PROMPTS[2])

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(always)
        time.sleep(0.3)
        started = time.monotonic()
        assert ask(server, "three", PROMPTS[0])[1]["choices"][0]["token_ids"] == family_tokens["three"][0]
        assert time.monotonic() - started < 30
        done.set()


def test_many_clients_of_five_deltas(server: Server, family: Path, tenants: Path, tmp_path: Path) -> None:
    """What `benchmark_tenants.py --check` does for minutes: completions and chats, streamed or not; some leave."""
    load, models = load_script("tenant_load"), load_script("tenant_models")
    base = AutoModelForCausalLM.from_pretrained(family / "base")
    more = {name: tmp_path / name for name in ("four", "five")}
    for seed, name in enumerate(more, 4):
        dense = save_model(fine_tune(base, seed), tmp_path / f"{name}-dense")
        delta_of(Pair(family / "base", dense), tmp_path / name)
    repositories = {name: tenants / name for name in NAMES[1:]} | more
    served = models.Models(
        family / "base", [models.Tenant(name, repo) for name, repo in repositories.items()], "built-in"
    )
    candidates = models.prompts_of(served, 64, 12, seed=0)
    prompts, expected = models.expected_answers(served, candidates, 8, True, enough=6)
    verdict = load.Verdict(expected)

    async def run() -> None:
        targets = [load.Target(server.url, name) for name in repositories]
        questions = load.mixture(len(repositories), len(prompts), True, seed=0, leaving=0.05)
        async with load.Client(targets, prompts, 8, timeout=120, ids=True) as client:
            await load.closed_loop(client, questions, 150, 6.0, verdict.add)

    try:
        for name, repo in more.items():
            repo.rename(tenants / name)
        asyncio.run(run())
    finally:
        for name in more:
            shutil.rmtree(tenants / name, ignore_errors=True)
    assert not verdict.told and verdict.wrong == verdict.lost == 0
    assert verdict.requests >= 150 and verdict.longest < 60
    assert all(f'requests_total{{delta="{name}"}}' in metrics_of(server) for name in repositories)


def test_a_client_loads_another_default(server: Server, family_tokens: Expected) -> None:
    assert server.load("two")[0] == 200
    assert ask(server, "family", PROMPTS[0])[1]["choices"][0]["token_ids"] == family_tokens["two"][0]
    assert ask(server, "one", PROMPTS[0])[1]["choices"][0]["token_ids"] == family_tokens["one"][0]
    assert ask(server, "family", PROMPTS[0])[1]["choices"][0]["token_ids"] == family_tokens["two"][0]
    assert server.load("base")[0] == 200


def metrics_of(server: Server) -> str:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


def test_metrics(server: Server) -> None:
    text = metrics_of(server)
    for line in (
        'impart_hf:swaps_total{delta="one"}',
        'impart_hf:requests_total{delta="three"}',
        "impart_hf:swap_seconds_count",
    ):
        assert any(found.startswith(line) for found in text.splitlines()), line
