"""`vllm serve` with our routes: swaps over HTTP, among requests, and when things go wrong."""

from __future__ import annotations

import hashlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.forged_files import forge_record
from support.tiny_models import edit_json
from support.vllm_engines import LONG, PROMPTS
from support.vllm_server import Server

pytestmark = pytest.mark.vllm
KEY = "secret"
Expected = dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def tenants(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of deltas, as a server is given one."""
    tenants = tmp_path_factory.mktemp("tenants")
    for name in ("one", "two"):
        shutil.copytree(family / name, tenants / name)
    shutil.copytree(family / "two-dense", tenants / "dense")  # not offered: it is no delta
    return tenants


@pytest.fixture(scope="module")
def server(family: Path, tenants: Path) -> Iterator[Server]:
    deltas = f"{tenants},third={family / 'three'}"
    env = {"VLLM_PLUGINS": "impart_hf", "IMPART_HF_DELTAS": deltas}
    with Server(family / "base", env=env) as server:
        yield server


def answers(server: Server) -> list[list[int]]:
    return [server.tokens(prompt) for prompt in [*PROMPTS, LONG]]


def test_swaps(server: Server, family_tokens: Expected) -> None:
    for delta, name in (("base", "base"), ("one", "one"), ("third", "three"), ("two", "two"), ("base", "base")):
        status, answer = server.load(delta)
        assert (status, answer["loaded"], answer["notes"]) == (200, delta, []), answer
        assert answers(server) == family_tokens[name]
        status, listed = server.request("/v1/deltas")
        assert status == 200 and listed["loaded"] == delta
        assert [entry["id"] for entry in listed["data"]] == ["base", "third", "one", "two"]
        assert [entry["id"] for entry in listed["data"] if entry["loaded"]] == [delta]


def test_names_that_stand_for_two_are_left_out(server: Server, tenants: Path, family_tokens: Expected) -> None:
    for name in ("base", "third"):
        shutil.copytree(tenants / "one", tenants / name)
    try:
        status, listed = server.request("/v1/deltas")
        assert status == 200 and [entry["id"] for entry in listed["data"]] == ["base", "third", "one", "two"]
        assert server.load("third")[0] == 200
        assert answers(server) == family_tokens["three"]
        assert server.load("base")[0] == 200
        assert answers(server) == family_tokens["base"]
    finally:
        for name in ("base", "third"):
            shutil.rmtree(tenants / name)


@pytest.mark.parametrize(
    ("field", "value"),
    [("format_version", 99), ("text_config", [1]), ("text_config", {"model_type": "unheard-of"}), ("tensor_dtype", 7)],
)
def test_configurations_that_are_none(
    server: Server, tenants: Path, family_tokens: Expected, field: str, value: object
) -> None:
    assert server.load("one")[0] == 200
    bad = Path(shutil.copytree(tenants / "two", tenants / "bad"))
    edit_json(bad / "config.json", **{field: value})
    try:
        status, answer = server.load("bad")
    finally:
        shutil.rmtree(bad)
    assert status == 422 and "config.json" in answer["error"]["message"]
    assert answers(server) == family_tokens["one"]


def test_deltas_come_and_go(server: Server, tenants: Path, family_tokens: Expected) -> None:
    assert server.load("new")[0] == 404
    shutil.copytree(tenants / "one", tenants / "new")
    assert server.load("new")[0] == 200
    assert answers(server) == family_tokens["one"]
    shutil.rmtree(tenants / "new")
    assert server.load("new")[0] == 404
    assert server.load("two")[0] == 200


def test_unknown_delta(server: Server) -> None:
    status, answer = server.load("dense")
    assert status == 404
    assert answer["error"]["deltas"] == ["base", "third", "one", "two"]
    assert "'dense'" in answer["error"]["message"]
    for name in ("\ud800", "x" * 10**6, "../one"):
        status, answer = server.load(name)
        assert status == 404 and len(answer["error"]["message"]) < 400


_BAD_BODIES: list[object] = [b"{", b"[" * 200_000, b"[]", {}, {"delta": 3}, {"delta": None}, {"name": "one"}]


@pytest.mark.parametrize("body", [*_BAD_BODIES, {"delta": "one", "more": 1}], ids=lambda body: str(body)[:30])
def test_bad_bodies(server: Server, body: object) -> None:
    status, answer = server.request("/v1/deltas/load", body)
    assert status == 400
    assert '{"delta": NAME}' in answer["error"]["message"]


def test_delta_that_is_refused(server: Server, tenants: Path, family_tokens: Expected) -> None:
    assert server.load("one")[0] == 200
    bad = Path(shutil.copytree(tenants / "two", tenants / "bad"))
    file = bad / "delta_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    try:
        status, answer = server.load("bad")
    finally:
        shutil.rmtree(bad)
    assert status == 422 and "delta_model.safetensors" in answer["error"]["message"]
    assert server.request("/v1/deltas")[1]["loaded"] == "one"
    assert answers(server) == family_tokens["one"]


def test_weights_that_cannot_come_back(
    server: Server, tenants: Path, family_tokens: Expected, request: pytest.FixtureRequest
) -> None:
    """The old delta is gone when the new one fails: requests wait until there are weights again."""
    for name in ("gone", "broken"):
        copy = Path(shutil.copytree(tenants / "one", tenants / name))
        request.addfinalizer(lambda copy=copy: shutil.rmtree(copy, ignore_errors=True))
    forge_record(tenants / "broken", lambda data: data[:-1])
    assert server.load("gone")[0] == 200
    shutil.rmtree(tenants / "gone")
    status, answer = server.load("broken")
    assert status == 500 and str(tenants / "gone") in answer["error"]["message"]
    assert server.request("/v1/deltas")[1]["loaded"] is None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.tokens, PROMPTS[0])
        time.sleep(1)
        assert not waiting.done()
        assert server.load("two")[0] == 200
        assert waiting.result() == family_tokens["two"][0]
    assert answers(server) == family_tokens["two"]


def test_requests_among_swaps_are_neither_lost_nor_mixed(server: Server, family_tokens: Expected) -> None:
    """Long requests run on while deltas change: each answer is one delta's from its first token to its last."""
    count = 60
    server.load("one")
    whole = {"one": server.tokens(PROMPTS[1], count)}
    server.load("two")
    whole["two"] = server.tokens(PROMPTS[1], count)
    assert whole["one"] != whole["two"]
    stop = threading.Event()

    def ask() -> list[list[int]]:
        found = []
        while not stop.is_set():
            found.append(server.tokens(PROMPTS[1], count))
        return found

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(ask) for _ in range(6)]
        statuses = [server.load(("one", "two")[number % 2])[0] for number in range(20)]
        stop.set()
        found = [tokens for client in clients for tokens in client.result()]
    assert statuses == [200] * 20
    assert {tuple(tokens) for tokens in found} == {tuple(tokens) for tokens in whole.values()}


def test_one_request_is_one_delta_s_whatever_it_is_made_of(family: Path) -> None:
    """With a KV cache for less than what runs, requests are preempted; some wait for their turn; a beam search asks
    the engine anew at every step."""
    prompts = [[7 + number, 100, 3, 50] for number in range(8)]
    small = "--max-num-seqs 4 --num-gpu-blocks-override 7 --block-size 32 --no-enable-prefix-caching".split()
    env = {"VLLM_PLUGINS": "impart_hf", "IMPART_HF_DELTAS": str(family)}
    with Server(family / "base", *small, env=env) as server, ThreadPoolExecutor(9) as pool:
        asks = {
            "alone": lambda: [tokens for tokens in pool.map(lambda p: server.tokens(p, 100), prompts)],
            "together": lambda: server.all_tokens(prompts, 100),
            "beams": lambda: server.all_tokens(prompts[:1], 60, use_beam_search=True, n=2),
        }
        whole: dict[str, dict[str, list[list[int]]]] = {}
        for delta in ("one", "two"):
            assert server.load(delta)[0] == 200
            whole[delta] = {kind: ask() for kind, ask in asks.items()}
            assert whole[delta]["alone"] == whole[delta]["together"]
        assert all(whole["one"][kind] != whole["two"][kind] for kind in asks)
        for delta, other in (("one", "two"), ("two", "one"), ("one", "two")):
            for kind in ("together", "beams"):
                assert server.load(delta)[0] == 200
                asked = pool.submit(asks[kind])
                time.sleep(0.15)
                assert server.load(other)[0] == 200
                assert asked.result() in (whole["one"][kind], whole["two"][kind]), kind
            singles = [pool.submit(server.tokens, prompt, 100) for prompt in prompts]
            time.sleep(0.15)
            assert server.load(delta)[0] == 200
            for number, single in enumerate(singles):
                assert single.result() in (whole["one"]["alone"][number], whole["two"]["alone"][number])


def test_two_swaps_at_once(server: Server, family_tokens: Expected) -> None:
    """While one waits for a long request to end, another is refused; what is asked meanwhile waits for the swap."""
    assert server.load("one")[0] == 200
    with ThreadPoolExecutor(8) as pool:
        running = pool.submit(server.tokens, PROMPTS[1], 120)
        time.sleep(0.1)
        loads = [pool.submit(server.load, "two") for _ in range(6)]
        statuses = sorted(load.result()[0] for load in loads)
        assert statuses[0] == 200 and set(statuses) == {200, 409}, statuses
        running.result()
    assert answers(server) == family_tokens["two"]


def test_no_routes_without_the_plugin_and_key_guards_them(family: Path, tmp_path: Path) -> None:
    env = {"VLLM_PLUGINS": "impart_hf", "IMPART_HF_DELTAS": f"other={family / 'two'}"}
    # A folder may be called like the base
    base = shutil.copytree(family / "one", tmp_path / "base")
    with Server(base, "--served-model-name", "base", "--root-path", "/behind", env=env) as server:
        assert server.load("other")[0] == 200
        assert server.load(str(base))[0] == 200
        status, listed = server.request("/v1/deltas")
        assert [entry["id"] for entry in listed["data"]] == ["base", str(base), "other"]
        assert listed["loaded"] == str(base)
    with Server(family / "one", "--api-key", KEY, "--served-model-name", "mine", env=env) as server:
        assert server.request("/v1/deltas")[0] == 401
        assert server.load("other")[0] == 401
        assert server.load("other", "wrong")[0] == 401
        status, listed = server.request("/v1/deltas", key=KEY)
        assert (status, listed["loaded"]) == (200, "mine")
        assert server.load("other", KEY)[0] == 200
        assert server.load("mine", KEY)[0] == 200


def digest(family: Path) -> str:
    hash = hashlib.sha256()
    for path in sorted(p for p in family.rglob("*") if p.is_file()):
        hash.update(str(path.relative_to(family)).encode() + path.read_bytes())
    return hash.hexdigest()


def test_killed_in_the_middle_of_a_swap(family: Path, family_tokens: Expected) -> None:
    """No file is touched, the swap's client is told, and the next server serves."""
    env = {"VLLM_PLUGINS": "impart_hf", "IMPART_HF_DELTAS": str(family)}
    before = digest(family)
    with Server(family / "base", env=env) as server, ThreadPoolExecutor(1) as pool:
        stop = threading.Event()

        def swap() -> tuple[int, object]:
            number = 0
            while not stop.is_set():
                number += 1
                status, answer = server.load(("one", "two")[number % 2])
                if status != 200:
                    return status, answer
            return 0, None

        swaps = pool.submit(swap)
        time.sleep(1)
        for child in server.children():
            child.send_signal(signal.SIGKILL)
        try:
            status, answer = swaps.result(60)
            assert status == 503, answer
        except OSError:  # the API server stops soon after its engine, perhaps in the middle of an answer
            pass
        finally:
            stop.set()
    assert digest(family) == before
    with Server(family / "base", env=env) as server:
        assert server.load("one")[0] == 200
        assert answers(server) == family_tokens["one"]
        # Stopped while it swaps, it goes in peace.
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(server.load, "two")
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)
            try:
                assert last.result()[0] in (200, 503), (last.result(), server.log.read_text()[-7000:])
            except OSError:
                pass
    assert digest(family) == before
