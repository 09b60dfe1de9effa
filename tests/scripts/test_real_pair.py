"""`scripts/real_pair.py` on tiny models in place of Gemma: what is trained and written, and going on after a stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.load_script import load_script
from support.messages import naming
from support.tiny_models import is_norm, load_tensors, make_model, same_files, save_model, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("accelerate")
pytest.importorskip("peft")

pytestmark = [pytest.mark.scripts, pytest.mark.slow]

script, question_answers = load_script("real_pair"), load_script("question_answers")
train, Settings = script.train, script.TrainingSettings

STEPS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3, whose embeddings are its output projection; not to be written to."""
    return save_model(make_model(tiny_config("gemma3")), tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def examples() -> list[Any]:
    records = [question_answers.Record(f"Question: {a}+1\nAnswer:", f" {a + 1}") for a in range(12)]
    return [question_answers.tokens_of(record, tiny_tokenizer()) for record in records]


def settings(kind: str, **changes: Any) -> Any:
    return Settings(kind, **{"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "save_steps": 2, **changes})


def changed(base: Path, finetuned: Path) -> set[str]:
    before, after = load_tensors(base), load_tensors(finetuned)
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("kind", ["lora", "full", "embeddings"])
def test_trains_what_its_kind_says_and_goes_on_where_it_stopped(
    kind: str, base: Path, examples: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(base, examples, tmp_path / "whole", settings(kind))
    names = set(load_tensors(base))
    embeddings = {name for name in names if "embed" in name}
    linear = {name for name in names - embeddings if not is_norm(name)}
    found = changed(base, tmp_path / "whole")
    assert len(embeddings) == 1 and linear <= found
    assert bool(embeddings & found) == (kind == "embeddings")
    assert any(map(is_norm, found)) == (kind != "lora")

    of_trainer, steps = script.AnswerTrainer.training_step, []

    def training_step(*arguments: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return of_trainer(*arguments, **named)

    monkeypatch.setattr(script.AnswerTrainer, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        train(base, examples, tmp_path / "stopped", settings(kind))
    assert not (tmp_path / "stopped").exists()
    train(base, examples, tmp_path / "stopped", settings(kind))
    assert len(steps) == 4 + STEPS - 2, "three steps after the checkpoint of step two"
    assert same_files(tmp_path / "whole", tmp_path / "stopped")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]


def test_its_fine_tune_loads_and_has_learnt(base: Path, examples: list[Any], tmp_path: Path) -> None:
    train(base, examples, tmp_path / "full", settings("full", steps=20))
    assert AutoTokenizer.from_pretrained(tmp_path / "full").get_vocab() == tiny_tokenizer().get_vocab()
    losses = []
    for folder in (base, tmp_path / "full"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.use_cache
        batch = question_answers.padded(examples, 0)
        losses.append(model(**batch).loss.item())
    assert losses[1] < 0.8 * losses[0]


def test_the_loss_is_that_of_the_answers(base: Path, examples: list[Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    batch = question_answers.padded(examples[:5], 0)
    loss = script.AnswerTrainer.compute_loss(None, model, batch)
    torch.testing.assert_close(loss, model(**batch).loss)


def test_an_output_projection_of_its_own_stays_too(examples: list[Any], tmp_path: Path) -> None:
    base = save_model(make_model(tiny_config("llama")), tmp_path / "base")
    train(base, examples, tmp_path / "full", settings("full"))
    assert set(load_tensors(base)) - changed(base, tmp_path / "full") >= {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_finished_fine_tune_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    train(base, [], tmp_path / "full", settings("full"))
    assert not any((tmp_path / "full").iterdir())


def test_other_settings_than_those_begun_with_are_refused(base: Path, examples: list[Any], tmp_path: Path) -> None:
    begun = tmp_path / "full.training"
    begun.mkdir()
    (begun / "settings.json").write_text(json.dumps(vars(settings("full", steps=9))))
    with pytest.raises(ValueError, match=naming(begun, "steps 9")):
        train(base, examples, tmp_path / "full", settings("full"))


def test_bad_settings_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("half", "embeddings")):
        settings("half")
    with pytest.raises(ValueError, match=naming("steps", 0)):
        settings("full", steps=0)
    with pytest.raises(ValueError, match="record"):
        train(base, [], tmp_path / "full", settings("full"))
    assert not any(tmp_path.iterdir())


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").symlink_to(base)
    text = tmp_path / "text.jsonl"
    rows = [{"question": f"{a}+1", "answer": str(a + 1)} for a in range(8)] + [{"question": "long " * 99, "answer": ""}]
    text.write_text("\n".join(map(json.dumps, rows)))
    arguments = [str(tmp_path), "--train", "lora,full", "--steps", "1", "--text", str(text)]
    assert script.main(arguments) == 0
    for kind in ("lora", "full"):
        assert changed(base, tmp_path / kind)
    (tmp_path / "full").rename(tmp_path / "other")
    assert script.main([*arguments, "--length", "2"]) == 1
    assert "record" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--train", "half"], ["--steps", "0"]])
def test_a_wrong_command(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        script.main([str(tmp_path / "work"), *arguments])
    assert error.value.code == 2 and arguments[1] in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_without_the_packages_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match=naming("gguf", "real-pair")):
        script.make_base(tmp_path / "base")
    assert not any(tmp_path.iterdir())
