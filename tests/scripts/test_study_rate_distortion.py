"""The study of impart-rd on tiny models: what is run and in which order, how it goes on, what its report says."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.load_script import load_script
from support.messages import naming
from support.tiny_models import save_pair, tiny_config

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from impart_hf import DeltaComeConfig, ImPartRdConfig, compress
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.modeling.codebook import NORMAL_LEVELS
from impart_hf.modeling.delta_record import parse_stack

FOLDER = "experiments/rate_distortion"
script = load_script(f"{FOLDER}/study")
report, variants, pairs, exercises = (
    load_script(f"{FOLDER}/{name}") for name in ("report", "variants", "pairs", "exercises")
)
measure = load_script("measure")

pytestmark = [pytest.mark.scripts, pytest.mark.xdist_group("study of rate and distortion")]

TEXTS = {
    "train.txt": "A fine-tuned model is its base model and a small difference. ",
    "held.txt": "The difference is what a file keeps, and the base model is what it differs from. ",
    "other.txt": "A base model is larger than any difference. ",
}


def arguments(folder: Path) -> list[str]:
    """Of the script, for a folder that holds a pair and texts."""
    paths = [folder / "pair" / "base", folder / "pair" / "finetuned", *(folder / name for name in TEXTS)]
    small = {"pair": f"tiny={','.join(map(str, paths))}", "variants": "delta-come,impart-rd,impart-rd+scales"}
    small |= {"ratios": "3,4", "seeds": "0,1", "steps": "2", "tokens": "256", "samples": "6", "length": "32"}
    small |= {"work": str(folder / "work"), "docs": str(folder / "docs"), "only": "tiny"}
    return [part for name, value in small.items() for part in (f"--{name}", value)]


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "work" / "results.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    save_pair(folder / "pair", tiny_config("llama"))
    for name, text in TEXTS.items():
        (folder / name).write_text(text * 40, encoding="utf-8")
    (folder / "docs").mkdir()
    (folder / "docs" / report.DOCUMENT).write_text(
        "By hand.\n\n<!-- study: begin -->\nof yesterday\n<!-- study: end -->\nAlso.\n", "utf-8"
    )
    assert script.main(arguments(folder)) == 0
    return folder


def test_what_is_run(study: Path) -> None:
    pair, *runs = lines_in(study)
    assert pair["about"]["finetuned"]["kl"] == pytest.approx(0, abs=1e-6) and pair["about"]["base"]["other_kl"] > 0.01
    found = [(run["method"], run["asked"], run["seed"]) for run in runs]
    first = [(name, ratio, 0) for name in ("delta-come", "impart-rd", "impart-rd+scales") for ratio in (3, 4)]
    assert found == [*first, *((name, ratio, 1) for name in ("impart-rd", "impart-rd+scales") for ratio in (3, 4))]
    for run in runs:
        assert run["bytes"] <= run["checkpoint_bytes"] / run["asked"] and run["seconds"] > 0 and not run["shortfall"]
        assert 0 < run["kl"] < pair["about"]["base"]["kl"] and run["kl"] != run["other_kl"]


def test_what_a_whole_study_runs() -> None:
    """Seeds only where they make a difference; one of what takes long, and that at high ratios alone."""

    def of(name: str, **chosen: Any) -> list[tuple[float, int]]:
        return [(run.ratio, run.seed) for run in script.runs([pairs.Pair], [variants.Variant.named(name)], **chosen)]

    ratios = [16, 32, 64, 128, 200]
    assert of("delta-come+calibration") == of("impart-qt+scales") == [(ratio, 0) for ratio in ratios]
    for name in ("impart-qt", "impart-rd/two-bits", "impart-rd+codes"):
        assert of(name) == [(ratio, seed) for seed in (0, 1, 2) for ratio in ratios]
    assert of("impart-rd+long") == [(64, 0), (128, 0), (200, 0)]
    assert of("impart-rd+long", ratios=[16], seeds=[1, 2]) == [(16, 1), (16, 2)]
    assert of("delta-come", seeds=[1, 2]) == [(ratio, 1) for ratio in ratios]


@pytest.mark.parametrize("config", [DeltaComeConfig(4), ImPartRdConfig(4, seed=1)], ids=lambda config: config.name)
def test_numbers_are_those_of_the_method(config: Any, study: Path, tmp_path: Path) -> None:
    base, finetuned = study / "pair" / "base", study / "pair" / "finetuned"
    compress(str(base), str(finetuned), tmp_path / "delta", config, calibration=None)
    model, reference = (load(str(path), torch.float32, "cpu") for path in (tmp_path / "delta", finetuned))
    (run,) = (
        line
        for line in lines_in(study)
        if (line.get("method"), line.get("asked"), line.get("seed")) == (config.name, 4, config.seed)
    )
    for name, number in (("held.txt", "kl"), ("other.txt", "other_kl")):
        tokenizer = script.AutoTokenizer.from_pretrained(finetuned)
        blocks = measure.text_sequences(study / name, tokenizer, 256, 32)
        assert run[number] == pytest.approx(evaluate(model, reference, blocks, 8)[1], rel=1e-4)


def test_report(study: Path) -> None:
    text = (study / "docs" / report.DOCUMENT).read_text("utf-8")
    assert (
        text.startswith("By hand.\n\n") and text.endswith("<!-- study: end -->\nAlso.\n") and "of yesterday" not in text
    )
    runs = {(line["method"], line["asked"]): line for line in lines_in(study) if line.get("seed") == 0}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    (own,) = (
        row for row in rows if row[0] == "delta-come" and float(row[1]) == pytest.approx(runs[row[0], 3]["kl"], 0.01)
    )
    assert "±" not in own[1]
    assert all("±" in row[1] for row in rows if row[0] in ("impart-rd", "impart-rd+scales") and "%" not in row[1])
    for word in ("| tiny | none | **", " delta-come |", "impart-qt 0 of 15", "Machine: "):
        assert word in text
    picture = (study / "docs" / report.PICTURE).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_a_stopped_study_goes_on(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a line whose writing was cut short goes; what was lost is made again, with the same numbers."""
    path, whole = study / "work" / "results.jsonl", lines_in(study)
    path.write_bytes(path.read_bytes()[:-40])
    done, real = [], variants.compress
    monkeypatch.setattr(variants, "compress", lambda *args, **kwargs: done.append(args) or real(*args, **kwargs))
    assert script.main(arguments(study)) == 0 and len(done) == 1
    again, timed = lines_in(study), {"seconds", "machine"}
    assert again[:-1] == whole[:-1]
    found, expected = ({name: line[name] for name in line.keys() - timed} for line in (again[-1], whole[-1]))
    assert found == expected
    assert script.main([*arguments(study), "--report"]) == 0 and len(done) == 1


@pytest.mark.parametrize(
    "changes, names",
    [
        (["--steps", "3"], "--work"),
        (["--variants", "zip"], ("method", "zip")),
        (["--variants", "impart-qt/two-bits"], ("impart-qt/two-bits", "impart-rd")),
        (["--variants", "impart-rd+codes+calibration"], ("impart-rd+codes+calibration", "+")),
        (["--variants", "lowrank+calibration"], ("lowrank+calibration", "quantise")),
        (["--only", "light,gone"], "'gone'"),
        (["--pair", "tiny=base"], ("NAME=BASE", "'tiny=base'")),
    ],
)
def test_bad_arguments(changes: list[str], names: Any, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = lines_in(study)
    assert script.main([*arguments(study), *changes]) == 1
    assert re.search(naming(names), capsys.readouterr().err) and lines_in(study) == before


def test_another_pair_of_the_same_name_is_refused(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = study / "other.txt"
    before = text.read_text("utf-8")
    text.write_text(before + "More. ", "utf-8")
    try:
        assert script.main(arguments(study)) == 1
    finally:
        text.write_text(before, "utf-8")
    assert re.search(naming("pair", "'tiny'"), capsys.readouterr().err)


def test_parts_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(96, 24, generator=generator) @ torch.randn(24, 80, generator=generator)
    delta += 3 * torch.randn(96, 80, generator=generator)

    def record(part: str) -> Any:
        config = variants.PARTS[part]() if part else ImPartRdConfig()
        (found,) = parse_stack(np.frombuffer(config.encode(delta, 900, 0).data, np.uint8), part)
        return found

    whole, changed = record(""), {part: record(part) for part in variants.PARTS}
    widths = {part: {segment.width_u for segment in found.segments} for part, found in changed.items()}
    assert 1 in {segment.width_u for segment in whole.segments} and 1 not in widths["two-bits"]
    assert widths["two-bits"] & NORMAL_LEVELS.keys() and not widths["even-levels"] & NORMAL_LEVELS.keys()
    assert changed["least-error"].relative_error < whole.relative_error
    assert (changed["least-error"].codes == whole.codes).all()
    assert not variants.PARTS["own-budgets"]().shares_budget
    assert changed["exact-u"].relative_error > whole.relative_error
    assert (record("").codes == whole.codes).all(), "everything is put back"


def test_between_measured_sizes() -> None:
    rows = [{"bytes": size, "ratio": 1000 / size, "kl": kl} for size, kl in ((40, 0.04), (10, 0.16), (5, 0.64))]
    assert report.curve_at(rows, 20) == pytest.approx(0.08)
    assert report.curve_at(rows, 80) == pytest.approx(0.04), "nothing is known of larger files"
    assert report.curve_at(rows, 4) is None
    assert report.reached(rows, 0.08) == pytest.approx(50) and report.reached(rows, 0.32) == pytest.approx(
        1000 / 50**0.5
    )
    assert report.reached(rows, 0.7) == pytest.approx(200) and report.reached(rows, 0.01) is None


def test_a_pair_of_its_own(tmp_path: Path) -> None:
    base = tmp_path / "base.txt"
    base.write_text("\n\n".join(f"def f{n}(x):\n    return x * {n} - {n % 7}" for n in range(900)), encoding="utf-8")
    tiny = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 270, "base_steps": 2, "finetune_steps": 2}
    settings = dataclasses.replace(pairs.TRAINED["wide"], base_text=(base,), heads=2, kv_heads=2, **tiny)
    pair = pairs.trained("wide", tmp_path, dataclasses.replace(settings, sequence_length=32))
    first = (tmp_path / "exercises.jsonl").read_bytes()
    assert pair == pairs.trained("wide", tmp_path, settings), "used, not trained again"
    assert (tmp_path / "exercises.jsonl").read_bytes() == first
    assert len(pair.digest()) == 64 and "def f" in pair.other.read_text("utf-8")
    questions = [line for line in pair.heldout.read_text("utf-8").splitlines() if line.startswith("Question: ")]
    assert questions and not set(questions) & set(pair.train.read_text("utf-8").splitlines())


def test_exercises_are_right(tmp_path: Path) -> None:
    exercises.write_exercises(tmp_path / "some.jsonl", count=300)
    rows = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text("utf-8").splitlines()]
    assert len({row["question"] for row in rows}) == 300
    for row in rows:
        question, answer = row["question"], row["answer"]
        if question.startswith("What is "):
            one, other = map(int, question[len("What is ") : -1].split(" + "))
            assert answer.endswith(f"The sum is {one + other}.")
        elif question.startswith("Sort "):
            words, down = question[len("Sort ") :].rsplit(" from ", 1)[0], question.endswith("Z to A.")
            assert answer.split(", ") == sorted(words.split(", "), key=str.lower, reverse=down)
        else:
            record = json.loads(answer)
            assert record["total"] == record["count"] * record["price"] and question.startswith(record["buyer"])


def test_harm(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error of twice the size harms more, in each place; its tables have numbers of all of them."""
    harm = load_script(f"{FOLDER}/harm")
    pair = [str(study / "pair" / "base"), str(study / "pair" / "finetuned")]
    assert harm.main([*pair, "--text", str(study / "held.txt"), "--tokens", "256", "--length", "32"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    errors = np.array(
        [[float(cell) for cell in row[2:]] for row in rows if row[0].strip() in ("linear layers", "embeddings, output")]
    )
    assert errors.shape == (4, 4) and (errors[1::2] > errors[::2]).all() and (errors > 0).all()
    found = harm.Pair(
        *pair, measure.text_sequences(study / "held.txt", script.AutoTokenizer.from_pretrained(pair[0]), 64, 32)
    )
    assert found.divergence(lambda factors, *_: (factors[0] * factors[1]) @ factors[2], 0.0, True) < 1e-6
    (kind, both), *_ = found.alignment().items()
    assert kind == "q_proj" and both.shape[0] == 2 and (both > 0).all()
