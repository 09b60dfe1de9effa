"""The study of real pairs, on tiny models: what is run and when, how it goes on, what is measured, and its report."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.few_processes import avoid_processes
from support.load_script import load_script
from support.messages import naming
from support.tiny_models import fine_tune, make_model, save_model, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from impart_hf import BitDeltaConfig, compress

script = load_script("real_results")
jobs, report, quality, sources, answers = (
    load_script(name) for name in ("real_jobs", "real_report", "answer_quality", "method_sources", "question_answers")
)

pytestmark = [
    pytest.mark.scripts,
    pytest.mark.xdist_group("study of real pairs"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc"),
]

RECORDS = [
    {"question": f"What is {n} and 3?", "answer": f"It is {n}+3.\n#### {n + 3 if n != 2 else '1,005'}"}
    for n in range(5)
]
DOCUMENT = "By hand.\n\n<!-- real results: begin -->\nof yesterday\n<!-- real results: end -->\nAlso.\n"
METHODS = ["delta-come", "dare", "delta-come+calibration", "bitdelta+distill"]


def arguments(folder: Path, **changes: str) -> list[str]:
    small = {"text": str(folder / "test.jsonl"), "calibration": str(folder / "train.txt"), "pairs": "lora,full"}
    small |= {"methods": ",".join(METHODS), "ratios": "3,4", "seeds": "0,1", "records": "4", "benchmarks": "none"}
    small |= {"samples": "6", "length": "32", "steps": "2", "output": str(folder / "out")}
    return [str(folder), *(part for name, value in (small | changes).items() for part in (f"--{name}", value))]


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def patched() -> Iterator[None]:
    """Tiny pairs cannot be compressed 32 times, and a process for every run would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        avoid_processes(patch)
        patch.setattr(jobs, "FIRST", (4.0,))
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, patched: None) -> Path:
    folder = tmp_path_factory.mktemp("study")
    base = make_model(tiny_config("gemma3"))
    save_model(base, folder / "base")
    save_model(fine_tune(base, only=lambda name: "embed" not in name), folder / "lora")
    save_model(fine_tune(base, seed=2), folder / "full")
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    (folder / "train.txt").write_text("A fine-tune is its base and a difference. " * 60, encoding="utf-8")
    assert script.main(arguments(folder)) == 0
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The two documents that the report is written to."""
    (tmp_path / "docs").mkdir()
    for path in (tmp_path / "README.md", tmp_path / "docs" / "results.md"):
        path.write_text(DOCUMENT, "utf-8")
    return tmp_path


def test_what_is_wanted_most_comes_first(study: Path) -> None:
    first, *rest = lines_in(study)
    assert first["pair"] == "lora" and {"base", "finetuned", "digest"} <= first["about"].keys()
    found = [tuple(line.get(name) for name in ("pair", "method", "asked", "seed")) for line in rest if "kl" in line]
    plain, (calibrated, distilled) = METHODS[:2], METHODS[2:]
    expected = [("lora", method, ratio, 0) for ratio in (4, 3) for method in plain]
    expected += [("full", method, ratio, 0) for ratio in (4, 3) for method in plain]
    expected += [(pair, calibrated, ratio, 0) for pair in ("lora", "full") for ratio in (4, 3)]
    expected += [(pair, distilled, 4, 0) for pair in ("lora", "full")]
    expected += [(pair, "dare", ratio, 1) for pair in ("lora", "full") for ratio in (4, 3)]
    assert found == expected


def test_what_a_run_measures(study: Path) -> None:
    about, *runs = (line for line in lines_in(study) if line["pair"] == "lora")
    assert about["about"]["finetuned"]["kl"] == pytest.approx(0, abs=1e-6)
    assert about["about"]["finetuned"]["agreement"] == 1 and about["about"]["changed"] > 0
    assert about["about"]["base"]["kl"] > 0.01
    for run in runs:
        assert (
            run["bytes"] <= run["checkpoint_bytes"] / run["asked"] and run["sidecar_bytes"] > run["reader_bytes"] / 99
        )
        assert 0 < run["kl"] < 0.2 and 0 < run["kl_error"] < run["kl"] and 0.5 < run["agreement"] <= 1
        assert run["seconds"] > 0 and run["load_seconds"] > 0 and run["peak"] >= 0 and run["load_peak"] >= 0
        assert run["records"] == 4 and run["code"] == sources.code_digest(run["method"]) != ""


def test_quality_is_that_of_whole_distributions(study: Path, tmp_path: Path) -> None:
    """By plain computation in float64, over all tokens of a batch with padding."""
    compress(str(study / "base"), str(study / "lora"), tmp_path / "delta", BitDeltaConfig(compression_ratio=8))
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (study / "lora", tmp_path / "delta")
    ]
    records = answers.read_records(study / "test.jsonl")
    examples = quality.examples_of(records, tiny_tokenizer())
    reference = quality.Reference.of(models[0], examples)
    reference.save(tmp_path / "reference.safetensors", torch.bfloat16)
    found = quality.answer_quality(models[1], quality.Reference.load(tmp_path / "reference.safetensors"))

    batch = answers.padded([example.tokens for example in examples], 3)
    targets = batch["labels"][:, 1:]
    with torch.no_grad():
        wanted, logs = (
            model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double().log_softmax(-1)
            for model in models
        )
    kept = targets != -100
    divergence = (wanted.exp() * (wanted - logs)).sum(-1)
    assert found["kl"] == pytest.approx(divergence[kept].mean().item(), rel=1e-4) and found["tokens"] == kept.sum()
    assert found["cross_entropy"] == pytest.approx(
        -logs.gather(-1, targets.clamp(min=0)[..., None])[kept].mean().item()
    )
    same = (wanted.argmax(-1) == logs.argmax(-1))[kept]
    assert found["agreement"] == pytest.approx(same.double().mean().item())
    parts = [own[mask] for own, mask in zip(divergence, kept, strict=True)]
    squares = sum((part.sum() - found["kl"] * len(part)).square() for part in parts)
    assert found["kl_error"] == pytest.approx((squares.sqrt() / found["tokens"]).item(), rel=1e-3)


def test_small_divergences_are_told_apart(study: Path) -> None:
    """The smallest of interest is 5e-5."""
    model, near = (AutoModelForCausalLM.from_pretrained(study / "lora", dtype=torch.float32) for _ in range(2))
    examples = quality.examples_of(answers.read_records(study / "test.jsonl"), tiny_tokenizer())
    with torch.no_grad():
        for number, weight in enumerate(near.model.layers[1].parameters()):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            weight.add_(noise, alpha=2e-3 * weight.std().nan_to_num(0).item())
    found = quality.answer_quality(near, quality.Reference.of(model, examples))["kl"]
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for example in examples:
            ids = example.tokens.ids[None]
            wanted, logs = (
                m.double()(ids).logits[0, example.tokens.prompt - 1 : -1].log_softmax(-1) for m in (model, near)
            )
            total += (wanted.exp() * (wanted - logs)).sum()
    expected = total.item() / sum(len(example.tokens.ids) - example.tokens.prompt for example in examples)
    assert 1e-7 < expected < 5e-5 and found == pytest.approx(expected, abs=1e-7)


def test_the_final_answer(study: Path) -> None:
    """It is right if every token of the number and the end after it are the most likely ones."""
    tokenizer = tiny_tokenizer()
    records = answers.read_records(study / "test.jsonl")
    examples = quality.examples_of([*records, answers.Record("Q", " no number")], tokenizer)
    for example, record in zip(examples, RECORDS, strict=False):
        end = tokenizer.decode(example.tokens.ids[-example.final :])
        assert end.strip() == record["answer"].partition("####")[2].strip() + tokenizer.eos_token
    assert examples[-1].final == 0

    model = AutoModelForCausalLM.from_pretrained(study / "lora", dtype=torch.float32)
    reference = quality.Reference.of(model, examples)
    found = quality.answer_quality(model, reference)
    right = []
    for example in examples[:-1]:
        with torch.no_grad():
            likely = model(example.tokens.ids[None]).logits[0, :-1].argmax(-1)
        right.append(bool((likely == example.tokens.ids[1:])[-example.final :].all()))
    assert found["final_answer"] == sum(right) / 5 and found["records"] == 6
    assert quality.binomial_error(0.2, 5) == pytest.approx(math.sqrt(0.2 * 0.8 / 5))


def test_generated_answers() -> None:
    """Prompts are those of training, padded on the left; numbers are compared without thousands separators."""
    tokenizer = tiny_tokenizer()
    said = [" so\n#### 3", " #### 4.", " #### 1005", " 6"]
    records = [answers.Record(f"Question: {'x' * n}\nAnswer:", f" #### {n}") for n in (3, 4, 5)]
    records = [*records[:2], answers.Record("Question: a\nAnswer:", " #### 1,005"), answers.Record("Q", " #### 6")]
    seen: list[torch.Tensor] = []

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
        assert settings["do_sample"] is False and (attention_mask[:, -1] == 1).all()
        first = len(seen)
        seen.extend(ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True))
        new = [torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in said[first : len(seen)]]
        padded = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=settings["pad_token_id"])
        return torch.cat([input_ids, padded], dim=1)

    model = SimpleNamespace(generate=generate, device="cpu")
    assert quality.exact_matches(model, tokenizer, records, batch_size=3) == 3
    for ids, record in zip(seen, records, strict=True):
        assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == record.prompt


def test_a_stopped_study_goes_on(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, whole = study / "out" / "results.jsonl", lines_in(study)
    path.write_bytes(path.read_bytes()[:-40])
    assert script.main(arguments(study)) == 0
    again, timed = lines_in(study), {"seconds", "peak", "load_seconds", "load_peak", "machine"}
    assert again[:-1] == whole[:-1] and "1 of 1: " in capsys.readouterr().err
    assert all(again[-1][name] == pytest.approx(value) for name, value in whole[-1].items() if name not in timed)
    assert script.main(arguments(study)) == 0 and lines_in(study) == again
    assert not [path for path in (study / "out").iterdir() if path.name not in ("references", "results.jsonl")]


def test_lines_of_earlier_code(study: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, whole = study / "out" / "results.jsonl", (study / "out" / "results.jsonl").read_bytes()
    lines = lines_in(study)
    changed = next(line for line in lines if line.get("method") == "dare" and line["pair"] == "lora")
    changed |= {"code": "0" * 12, "kl": 0.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    try:
        assert script.main([*arguments(study), "--report", "--checkout", str(checkout)]) == 0
        told = f"earlier code, --renew measures it again: lora dare {changed['asked']} 0\n"
        assert told in capsys.readouterr().err
        assert f"earlier code: lora dare {changed['asked']} 0." in (checkout / "docs" / "results.md").read_text("utf-8")
        assert script.main(arguments(study)) == 0 and len(lines_in(study)) == len(lines), "unless it is asked for"
        assert script.main([*arguments(study), "--renew"]) == 0 and len(lines_in(study)) == len(lines) + 1
        assert script.main([*arguments(study), "--report", "--checkout", str(checkout)]) == 0
        assert "earlier code" not in capsys.readouterr().err.rpartition("results:")[2]
        assert "0.50 ±" not in (checkout / "docs" / "results.md").read_text("utf-8"), "the newest line counts"
    finally:
        path.write_bytes(whole)


def test_which_code_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {name: sources.code_digest(name) for name in ("impart-rd", "dare", "impart-rd+calibration")}
    assert len({*digests.values()}) == 3 and sources.code_digest("") == ""
    read = Path.read_text

    def with_change(changed: str, text: str) -> dict[str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda path, *a: read(path, *a) + (text if path.name == changed else ""))
            return {name: sources.code_digest.__wrapped__(name) for name in digests}

    assert with_change("rate_distortion.py", "\n# a remark\n") == digests
    found = with_change("rate_distortion.py", "\nNEW = 1\n")
    assert found["dare"] == digests["dare"] and found["impart-rd"] != digests["impart-rd"]
    found = with_change("layer_stream.py", "\nNEW = 1\n")
    assert [name for name in digests if found[name] != digests[name]] == ["impart-rd+calibration"]
    assert with_change("gptq.py", "\nNEW = 1\n")["impart-rd"] != digests["impart-rd"]


def table_after(text: str, title: str) -> dict[str, list[str]]:
    """The rows of the first table after a title, by their first cell."""
    rows = re.findall(r"^\|(.*)\|$", text.partition(title)[2].partition("\n\n|")[2].partition("\n\n")[0], re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    return {row[0]: row[1:] for row in cells[1:]}


def test_report(study: Path, checkout: Path) -> None:
    """Of a study that was stopped early: cells are empty, and a method may have failed."""
    lines = [line for line in lines_in(study) if line.get("method") != "dare" or line["seed"] == 0]
    last = lines.pop(next(n for n, line in enumerate(lines) if line.get("method") == "dare" and line["asked"] == 3))
    failed = {name: last[name] for name in ("pair", "made_by", "code", "machine", "settings", "seed")}
    lines += [{**failed, "method": "dare", "asked": 64.0, "failed": "no room"}]
    lines += [{**failed, "generated": "base", "count": 8, "made_by": "", "code": "", "exact_match": 0.5,
               "exact_match_error": 0.125}]  # fmt: skip
    assert report.write_report(lines, checkout) == []
    text, readme = ((checkout / name).read_text("utf-8") for name in ("docs/results.md", "README.md"))
    for found in (text, readme):
        assert found.startswith("By hand.\n\n") and "of yesterday" not in found and found.endswith("end -->\nAlso.\n")
        assert "Machine: " in found
    (own,) = (line for line in lines if line.get("method") == "dare" and line["asked"] == 4 and line["pair"] == "lora")
    values = table_after(text, "**KL.**")
    assert values["dare"] == ["–", f"{own['kl']:.{max(2, 2 - math.floor(math.log10(own['kl'])))}f}", "×"]
    assert list(values)[-2:] == METHODS[2:] and values["bitdelta+distill"][0] == "–"
    assert table_after(text, "**Agreement.**")["dare"][1] == f"{100 * own['agreement']:.2f}"
    assert "±" in table_after(text, "**Final answer.**")["dare"][1]
    assert table_after(text, "**Bytes.**")["dare"][1] == f"{own['bytes'] / 1e6:.2f}"
    assert table_after(text, "**Generated answers.**")["base"] == ["8", "50.0 ± 12.5"]
    assert table_after(readme, "By hand.").keys() == {"`delta-come`", "`dare`"}
    assert "### The pair lora" in text and "### The pair full" in text
    for name in ("real-lora.png", "real-full.png"):
        assert (checkout / "docs" / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text


def test_verdict() -> None:
    """At equal bytes; with text, the better of our runs against the best of all others."""
    machine = {"cpu": "one", "cores": 2, "threads": 1, "torch": "2", "load average": 1.5}
    about = {"pair": "p", "about": {}, "settings": {}, "machine": machine}
    rest = dict.fromkeys((*report._NUMBERS, "seed"), 0) | {"pair": "p", "made_by": "", "code": ""} | about
    del rest["about"]

    def line(method: str, asked: int, size: int, kl: float) -> dict[str, Any]:
        return {**rest, "method": method, "asked": asked, "bytes": size, "kl": kl}

    lines = [about, line("impart-rd", 8, 200, 0.1), line("impart-rd", 16, 100, 0.02), line("impart-rd", 32, 50, 0.1)]
    lines += [line("dare", 16, 200, 0.02), line("dare", 32, 50, 0.08), line("lowrank", 16, 400, 0.04)]
    lines += [line("impart-rd+calibration", 16, 100, 0.05), line("impart-rd+distill", 16, 100, 0.01)]
    lines += [line("dare+distill", 16, 100, 0.02), line("impart-rd", 128, 10, 1.0)]
    results = report.Results(lines)
    assert report.verdict(results, "p", "without text", [16, 32, 128]) == "0.50 at 16, 1.25 at 32"
    text = report.goals(results, "p")
    assert "| without text | 5.00 (0.1 of 0.02, dare) |" in text and results.machines == ["one, 1 of 2 cores, torch 2"]
    assert "| with text | – | 0.50 (distill 0.01 of 0.02, dare+distill) | – | – |" in text
    assert "without text, at most 0.67 from 16 on: met at 16; missed at 32 by 0.58\n" in text
    assert "with text, at most 0.5 from 16 on: met at 16" in text


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"methods": "zip"}, ("method", "zip")),
        ({"methods": "lowrank+calibration"}, ("lowrank+calibration", "quantise")),
        ({"methods": "dare+magic"}, ("dare+magic", "distill")),
        ({"pairs": "lora,gone"}, ("gone", "real_pair.py")),
        ({"text": "gone.jsonl"}, "gone.jsonl"),
        ({"benchmarks": "merge"}, ("--benchmarks", "merge")),
        ({"generated": "dare"}, ("--generated", "dare")),
        ({"steps": "3"}, "--output"),
    ],
)
def test_bad_arguments(changes: dict[str, str], names: Any, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = lines_in(study)
    assert script.main(arguments(study, **changes)) == 1
    assert re.search(naming(names), capsys.readouterr().err) and lines_in(study) == before


def test_another_pair_of_the_same_name_is_refused(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = study / "test.jsonl"
    before = text.read_text("utf-8")
    text.write_text(before.replace("What", "How much"), "utf-8")
    try:
        assert script.main(arguments(study, ratios="3,4,5")) == 1
    finally:
        text.write_text(before, "utf-8")
    assert re.search(naming("'lora'", "--output"), capsys.readouterr().err)


def test_generation_and_other_benchmarks(study: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmark_load.py runs on the pair, and both are in the report."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, load_script(Path(command[1]).stem).main(command[2:]), "", "")

    whole = (study / "out" / "results.jsonl").read_bytes()
    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script, "LOADED", "bitdelta")
    more = {"benchmarks": "load", "generate": "2", "generated": "bitdelta@4", "pairs": "lora"}
    try:
        assert script.main(arguments(study, **more)) == 0
        *_, first, second, third, fourth = lines_in(study)
        assert first["benchmark"] == "load" and [row["page cache"] for row in first["found"]["loads"][::2]] == [
            "cold",
            "warm",
        ]
        assert [line["generated"] for line in (second, third, fourth)] == ["base", "finetuned", "bitdelta@4"]
        assert all(line["exact_match"] == 0 for line in (second, third, fourth)), "these models can say nothing"
        assert script.main([str(study), "--output", str(study / "out"), "--report", "--checkout", str(checkout)]) == 0
    finally:
        (study / "out" / "results.jsonl").write_bytes(whole)
    text = (checkout / "docs" / "results.md").read_text("utf-8")
    assert "**Generated answers.**" in text and "bitdelta delta" in text
