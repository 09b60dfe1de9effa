"""The search for beta, C and seed, from a user's call to the repository that it leaves."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from support.lm_eval_task import accuracy, write_task
from support.messages import naming
from support.tiny_models import (
    Pair,
    fine_tune,
    load_tensors,
    make_model,
    save_model,
    save_pair,
    tiny_config,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM

from impart_hf import compress
from impart_hf.calibration.text import calibration_tokens
from impart_hf.cli.main import main
from impart_hf.coding import svd_cache
from impart_hf.coding.spectrum import decomposed
from impart_hf.common.files import OutputError
from impart_hf.compression.pair import ModelPair
from impart_hf.compression.tune import TuningReport, tune
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.evaluation.reference import Reference
from impart_hf.methods import BitDeltaConfig, DareConfig, ImPartConfig, ImPartQtConfig, LowRankConfig, MethodConfig
from impart_hf.modeling.model_files import CheckpointError, HubOptions
from impart_hf.repository.inspection import Inspection
from impart_hf.repository.open import open_repository
from impart_hf.storage.workspace import Workspace

pytestmark = pytest.mark.xdist_group("tuning")

TEXT, OTHER = (Path(str(module.__file__)).read_text("utf-8") for module in (textwrap, shlex))
VALIDATION = {"validation": [TEXT], "samples": 8, "length": 32}
METHOD = ImPartConfig(compression_ratio=4, seed=5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair with matrices of full size; not to be written to."""
    config = tiny_config("llama", hidden_size=96, intermediate_size=128, num_key_value_heads=4)
    return save_pair(tmp_path_factory.mktemp("pair"), config)


@pytest.fixture(scope="module")
def searched(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuningReport, Path, list[tuple]]:
    """A search on text: its report, its repository, and the matrices that were decomposed meanwhile."""
    output, matrices = tmp_path_factory.mktemp("searched") / "delta", []

    def counting(matrix: torch.Tensor, *wanted: Any) -> Any:
        matrices.append((tuple(matrix.shape), float(matrix.double().square().sum())))
        return decomposed(matrix, *wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svd_cache, "decomposed", counting)
        found = run(pair, output, betas=(0.8, 0.0, 0.6), cs=(0.5, 1.0), **VALIDATION)
    return found, output, matrices


def run(pair: Pair, output: Path, method: MethodConfig | None = METHOD, **kwargs: Any) -> TuningReport:
    return tune(str(pair.base), str(pair.finetuned), output, method, **kwargs)


def card_data(repository: Path) -> dict[str, Any]:
    return ModelCard.load(repository / "README.md").data.to_dict()


def settings(found: TuningReport) -> list[tuple]:
    return [(c.beta, c.c, c.seed) for c in found.candidates]


def divergence(pair: Pair, repository: Path, sequences: torch.Tensor) -> float:
    models = [load(str(folder), torch.bfloat16, "cpu") for folder in (repository, pair.finetuned)]
    return evaluate(models[0], models[1], sequences, 8)[1]


def keep_ratios(repository: Path) -> dict[str, tuple[float, float]]:
    """Rank, and share of the kept entries, of every encoded tensor."""
    return {
        t["name"]: (t["rank"], t["keep_ratio"])
        for t in Inspection(str(repository), HubOptions()).to_dict()["tensors"]
        if t["kind"] == "encoded"
    }


# --- on text


def test_every_combination_is_tried_and_the_best_is_kept(searched: tuple) -> None:
    found, output, _ = searched
    assert sorted(settings(found)) == [(b, c, 5) for b in (0.0, 0.6, 0.8) for c in (0.5, 1.0)]
    assert found.metric == "KL, nats/token" and not found.higher_is_better
    scores = [c.score for c in found.candidates]
    assert found.best.score == min(scores) and found.best in found.candidates and len(set(scores)) > 3
    written = json.loads((output / "config.json").read_text("utf-8"))["method"]
    assert (written["beta"], written["c"], written["seed"]) == (found.best.beta, found.best.c, found.best.seed)
    assert written["compression_ratio"] == 4 and found.report.method == written
    assert found.report.ratio >= 4 and all(c.bytes <= found.report.checkpoint_bytes / 4 for c in found.candidates)
    table = found.table().splitlines()
    assert len(table) == 7 and "KL, nats/token" in table[0]
    marked = [line for line in table if line.endswith("best")]
    assert len(marked) == 1 and f"{found.best.score:.5f}" in marked[0]


@pytest.mark.slow
def test_scores_are_what_a_user_would_measure(pair: Pair, searched: tuple, tmp_path: Path) -> None:
    found, output, _ = searched
    sequences = calibration_tokens([TEXT], tiny_tokenizer(), samples=8, length=32)
    assert divergence(pair, output, sequences) == pytest.approx(found.best.score, rel=1e-4)
    for candidate in (found.candidates[0], found.candidates[-1]):
        method = dataclasses.replace(METHOD, beta=candidate.beta, c=candidate.c)
        report = compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", method)
        # The table of candidates in the card takes some bytes of the matrices' budget.
        assert report.repository_bytes == pytest.approx(candidate.bytes, rel=0.02)
        assert divergence(pair, tmp_path / "delta", sequences) == pytest.approx(candidate.score, rel=0.1)


@pytest.mark.slow
def test_the_winner_is_what_compress_makes(pair: Pair, searched: tuple, tmp_path: Path) -> None:
    found, output, _ = searched
    method = dataclasses.replace(METHOD, beta=found.best.beta, c=found.best.c)
    compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", method)
    ours, theirs = keep_ratios(output), keep_ratios(tmp_path / "delta")
    assert ours.keys() == theirs.keys() and len(ours) == 16
    for name, (rank, ratio) in ours.items():
        assert rank == pytest.approx(theirs[name][0], abs=2), name
        assert ratio == pytest.approx(theirs[name][1], rel=0.05), name
    folders = (output, tmp_path / "delta", pair.finetuned)
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
    for name in (n for n in ours if "layers" in n):
        tuned, compressed, true = (state[name].float() for state in states)
        # Masks are the same, budgets nearly: much nearer to each other than to what they stand for.
        assert (tuned - compressed).norm() < 0.5 * (compressed - true).norm(), name


def test_every_matrix_is_decomposed_once(searched: tuple) -> None:
    found, output, decomposed = searched
    assert len(keep_ratios(output)) == len(decomposed) == len(set(decomposed)) == 16
    assert len(found.candidates) == 6


def test_the_card_has_the_table(searched: tuple) -> None:
    found, output, _ = searched
    data = card_data(output)["impart_hf_tuning"]
    assert data["metric"] == "KL, nats/token"
    assert [(c["beta"], c["c"], c["seed"]) for c in data["candidates"]] == settings(found)
    assert [c["score"] for c in data["candidates"]] == pytest.approx([c.score for c in found.candidates], abs=1e-6)
    assert data["chosen"] in data["candidates"]
    assert data["chosen"] == min(data["candidates"], key=lambda c: c["score"])
    assert "impart" in card_data(output)["tags"] and card_data(output)["library_name"] == "transformers"


def test_nothing_else_is_left(searched: tuple, tmp_path: Path) -> None:
    found, output, _ = searched
    assert [p.name for p in output.parent.iterdir()] == ["delta"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model).__name__ == "LlamaForCausalLM"
    repository = open_repository(str(output), HubOptions(), None)
    assert len(repository.names()) == len(load_tensors(Path(repository.base.source)))
    as_json = json.loads(json.dumps(found.to_dict()))
    assert len(as_json["candidates"]) == 6 and as_json["report"]["ratio"] == found.report.ratio


def test_seeds_are_searched(tiny_pair: Pair, tmp_path: Path) -> None:
    found = run(tiny_pair, tmp_path / "delta", betas=(0.6,), cs=(1.0,), seeds=(3, 1, 2), **VALIDATION)
    assert settings(found) == [(0.6, 1.0, 3), (0.6, 1.0, 1), (0.6, 1.0, 2)]
    assert len({c.score for c in found.candidates}) == 3
    assert found.report.method["seed"] == found.best.seed == min(found.candidates, key=lambda c: c.score).seed
    assert card_data(tmp_path / "delta")["impart_hf_tuning"]["chosen"]["seed"] == found.best.seed


def test_a_value_given_twice_is_tried_once(tiny_pair: Pair, tmp_path: Path) -> None:
    found = run(tiny_pair, tmp_path / "delta", betas=[0.6, 0.6], cs=[1, 1.0], **VALIDATION)
    assert settings(found) == [(0.6, 1.0, 5)] and found.best is found.candidates[0]


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True])
def test_impart_qt(calibrated: bool, tiny_pair: Pair, tmp_path: Path) -> None:
    method = ImPartQtConfig(compression_ratio=4, bits=(8, 2), groups=(4,))
    calibration = {"calibration": [OTHER], "calibration_samples": 8, "calibration_length": 64} if calibrated else {}
    found = run(tiny_pair, tmp_path / "delta", method, betas=(0.6, 0.7), cs=(1.0,), **calibration, **VALIDATION)
    assert len(found.candidates) == 2
    written = json.loads((tmp_path / "delta" / "config.json").read_text("utf-8"))["method"]
    assert written["name"] == "impart-qt" and (written["bits"], written["groups"]) == ([8, 2], [4])
    assert written["calibration"] == ("8 x 64 tokens" if calibrated else "none: rounded")
    winner = dataclasses.replace(method, beta=found.best.beta, c=found.best.c)
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "plain", winner, **calibration)
    sequences = calibration_tokens([TEXT], tiny_tokenizer(), samples=8, length=32)
    assert divergence(tiny_pair, tmp_path / "plain", sequences) == pytest.approx(found.best.score, rel=0.02)
    AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "plain"]


def test_an_older_repository_is_replaced(tiny_pair: Pair, tiny_repository: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_repository, tmp_path / "delta")
    run(tiny_pair, tmp_path / "delta", betas=(0.6,), cs=(1.0,), **VALIDATION)
    assert "impart_hf_tuning" in card_data(tmp_path / "delta")
    assert [p.name for p in tmp_path.iterdir()] == ["delta"]


# --- on a task


def test_a_task(task: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    method = dataclasses.replace(METHOD, compression_ratio=6)
    found = run(tiny_pair, tmp_path / "delta", method, task=str(task), betas=(0.0, 0.7), cs=(1.0,))
    assert found.metric == "acc" and found.higher_is_better
    assert found.best.score == max(c.score for c in found.candidates) and len(found.candidates) == 2
    examples = [json.loads(line) for line in (task.parent / "examples.jsonl").read_text("utf-8").splitlines()]
    candidate = found.candidates[1]
    again = dataclasses.replace(method, beta=candidate.beta, c=candidate.c, seed=candidate.seed)
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "one", again)
    # Two choices may be as likely as one another up to rounding.
    assert accuracy(load(str(tmp_path / "one"), torch.bfloat16, "cpu"), examples) == pytest.approx(
        candidate.score, abs=1.5 / 24
    )
    data = card_data(tmp_path / "delta")["impart_hf_tuning"]
    assert data["metric"] == "acc" and data["chosen"]["score"] == pytest.approx(found.best.score, abs=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "one"]


def test_some_examples_of_a_task(
    task: Path, tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", str(tiny_pair.base), str(tiny_pair.finetuned), str(tmp_path / "delta"), "--ratio", "4"]
    command += ["--task", str(task), "--limit", "5", "--betas", "0.6", "--cs", "1", "--quiet", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == "acc" and found["best"]["score"] * 5 == pytest.approx(round(found["best"]["score"] * 5))


def test_a_size_instead_of_a_ratio(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tiny_pair, tmp_path / "delta", betas=[0.6], cs=[1.0], max_bytes="70KB", **VALIDATION)
    assert 60_000 < found.report.repository_bytes <= 70_000 and found.best.bytes <= 70_000
    command = ["tune", str(tiny_pair.base), str(tiny_pair.finetuned), str(tmp_path / "no"), "--max-bytes", "60KB"]
    assert main([*command, "--ratio", "4", "--task", "arc_easy"]) == 1
    assert re.search(naming("--ratio", "--max-bytes"), capsys.readouterr().err)


# --- bad input


def refuses(pair: Pair, folder: Path, error: type[Exception], match: str, **kwargs: Any) -> str:
    """The message, after a look that the run left everything as it was."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        run(pair, folder / "delta", **kwargs)
    assert sorted(folder.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "arguments, names",
    [
        ({}, ("validation text", "task")),
        ({"validation": [TEXT], "task": "arc_easy"}, ("validation text", "task")),
        ({"method": DareConfig(4), **VALIDATION}, ("ImPart", "ImPart-Qt", "beta", "'dare'")),
        ({"method": BitDeltaConfig(4), **VALIDATION}, ("ImPart", "ImPart-Qt", "'bitdelta'")),
        ({"method": LowRankConfig(4), **VALIDATION}, ("ImPart", "ImPart-Qt", "'lowrank'")),
        ({"betas": (), **VALIDATION}, ("betas", "cs", "seeds")),
        ({"cs": [], **VALIDATION}, ("betas", "cs", "seeds")),
        ({"seeds": [], **VALIDATION}, ("betas", "cs", "seeds")),
        ({"betas": (0.6, 1.0), **VALIDATION}, ("beta", 1.0)),
        ({"betas": (-0.1, 0.6), **VALIDATION}, ("beta", -0.1)),
        ({"betas": (0.6, float("nan")), **VALIDATION}, ("beta", "nan")),
        ({"cs": (0, 1), **VALIDATION}, ("c", 0)),
        ({"seeds": (1, -1), **VALIDATION}, ("seed", -1)),
        ({"calibration": [TEXT], **VALIDATION}, ("calibration", "'impart'")),
        ({"validation": ["short"]}, ("text", "tokens", "sequence")),
        ({**VALIDATION, "samples": 0}, ("sequence", 0)),
        ({**VALIDATION, "device": "cuda:99"}, ("device", "'cuda:99'")),
        ({**VALIDATION, "max_shard_size": "much"}, "much"),
        ({**VALIDATION, "batch_size": 0}, "batch_size"),
        ({"task": "/gone/task.yaml"}, ("task", "'/gone/task.yaml'")),
        ({"method": ImPartConfig(5000), **VALIDATION}, ("ratio", 5000)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_input(arguments: dict, names: Any, tiny_pair: Pair, tmp_path: Path) -> None:
    refuses(tiny_pair, tmp_path, ValueError, naming(names), **arguments)


@pytest.mark.slow
def test_tasks_that_cannot_be_had(tiny_pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    task = write_task(tmp_path / "task")
    (task.parent / "examples.jsonl").unlink()
    assert str(task) in refuses(tiny_pair, tmp_path, ValueError, "task", task=str(task))
    task.write_text("no: task\n", "utf-8")
    refuses(tiny_pair, tmp_path, ValueError, naming("task", task), task=str(task))
    refuses(tiny_pair, tmp_path, ValueError, naming("task", "'no_such_task_at_all'"), task="no_such_task_at_all")


def test_missing_files(tiny_pair: Pair, tmp_path: Path) -> None:
    refuses(tiny_pair, tmp_path, FileNotFoundError, naming("'/gone/text.txt'"), validation="/gone/text.txt")
    gone = Pair(tmp_path / "gone", tiny_pair.finetuned)
    refuses(gone, tmp_path, CheckpointError, naming(gone.base), **VALIDATION)


def test_output_that_holds_something_else(tiny_pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "thesis.tex").write_text("years of work")
    match = naming(tmp_path / "delta", "delta repository")
    refuses(tiny_pair, tmp_path, OutputError, match, **VALIDATION)
    assert (tmp_path / "delta" / "thesis.tex").read_text() == "years of work"


def test_output_that_another_run_is_writing(tiny_pair: Pair, tmp_path: Path) -> None:
    with Workspace(tmp_path / "delta") as other:
        other.begin("other work", 0)
        refuses(tiny_pair, tmp_path, OutputError, naming("another process", tmp_path / "delta"), **VALIDATION)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, Stop])
def test_a_failure_in_the_middle_leaves_nothing(
    error: type[BaseException], tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the second candidate is judged: the first one, and all components, are on disk."""
    seen: list[list[str]] = []

    compare = Reference.compare

    def failing(*args: Any) -> Any:
        seen.append(sorted(p.name for p in tmp_path.iterdir()))
        if len(seen) == 2:
            raise error("stopped")
        return compare(*args)

    monkeypatch.setattr(Reference, "compare", failing)
    with pytest.raises(error, match="stopped"):
        run(tiny_pair, tmp_path / "delta", **VALIDATION)
    assert len(seen) == 2 and seen[1] == [".delta.partial"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_published_is_what_was_judged(tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[bytes] = []
    load = ModelPair.load

    def watched(pair: ModelPair, repository: Path | None = None) -> Any:
        if repository is not None:
            judged.append((repository / "delta_model.safetensors").read_bytes())
        return load(pair, repository)

    monkeypatch.setattr(ModelPair, "load", watched)
    found = run(tiny_pair, tmp_path / "delta", ImPartQtConfig(compression_ratio=5), **VALIDATION)
    best = found.candidates.index(found.best)
    assert len(judged) == len(found.candidates) and len(set(judged)) > 1
    assert (tmp_path / "delta" / "delta_model.safetensors").read_bytes() == judged[best]


def test_a_vocabulary_that_grew(tmp_path: Path) -> None:
    """A fine-tune with added rows is compared all the same: what is loaded has them too."""
    base = make_model(tiny_config("llama"))
    save_model(base, tmp_path / "base")
    tuned = fine_tune(base)
    tuned.resize_token_embeddings(328, mean_resizing=False)
    save_model(tuned, tmp_path / "finetuned")
    found = run(Pair(tmp_path / "base", tmp_path / "finetuned"), tmp_path / "delta", betas=(0.6,), cs=(1.0,),
                **VALIDATION)  # fmt: skip
    assert 0 < found.best.score < 10


# --- from the shell


def test_the_command(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    output = tmp_path / "delta"
    command = ["tune", str(tiny_pair.base), str(tiny_pair.finetuned), str(output), "--ratio", "4"]
    command += ["--validation", str(tmp_path / "text.txt"), "--samples", "4", "--length", "32"]
    assert main([*command, "--betas", "0.6,0.7", "--cs", "1", "--seeds", "0,9"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["beta", "C", "seed", "bytes", "KL,", "nats/token"]
    rows = [line.split() for line in lines[1:5]]
    assert [row[:3] for row in rows] == [[b, "1", s] for b in ("0.6", "0.7") for s in ("0", "9")]
    best = min(rows, key=lambda row: float(row[4]))
    assert [row for row in rows if row[-1] == "best"] == [best]
    assert lines[5] == "" and re.search(naming(output, "ratio", 4), lines[6])
    assert [line[:12] for line in printed.err.splitlines()] == ["Tuning", "Tuning: done"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "text.txt"]


def test_the_command_prints_json(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    command = ["tune", str(tiny_pair.base), str(tiny_pair.finetuned), str(tmp_path / "delta"), "--ratio", "4"]
    command += ["--validation", str(tmp_path / "text.txt"), "--samples", "4", "--length", "32", "--quiet", "--json"]
    command += ["--method", "impart-qt", "--bits", "8,2", "--groups", "3", "--betas", "0.6", "--cs", "0.5,1"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(c["beta"], c["c"]) for c in found["candidates"]] == [(0.6, 1.0), (0.6, 0.5)]
    assert found["best"] == min(found["candidates"], key=lambda c: c["score"])
    assert found["report"]["method"]["bits"] == [8, 2] and found["report"]["ratio"] > 3
    assert found["report"]["method"]["c"] == found["best"]["c"]


def test_the_command_refuses_in_one_line(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "tune",
        str(tiny_pair.base),
        str(tiny_pair.finetuned),
        str(tmp_path / "delta"),
        "--validation",
        "/gone.txt",
    ]
    for more, names in (
        ([], "'/gone.txt'"),
        (["--betas", "0.6,1.5"], ("beta", 1.5)),
        (["--bits", "4,2"], ("--bits", "impart-qt")),
        (["--push", "user/delta"], ("--push", "--base-name")),
        (["--task", "arc_easy"], ("--validation", "--task")),
    ):
        assert main([*command, *more]) == 1
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert line.startswith("impart-hf: error: ") and re.search(naming(names), line) and printed.out == ""
    for wrong in (["--betas", "0.6;0.7"], ["--method", "dare"]):
        with pytest.raises(SystemExit):
            main([*command, *wrong])
        assert "error: " in capsys.readouterr().err
    assert main(command[:4]) == 1
    assert re.search(naming("--validation", "--task"), capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
