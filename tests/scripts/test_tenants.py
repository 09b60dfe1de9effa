"""The benchmark of many tenants with a pretended server: the load, the ways of serving, the check and the report."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.load_script import load_script
from support.messages import naming
from support.tiny_models import fine_tune, make_model, save_model, tiny_config

pytest.importorskip("aiohttp")
pytest.importorskip("psutil")
from support.pretended_server import PretendedServer

load, models, ways = (load_script(name) for name in ("tenant_load", "tenant_models", "tenant_ways"))
script = load_script("benchmark_tenants")

pytestmark = [pytest.mark.scripts, pytest.mark.xdist_group("tenants")]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes."""
    folder = tmp_path_factory.mktemp("tenants")
    base = make_model(tiny_config("llama"))
    save_model(base, folder / "base")
    for seed in (1, 2):
        save_model(fine_tune(base, seed), folder / f"tune-{seed}")
    return folder


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The plans that the script has started servers for; all of them are one pretended server."""
    found: list[Any] = []

    class Pretended(ways.Servers):
        def __enter__(self) -> Any:
            found.append(self._plan)
            self.targets = [load.Target(server.url, name) for _, name in self._plan.places]
            return self

        def swaps(self) -> int:
            return 3

        def memory(self) -> int:
            return 1 << 30

    with PretendedServer(lambda body, prompt: f"{body['model']} says") as server:
        monkeypatch.setattr(script, "Servers", Pretended)
        yield found


def arguments(family: Path, work: Path, *more: str) -> list[str]:
    made_of = ["--base", str(family / "base"), "--finetuned", str(family / "tune-1"), str(family / "tune-2")]
    small = ["--method", "lowrank", "--ratio", "3", "--prompts", "6", "--prompt-tokens", "12", "--tokens", "8"]
    return [str(work), *made_of, *small, *more]


def right(text: str) -> Any:
    """The answer that a pretended server gives by saying a text."""
    return load.Expected([ord(character) for character in text], text)


def ask_all(server: PretendedServer, questions: list[Any], tenants: int = 2, prompts: int = 3, **options: Any) -> Any:
    targets = [load.Target(server.url, f"t{number}") for number in range(tenants)]

    async def run() -> Any:
        async with load.Client(targets, [f"prompt {n}" for n in range(prompts)], 4, **options) as client:
            return await load.open_loop(client, questions)

    return asyncio.run(run())


def test_arrivals() -> None:
    """They are Poisson's and Zipf's, in order, and follow from the seed."""
    questions = load.arrivals(50, 100, load.zipf(4, 1.0), 10, seed=0)
    assert questions == load.arrivals(50, 100, load.zipf(4, 1.0), 10, seed=0)
    assert questions != load.arrivals(50, 100, load.zipf(4, 1.0), 10, seed=1)
    assert len(questions) == pytest.approx(5000, rel=0.05) and all(0 < q.at < 100 for q in questions)
    assert [q.at for q in questions] == sorted(q.at for q in questions)
    gaps = sorted(b.at - a.at for a, b in zip(questions, questions[1:], strict=False))
    assert gaps[len(gaps) // 2] == pytest.approx(0.02 * 0.693, rel=0.1), "the median of an exponential distribution"
    asked = Counter(q.tenant for q in questions)
    assert asked[0] / asked[3] == pytest.approx(4, rel=0.2) and set(q.prompt for q in questions) == set(range(10))


def test_an_open_loop_waits_for_no_answer() -> None:
    """Nothing is answered until the last question is there; latency counts from when a question was due."""
    questions = load.arrivals(400, 0.5, [1, 1], 3, seed=0)
    assert len(questions) > 128, "more than any client's usual limit of connections"
    with PretendedServer(lambda body, prompt: "four", holds=len(questions)) as server:
        answers = ask_all(server, questions, timeout=60.0)
    assert not any(answer.error for answer in answers) and {answer.tokens for answer in answers} == {4}
    assert answers[0].done - answers[0].due > questions[-1].at - questions[0].at
    assert all(a.due <= a.sent <= a.first <= a.done for a in answers)
    found = load.summary(answers)
    assert found["requests"] == len(questions) and found["failed"] == 0
    assert 0 < found["first_token_p50"] <= found["latency_p50"] <= found["latency_p90"] <= found["latency_p99"]
    assert found["tokens_per_second"] == pytest.approx(4 * found["requests_per_second"])


def test_what_fails_is_counted() -> None:
    def say(body: dict[str, Any], prompt: str) -> str:
        if prompt == "prompt 1":
            raise ValueError("no memory")
        return "" if prompt == "prompt 2" else "four"

    questions = [load.Question(0, prompt) for prompt in (0, 1, 2)]
    with PretendedServer(say) as server:
        answers = ask_all(server, questions)
        gone = ask_all(server, [load.Question(0, 0)], timeout=1e-4)
    assert answers[0].error is None
    assert "no memory" in answers[1].error and "broke off" in answers[2].error and gone[0].error
    found = load.summary(answers)
    assert (found["requests"], found["failed"]) == (3, 2)
    assert load.summary(gone)["latency_p50"] is None, "nothing is made up"


def test_a_check_finds_what_is_mixed_or_lost() -> None:
    """Streamed or not, completions and chats; what a client has seen before it left is judged too."""
    expected = {(t, p, c): right(f"t{t} prompt {p}") for t in range(2) for p in range(3) for c in (False, True)}

    def say(body: dict[str, Any], prompt: str) -> str:
        turn[0] += 1
        if turn[0] == 20:
            raise ValueError("busy")
        return f"{'t0' if turn[0] == 30 else body['model']} {prompt}"

    async def run(server: PretendedServer) -> None:
        targets = [load.Target(server.url, f"t{number}") for number in range(2)]
        async with load.Client(targets, [f"prompt {n}" for n in range(3)], 4, ids=True) as client:
            questions = load.mixture(2, 3, True, seed=0, leaving=0.05)
            await load.closed_loop(client, questions, 20, 0.5, verdict.add)

    turn, verdict = [0], load.Verdict(expected)
    with PretendedServer(say) as server:
        asyncio.run(run(server))
    assert verdict.requests == len(server.seen) > 60
    assert verdict.lost == 1 and verdict.wrong <= 1  # the thirtieth may have been tenant 0's own
    assert {(("messages" in body), bool(body.get("stream"))) for body in server.seen} == {
        (False, False), (False, True), (True, False), (True, True),
    }  # fmt: skip
    wrong = load.Verdict(expected | {(0, 0, True): load.Expected([7], None)})
    seen = [(1, "t0 prompt 2", False), (1, "t1 prompt 2", False), (1, "t1 pro", True), (1, "t0 pro", True)]
    for tenant, text, left in seen:
        wrong.add(load.Answer(load.Question(tenant, 2), 0, 3, done=3, text=text, ids=right(text).ids, left=left))
    wrong.add(load.Answer(load.Question(1, 2), 0, 0, text="t1 prompt", ids=right("t1 prompt 2").ids))
    wrong.add(load.Answer(load.Question(0, 0, chat=True), 0, 0, text="any", ids=[7]))
    assert (wrong.requests, wrong.wrong, wrong.lost, wrong.left, wrong.longest) == (6, 3, 0, 1, 3)
    assert "tenant 0's" in wrong.told[0]


def test_every_way(family: Path, tmp_path: Path, plans: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Each is measured once, goes on where it was stopped, and is in table and picture."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("peft")
    run = arguments(family, tmp_path, "--tenants", "2,3", "--rates", "40", "--seconds", "0.3", "--engines", "2")
    assert script.main([*run, "--ways", "separate,swaps"]) == 0
    assert script.main(run) == 0
    assert len(plans) == 10, "nothing was run twice"
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text("utf-8").splitlines()]
    assert {(line["way"], line["tenants"]) for line in lines} == {(way, n) for way in ways.WAYS for n in (2, 3)}
    for line in lines:
        assert line["requests"] > 0 and line["failed"] == 0 and line["peak_memory"] == 1 << 30
        assert line["served"] == (2 if line["way"] == "separate" else line["tenants"])
    by_way = {line["way"]: plan for line, plan in zip(lines, plans, strict=True)}
    separate, swaps, scratch, adapters, packed = (by_way[way].engines for way in ways.WAYS)
    assert len(separate) == 2 and len({engine.model for engine in separate}) == 2
    deltas = re.findall(r"(t\d)=([^,]*)", swaps[0].environment["IMPART_HF_DELTAS"])
    assert [name for name, _ in deltas] == ["t0", "t1", "t2"] and len({repo for _, repo in deltas}) == 3
    assert all((Path(repo) / "delta_model.safetensors").exists() for _, repo in deltas)
    assert swaps[0].environment["VLLM_PLUGINS"] == "impart_hf" and "IMPART_HF_SCRATCH" not in swaps[0].environment
    assert scratch[0].environment["IMPART_HF_SCRATCH_LIMIT"] == "100GB"
    options = list(adapters[0].options)
    assert options[options.index("--max-loras") + 1] == "3"
    assert options[options.index("--max-lora-rank") + 1] == "64", "as large as the model's matrices allow"
    assert sum("=" in option for option in options) == 3

    assert packed[0].environment["IMPART_HF_PACKED"] == "1" and "--enable-lora" in packed[0].options

    said = capsys.readouterr().out
    assert "separate: only 2 of 3 engines fit" in said
    report = (tmp_path / "tenants.md").read_text("utf-8")
    assert "3 (2 served)" in report and "Not all tenants fit (separate: 2 of 3)" in report
    assert all(f"| {way} |" in report for way in ways.WAYS)
    assert (tmp_path / "tenants.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "tenants.md").unlink()
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("By hand.\n<!-- tenants: begin -->\nold\n<!-- tenants: end -->\n")
    assert script.main([str(tmp_path), "--report", "--document", str(page)]) == 0
    assert report.strip() in page.read_text("utf-8") and (page.parent / "tenants.png").exists()
    (tmp_path / "tenants.md").unlink()
    assert script.main([str(tmp_path), "--report"]) == 0 and (tmp_path / "tenants.md").read_text("utf-8") == report
    assert script.main([*run, "--tokens", "5"]) == 1
    assert "give another WORK" in capsys.readouterr().err


def test_check(
    family: Path,
    tmp_path: Path,
    plans: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Answers must be those of the deltas: here no server has a model, and so all are wrong."""
    run = arguments(family, tmp_path, "--check", "--tenants", "2", "--seconds", "0.2", "--concurrency", "4")
    assert script.main(run) == 1
    said = capsys.readouterr().out
    assert re.search(r"[1-9]\d* wrong, 0 lost, \d left by their clients, 3 swaps", said) and "in place of" in said

    def made_up(some: Any, prompts: list[str], tokens: int, chat: bool, enough: int) -> Any:
        assert chat and 0 < enough and len(prompts) > 1 and tokens == 8
        return prompts, {
            (t, p, c): right(f"t{t} says")
            for t in range(len(some.tenants))
            for p in range(len(prompts))
            for c in (True, False)
        }

    monkeypatch.setattr(script, "expected_answers", made_up)
    assert script.main(run) == 0
    assert " 0 wrong, 0 lost" in capsys.readouterr().out
    assert [plan.engines[0].model for plan in plans] == [family / "base"] * 2


def test_expected_answers_tell_tenants_apart(family: Path, tmp_path: Path) -> None:
    tenants = models.make_tenants(tmp_path, family / "base", [family / "tune-1", family / "tune-2"], 2, "lowrank", 3.0)
    own = models.Models(family / "base", tenants, "built-in")
    prompts = models.prompts_of(own, 12, 12, seed=0)
    assert len(set(prompts)) == len(prompts) > 4
    kept, expected = models.expected_answers(own, prompts, 8, True, enough=3)
    assert 0 < len(kept) <= 3 and set(kept) <= set(prompts)
    assert set(expected) == {(t, p, c) for t in (0, 1) for p in range(len(kept)) for c in (False, True)}
    for number in range(len(kept)):
        assert len({str(answer.ids) for (_, prompt, _), answer in expected.items() if prompt == number}) == 4
    assert all(len(answer.ids) == 8 for answer in expected.values())
    with pytest.raises(ValueError, match="no prompt tells"):
        models.expected_answers(models.Models(own.base, [tenants[0]] * 2, own.text), prompts[:2], 8, False, enough=3)


@pytest.mark.slow
def test_small_models(tmp_path: Path) -> None:
    settings = load_script("train_pair").PairSettings(
        hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=64, vocab_size=300, base_steps=2,
        finetune_steps=2, evaluation_tokens=256,
    )  # fmt: skip
    base, tuned = models.small_models(tmp_path, 2, settings)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (base, *tuned)]
    assert len(set(weights)) == 3
    started = time.time()
    assert models.small_models(tmp_path, 2, settings) == (base, tuned)
    assert all((folder / "model.safetensors").stat().st_mtime < started for folder in tuned), "used again"
    assert models.has_chat(models.Models(base, [], models.small_text(tmp_path)))
    assert models.prompts_of(models.Models(base, [], models.small_text(tmp_path)), 4, 8, seed=0)
    with pytest.raises(ValueError, match="at most 10"):
        models.small_models(tmp_path, 11, settings)


@pytest.mark.parametrize(
    "given, names",
    [
        (["--ways", "packed-ice"], ("packed-ice", "swaps", "adapters")),
        (["--check", "--ways", "adapters"], ("--check", "exact")),
        (["--check", "--ways", "swaps,separate"], ("--check", "one way")),
        (["--rates", "0"], ("more than 0",)),
        (["--base", "somewhere"], ("--finetuned",)),
        (["--report"], ("results.jsonl",)),
    ],
)
def test_bad_arguments(given: list[str], names: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path), *given]) == 1
    assert re.search(naming(names), capsys.readouterr().err)
