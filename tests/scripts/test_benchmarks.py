"""The benchmark scripts on tiny settings: they run, and what they say is sane. Their timings are not looked at."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support.load_script import load_script
from support.messages import naming
from support.own_answers import write_own_answers
from support.tiny_models import Pair
from transformers import LlamaConfig

from impart_hf import LowRankConfig, compress
from impart_hf.common import token_losses
from impart_hf.evaluation import metrics as evaluate
from impart_hf.evaluation.memory import PeakMemory

pytestmark = pytest.mark.scripts

measure = load_script("measure")
linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")


@pytest.fixture(scope="module")
def quality(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    text = folder / "held_out.txt"
    text.write_text("A fine-tuned model is its base model and a small difference. " * 30, encoding="utf-8")
    script = load_script("benchmark_quality")
    arguments = [str(tiny_pair.base), str(tiny_pair.finetuned), "--text", str(text), "--output", str(folder / "out")]
    arguments += ["--methods", "impart,lowrank,dare", "--ratios", "2.5,5", "--seeds", "0,1", "--tokens", "256"]
    arguments += ["--sequence-length", "32", "--batch-size", "3", "--method-option", "beta=0.5"]
    arguments += ["--answers", str(write_own_answers(tiny_pair.finetuned, folder / "tasks"))]
    assert script.main(arguments) == 0
    return folder / "out"


@pytest.mark.xdist_group("quality")
def test_quality_numbers(quality: Path) -> None:
    results = json.loads((quality / "quality.json").read_text())
    assert results["finetuned"]["kl"] == pytest.approx(0, abs=1e-6)
    assert results["base"]["kl"] > 0.01
    assert results["finetuned"]["right_answers"] == 1 > results["base"]["right_answers"]
    assert results["tokens"] == 8 * 31
    runs = {(run["method"], run["asked"], run["seed"]): run for run in results["runs"]}
    assert len(runs) == 10, "lowrank draws nothing at random, and runs with one seed"
    for (method, _, _), run in runs.items():
        assert 0 < run["kl"] and 1 < run["perplexity"] and run["bytes"] > 0 and 0 <= run["right_answers"] <= 1
        assert run["ratio"] == pytest.approx(run["checkpoint_bytes"] / run["bytes"])
        assert run["settings"].get("beta") == (0.5 if method == "impart" else None)
    assert runs["lowrank", 2.5, 0]["kl"] < runs["lowrank", 5, 0]["kl"]
    assert runs["dare", 5, 0]["kl"] != runs["dare", 5, 1]["kl"]


@pytest.mark.xdist_group("quality")
def test_quality_files(quality: Path) -> None:
    text = (quality / "quality.md").read_text()
    for word in ("fine-tuned", "base", "impart", "lowrank", "dare", "±", "Machine: ", "torch", "10 held-out records"):
        assert word in text
    heads, _, finetuned, *_ = ([cell.strip() for cell in row.split("|")] for row in text.splitlines() if row[:1] == "|")
    assert dict(zip(heads, finetuned, strict=True))["right answers"] == "1.000"
    pytest.importorskip("matplotlib")
    picture = (quality / "quality.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_quality_is_that_of_the_whole_distribution(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and chunks make no difference, and the numbers are what a plain computation gives."""
    base, finetuned = (evaluate.load(str(path), torch.float32, "cpu") for path in (tiny_pair.base, tiny_pair.finetuned))
    blocks = torch.randint(5, 300, (5, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(token_losses, "CHUNK_ENTRIES", 320 * 7)
    perplexity, divergence = evaluate.evaluate(base, finetuned, blocks, 2)
    with torch.no_grad():
        found, wanted = (m(input_ids=blocks).logits[:, :-1].log_softmax(-1) for m in (base, finetuned))
    expected = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
    loss = -found.gather(-1, blocks[:, 1:, None]).mean()
    assert divergence == pytest.approx(expected.item(), rel=1e-4)
    assert perplexity == pytest.approx(loss.exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--methods", "zip"], ("method", "zip")),
        (["--methods", "impart+calibration"], ("impart+calibration", "distill", "--calibration")),
        (["--methods", "impart+magic"], ("impart+magic", "calibration", "distill")),
        (["--method-option", "zeta=1"], ("setting", "'zeta'")),
    ],
)
def test_quality_bad_arguments(arguments: list[str], names: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_script("benchmark_quality").main(["base", "finetuned", "--text", "text", *arguments])
    assert re.search(naming(names), capsys.readouterr().err)


@linux_only
def test_compress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--size", "96", "--ratios", "8", "--repeats", "1", "--methods", "impart"]
    arguments += ["--json", str(tmp_path / "results.json"), "--work", str(tmp_path)]
    assert load_script("benchmark_compress").main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Machine: " in printed and "96x258" in printed and "peak" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["method"] for row in results["encoding"]} >= {"impart", "lowrank", "dare"}
    for row in results["decomposition"]:
        if "excess error" in row:
            assert row["excess error"] < 1e-3 and row["singular values"] < 1e-3 and row["orthogonality"] < 1e-3
    (memory,) = results["memory"]
    assert memory["peak bytes"] > 0 and memory["ratio"] >= 8
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "nothing temporary is left"


@linux_only
def test_load(few_processes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--layers", "1", "--ratio", "8", "--repeats", "1", "--methods", "impart"]
    assert load_script("benchmark_load").main([*arguments, "--json", str(tmp_path / "results.json")]) == 0
    assert "Machine: " in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    found = [(row["page cache"], row["loaded"]) for row in results["loads"]]
    assert found == [(c, n) for c in ("cold", "warm") for n in ("dense fine-tune", "impart delta")]
    assert all(row["seconds (median)"] > 0 for row in results["loads"])
    assert len(results["decoding"]["impart"]) == 4 and len(results["sparse products"]) == 5


@linux_only
def test_peak_memory() -> None:
    with PeakMemory() as memory:
        block = torch.ones(1 << 26)  # 256 MiB
        del block
        kept = torch.ones(1 << 24)  # 64 MiB: never from memory that was freed before, as the C library may give less
    assert 160 << 20 < memory.bytes < 400 << 20
    assert memory.grown >= 40 << 20 and kept.numel()


def test_synthetic_delta() -> None:
    sigma = torch.linalg.svdvals(measure.synthetic_delta(700, 600, 0))
    assert sigma[0] == pytest.approx(1, rel=0.2)
    assert sigma[15] == pytest.approx(0.25, rel=0.3)
    assert torch.equal(measure.synthetic_delta(70, 60, 0), measure.synthetic_delta(70, 60, 0))


def test_gptq(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_script("benchmark_gptq").main(["--side", "96", "--ratio", "8", "--repeats", "1"]) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    steps = {(line[1].strip(), line[2].strip()) for line in lines[2:]}
    assert {("V^T", "sparse GPTQ"), ("U", "sparse GPTQ"), ("both", "seconds per layer")} <= steps


def test_level_scales(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text("A fine-tuned model is its base model and a small difference. " * 30, encoding="utf-8")
    arguments = [str(tiny_pair.base), str(tiny_pair.finetuned), "--text", str(text), "--ratios", "6"]
    assert load_script("compare_level_scales").main([*arguments, "--tokens", "256", "--sequence-length", "32"]) == 0
    lines = [line.split("|")[2:6] for line in capsys.readouterr().out.splitlines() if line.startswith("| 6")]
    for name, *found in lines:
        values = [float(value) for value in found]
        assert len(set(values)) == 3 and min(values) > 0, f"{name.strip()}: each rule gives something else"
    assert len(lines) == 3


@pytest.mark.vllm
@linux_only
def test_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--ratio", "3", "--repeats", "1", "--work", str(tmp_path)]
    assert load_script("benchmark_serving").main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert [row["served"] for row in results["starts"]] == ["dense fine-tune", "delta repository"]
    assert all(0 < row["LLM(...), seconds"] < row["restart, seconds"] for row in results["starts"])
    assert len(results["swaps"]) == 6 and all(row["seconds"] >= 0 for row in results["swaps"])
    said = capsys.readouterr().out
    assert "Machine: " in said and "of a restart" in said
    assert not list(tmp_path.glob("tmp*")), "the models are gone"


@pytest.mark.vllm
@linux_only
def test_swaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--repeats", "1", "--work", str(tmp_path), "--json", str(tmp_path / "out.json")]
    assert load_script("benchmark_swaps").main(arguments) == 0
    loaded = {row["swap"]: row["tensors"] for row in json.loads((tmp_path / "out.json").read_text())["swaps"]}
    assert loaded.pop("base to fine-tune") == loaded.pop("fine-tune to base") >= 14  # a norm may round to the base's
    assert loaded == {
        "fine-tune to its copy, 1 layers differ": 7, "fine-tune to itself": 0,
        "vLLM's reload of the dense fine-tune": "all",
    }  # fmt: skip
    assert "Machine: " in capsys.readouterr().out
    assert not list(tmp_path.glob("tmp*")), "the models are gone"


@linux_only
def test_merging_speed(few_processes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--models", "2", "--work", str(tmp_path), "--json", str(tmp_path / "results.json")]
    arguments += ["--methods", "task_arithmetic,ties,impart_linear"]
    assert load_script("benchmark_merge").main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    found = [(row["method"], row["tool"]) for row in results["rows"]]
    compared = [(method, tool) for method in ("task_arithmetic", "ties") for tool in ("impart-hf", "mergekit")]
    assert found == [*compared, ("impart_linear", "impart-hf")]
    assert all(row["seconds"] > 0 for row in results["rows"]) and "Machine: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_comparison_of_merges(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text("A fine-tuned model is its base and a difference.\n\nThe difference is small.\n\n" * 30, "utf-8")
    arguments = [str(tiny_pair.base), str(tiny_pair.finetuned), "--text", str(text), "--output", str(tmp_path / "out")]
    small = {"steps": 2, "batch-size": 2, "length": 32, "samples": 2, "seeds": "0,1", "lambdas": "0.5,1", "trims": 0.5}
    arguments += [part for name, value in small.items() for part in (f"--{name}", str(value))]
    script = load_script("compare_merging")
    tasks = write_own_answers(tiny_pair.finetuned, tmp_path / "tasks", 20)
    exact_answers, second = load_script("exact_answers"), tmp_path / "sums"
    assert exact_answers.main([str(second), "--kinds", "sums", "--count", "40", "--test", "20"]) == 0
    arguments += ["--answers", str(tasks), "--second-answers", str(second / exact_answers.TASKS)]
    assert script.main([*arguments, "--densities", "0.9,0.2", "--second-name", "tables"]) == 0
    results = json.loads((tmp_path / "out" / "merging.json").read_text())
    assert list(results["unmerged"]) == ["base", "first", "tables"] and list(results["merged"]) == list(script.METHODS)
    rights = {title: found["first, right"] for title, found in results["unmerged"].items()}
    assert rights["first"] == 1 > rights["base"]
    for title, found in results["merged"].items():
        dropping = "+" in title
        assert len(found["runs"]) == (2 if dropping else 1) and found["candidates"] == (4 if dropping else 2)
    assert (
        results["merged"]["task arithmetic + DARE"]["runs"][0] != results["merged"]["task arithmetic + DARE"]["runs"][1]
    )
    lines = (tmp_path / "out" / "merging.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 3 + 6
    cells = [cell.strip() for cell in lines[-3].split("|")[1:-1]]
    assert cells[0] == "TIES + ImPart" and float(cells[2]) == 0.5 and float(cells[3]) in (0.9, 0.2) and "±" in cells[6]
    # The second fine-tune is kept, and is one
    assert (tmp_path / "out" / "second" / "heldout.txt").is_file()
    assert script.main([str(tmp_path / "gone"), *arguments[1:]]) == 1
    assert "compare_merging.py: error:" in capsys.readouterr().err


def test_startup(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_script("benchmark_startup").main(["--repeats", "1"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    seconds = {command: float(time) for command, time in rows[1:]}
    assert {"python -c pass", "impart-hf --version", "impart-hf tune-merge --help", "impart-hf prune width --help"} <= (
        seconds.keys()
    )
    assert all(0 < time < 60 for time in seconds.values())


@linux_only
def test_benchmark_forecast(tiny_pair: Pair, few_processes: None, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("benchmark_forecast")
    arguments = [str(tiny_pair.base), str(tiny_pair.finetuned), "--methods", "impart-rd,dare", "--repeats", "1"]
    assert script.main([*arguments, "--ratio", "3"]) == 0
    rows = re.findall(
        r"^\| (impart-rd|dare) \| 1 \| (.*?) \| (\S+) \| (\S+) \| (\S+) \|", capsys.readouterr().out, re.M
    )
    found = {(method, what): (float(told), float(measured)) for method, what, told, measured, _ in rows}
    assert found["impart-rd", "singular values, s"][1] > 0 and ("dare", "price, s") not in found
    for method in ("impart-rd", "dare"):
        told, measured = found[method, "result, MB"]
        assert told == pytest.approx(measured, rel=0.03)
        assert found[method, "time in all, s"][1] >= found[method, "vectors and encoding, s"][1] > 0


def test_forecast_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, file = load_script("forecast_sizes"), tmp_path / "found.json"
    arguments = ["--tiny", "--ratio", "3", "--seconds", "0.1", "--samples", "4", "--length", "32", "--json", str(file)]
    assert script.main([*arguments, "--methods", "impart-rd,lowrank", "--texts"]) == 0
    assert "Extrapolated from single matrices" in capsys.readouterr().out
    forecasts = json.loads(file.read_text())
    assert [(f["model"], f["method"]["name"]) for f in forecasts] == [
        (model, method) for model in ("tiny", "tiny mixture") for method in ("impart-rd", "lowrank")
    ]
    assert all(stage["seconds"] > 0 for f in forecasts for stage in f["stages"])
    names = [[stage["name"] for stage in f["stages"]] for f in forecasts[:2]]
    assert {"price", "calibration", "distillation"} <= set(names[0]) and "calibration" not in names[1]
    # The shapes are those of the models that transformers makes.
    config = LlamaConfig(num_key_value_heads=8, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                         num_attention_heads=64)  # fmt: skip
    shapes = {name: shape for shard in measure.llama_shards(config) for name, shape in shard.items() if len(shape) == 2}
    assert {t.name: t.shape for t in script.MODELS["LLaMA-70B"].tensors() if len(t.shape) == 2} == shapes
    mixture = script.MODELS["Qwen3-30B-A3B"].tensors()
    assert sum(t.dense_bytes for t in mixture) == pytest.approx(2 * 30.5e9, rel=0.01)
    assert sum(t.dense_bytes for t in script.MODELS["Gemma-3-27B"].tensors()) == pytest.approx(2 * 27e9, rel=0.02)


@linux_only
def test_delta_adapters(
    few_processes: None, tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", LowRankConfig(compression_ratio=4))
    script = load_script("benchmark_delta_adapters")
    options = ["--counts", "1,2", "--prompt-tokens", "5", "--new-tokens", "2", "--dtype", "float32"]
    picture = tmp_path / "picture.png"
    assert script.main([str(tiny_pair.base), str(tmp_path / "delta"), *options, "--picture", str(picture)]) == 0
    said = capsys.readouterr().out
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    counts = {way: [line["count"] for line in found if line["way"] == way] for way in script.WAYS}
    assert counts == {way: [1, 2] if way != "base" else [1] for way in script.WAYS}
    assert all(line["prefill"] > 0 and line["decode"] > 0 for line in found)
    assert re.search(r"\| merged +\| 2 \|", said) and picture.stat().st_size > 1000


def test_benchmark_checkpoints(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script itself compares what is restored with the dense checkpoints."""
    arguments = [str(tiny_pair.base.parent), "--output", str(tmp_path), "--steps", "2", "--save-every", "1"]
    arguments += ["--ways", "start", "--length", "16", "--learning-rate", "1e-3"]
    assert load_script("benchmark_checkpoints").main(arguments) == 0
    output = capsys.readouterr().out
    assert "Machine: " in output and "| float32 | delta of the start |" in output
    results = json.loads((tmp_path / "checkpoints.json").read_text())
    assert [run["dtype"] for run in results["runs"]] == ["bfloat16", "float32"]
    for run in results["runs"]:
        assert {name: len(way["bytes"]) for name, way in run["ways"].items()} == {"save_pretrained": 2, "start": 2}
        assert all(size > 100_000 for way in run["ways"].values() for size in way["bytes"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints.json"], "no checkpoint is left"


def test_exact(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "rows.json"
    pair = f"tiny={tiny_pair.base},{tiny_pair.finetuned}"
    assert load_script("benchmark_exact").main(["--pair", pair, "--sparse", "0.02", "--json", str(found)]) == 0
    assert "| tiny | exact, decoding |" in capsys.readouterr().out
    rows = json.loads(found.read_text())["rows"]
    assert {row["pair"] for row in rows} == {"tiny", "tiny's base, 2% changed"}
    for name in ("tiny", "tiny's base, 2% changed"):
        bits = {row["way"].split(",")[0]: row["bits per number"] for row in rows if row["pair"] == name}
        assert 0 < bits["entropy given the exponent"] < bits["exact"] < 2 * bits["zlib -9"]  # so small are the matrices
