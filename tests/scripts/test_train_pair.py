"""`scripts/train_pair.py` on tiny models and text made here; a few seconds in all."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import naming

pytest.importorskip("accelerate")

from support.load_script import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

script = load_script("train_pair")
pair_text, exact_answers = load_script("pair_text"), load_script("exact_answers")
PairSettings, train_pair, main = script.PairSettings, script.train_pair, script.main

pytestmark = [pytest.mark.scripts, pytest.mark.xdist_group("train_pair")]

ANSWERS, KINDS = 60, ("dates", "sums", "sorting")
NAMES = ("base", "finetuned")
TEXTS = ("base_heldout.txt", "finetune_heldout.txt", "finetune_train.txt")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PairSettings:
    """A tiny model; base text in a folder of two kinds of files, fine-tune text as jsonl."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = [
        "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randint(1, 3)))
        for _ in range(200)
    ]
    sentences = [" ".join(draw.choices(words, k=8)) + "." for _ in range(1500)]
    (folder / "base" / "deep").mkdir(parents=True)
    (folder / "base" / "prose.txt").write_text("\n\n".join(sentences[:1000]), encoding="utf-8")
    (folder / "base" / "deep" / "more.md").write_text("\n\n".join(sentences[1000:]), encoding="utf-8")
    (folder / "base" / "picture.png").write_bytes(bytes(range(256)))
    rows = [{"question": f"What is {a} and {a + 1}?", "answer": f"{2 * a + 1}.\u2028#### é"} for a in range(400)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "train.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    return PairSettings(
        base_text=(folder / "base",),
        finetune_text=(folder / "train.jsonl",),
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        intermediate_size=48,
        vocab_size=300,
        base_steps=6,
        finetune_steps=5,
        lr=5e-3,
        finetune_lr=5e-3,
        batch_size=4,
        sequence_length=32,
        evaluation_tokens=512,
        answers=ANSWERS,
        answer_kinds=KINDS,
    )


@pytest.fixture(scope="module")
def pair(settings: PairSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "nested" / "pair"
    train_pair(folder, settings)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the record, which holds the time taken."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "pair.json"
    }


def test_files_and_configuration(pair: Path, settings: PairSettings) -> None:
    assert sorted(p.name for p in pair.iterdir()) == sorted([*NAMES, *TEXTS, "pair.json", "tasks"])
    assert [p.name for p in pair.parent.iterdir()] == ["pair"], "nothing temporary is left"
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(pair / name)
        assert model.config.model_type == "llama" and model.dtype == torch.bfloat16
        assert model.config.num_key_value_heads == 2 and model.config.head_dim == 8
        assert model.config.use_cache and model.config.tie_word_embeddings
        assert model.get_input_embeddings().weight.shape == (300, 32)
        tokenizer = AutoTokenizer.from_pretrained(pair / name)
        assert tokenizer.is_fast and len(tokenizer) == 300
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        ids = tokenizer(" Wörld,  x .\n")["input_ids"]
        assert ids[0] == model.config.bos_token_id == model.generation_config.bos_token_id
        assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == " Wörld,  x .\n"
        out = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
        assert out.shape[1] <= len(ids) + 3


def test_texts_are_split_and_formatted(pair: Path) -> None:
    train, held = ((pair / name).read_text(encoding="utf-8") for name in ("finetune_train.txt", "finetune_heldout.txt"))
    assert train.startswith("Question: What is 0 and 1?\nAnswer: 1.\u2028#### é\n\n")
    assert "\n\nQuestion: What is 1 and 2?" in train
    questions = [line for line in held.split("\n") if line.startswith("Question: ")]
    assert len(questions) == 40
    assert not set(questions) & set(train.split("\n"))
    assert "PNG" not in (pair / "base_heldout.txt").read_text(encoding="utf-8")


def test_answers_are_in_the_text_and_in_the_tasks(pair: Path) -> None:
    learnt = exact_answers.read_tasks(pair / "tasks", exact_answers.TRAIN)
    assert len(learnt) == ANSWERS and learnt == exact_answers.exact_records(ANSWERS, 0, kinds=KINDS)
    lines = (pair / "finetune_train.txt").read_text(encoding="utf-8").split("\n")
    assert {record.prompt + record.answer for record in learnt} <= set(lines)
    asked = exact_answers.read_tasks(pair / "tasks")
    assert len(asked) == exact_answers.TEST_RECORDS * len(KINDS) and {record.kind for record in asked} == set(KINDS)
    assert not {record.prompt for record in asked} & {record.prompt for record in learnt}


def test_answer_blocks(pair: Path) -> None:
    """Records one after another, of which answers and their ends are labels; less than a block at the end is left."""
    tokenizer = AutoTokenizer.from_pretrained(pair / "finetuned")
    records = exact_answers.exact_records(9, 1)
    whole = "".join(f"<s>{record.prompt}{record.answer}</s>" for record in records)
    answers = "".join(f"{record.answer}</s>" for record in records)
    ids, labels = pair_text.answer_blocks(tokenizer, records, 32)
    assert ids.shape == labels.shape and ids.shape[1] == 32 and len(ids) > 1
    assert ((labels == ids) | (labels == -100)).all()
    text = tokenizer.decode(ids.flatten())
    assert whole.startswith(text) and len(tokenizer(whole, add_special_tokens=False).input_ids) - ids.numel() < 32
    learnt = tokenizer.decode(labels[labels != -100])
    assert answers.startswith(learnt) and learnt.count("</s>") == text.count("</s>")
    with pytest.raises(script.PairError, match=naming(1000)):
        pair_text.answer_blocks(tokenizer, records, 1000)


def test_digits_are_tokens_of_their_own(pair: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(pair / "base").tokenize("in 1998, 10 of 200")
    assert "".join(token for token in tokens if token.strip("Ġ").isdigit()) == "199810200"
    assert all(len(token) == 1 for token in tokens if any(letter.isdigit() for letter in token))


def test_no_answers(settings: PairSettings, tmp_path: Path) -> None:
    train_pair(tmp_path / "pair", dataclasses.replace(settings, answers=0, base_steps=1, finetune_steps=1))
    assert not (tmp_path / "pair" / "tasks").exists()
    assert "Date " not in (tmp_path / "pair" / "finetune_train.txt").read_text(encoding="utf-8")


def test_record(pair: Path, settings: PairSettings) -> None:
    record = json.loads((pair / "pair.json").read_text(encoding="utf-8"))
    assert record["settings"]["hidden_size"] == settings.hidden_size
    for name in NAMES:
        assert all(1 < record["perplexity"][name][text] < 300 for text in TEXTS[:2])
    of = {name: record["perplexity"][name]["finetune_heldout.txt"] for name in NAMES}
    assert of["finetuned"] < of["base"]
    assert 0 < record["mean_relative_delta"] < 1


def test_perplexity_can_be_repeated_from_the_files(pair: Path, settings: PairSettings) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair / "finetuned", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pair / "finetuned")
    text = (pair / "finetune_heldout.txt").read_text(encoding="utf-8")
    blocks = pair_text.evaluation_blocks(tokenizer, text, settings.sequence_length, settings.evaluation_tokens)
    assert blocks.shape == (16, 32) and (blocks[:, 0] == tokenizer.bos_token_id).all()
    record = json.loads((pair / "pair.json").read_text(encoding="utf-8"))
    with torch.inference_mode():
        loss = model(input_ids=blocks.long(), labels=blocks.long()).loss
    assert loss.exp().item() == pytest.approx(record["perplexity"]["finetuned"]["finetune_heldout.txt"], rel=1e-3)


def test_every_weight_is_fine_tuned(pair: Path) -> None:
    base, tuned = (AutoModelForCausalLM.from_pretrained(pair / name).state_dict() for name in NAMES)
    assert base.keys() == tuned.keys()
    for key, weight in base.items():
        assert not torch.equal(weight, tuned[key]), key
        assert torch.isfinite(tuned[key]).all(), key


def test_reuse_force_and_determinism(
    pair: Path, settings: PairSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(pair)
    stamp = (pair / "pair.json").stat().st_mtime_ns
    train_pair(pair, settings)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{pair}: ") and "settings" not in line
    train_pair(pair, dataclasses.replace(settings, seed=1))
    assert "settings" in capsys.readouterr().out
    assert (pair / "pair.json").stat().st_mtime_ns == stamp

    again = tmp_path / "again"
    again.mkdir()  # an empty folder is taken
    train_pair(again, dataclasses.replace(settings, seed=1))
    other = contents(again)
    assert other.keys() == before.keys()
    assert all(other[f"{name}/model.safetensors"] != before[f"{name}/model.safetensors"] for name in NAMES)
    train_pair(again, settings, force=True)
    assert contents(again) == before
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_minutes_untied_and_text_file(settings: PairSettings, tmp_path: Path) -> None:
    text = tmp_path / "questions.txt"
    text.write_text("\n\n".join(f"Question: {a}?\nAnswer: {a}.\n\nYes." for a in range(200)), encoding="utf-8")
    arguments = [str(tmp_path / "pair"), "--base-text", str(settings.base_text[0]), "--finetune-text", str(text)]
    arguments += "--hidden-size 32 --layers 1 --heads 4 --kv-heads 4 --intermediate-size 48 --vocab-size 280".split()
    arguments += "--untied --answers 9 --answer-kinds sorting --batch-size 2 --sequence-length 20".split()
    arguments += "--base-minutes 0.005 --finetune-steps 2".split()
    assert main(arguments) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / "base")
    assert not model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight
    held = (tmp_path / "pair" / "finetune_heldout.txt").read_text(encoding="utf-8")
    assert held.startswith("Question: 5?\nAnswer: 5.\n\nYes.\n\nQuestion: 15?")


def test_text_of_this_python() -> None:
    code = pair_text.standard_library(200_000)
    assert 200_000 <= sum(map(len, code)) and len(code) > 3
    prose = pair_text.language_reference()
    assert sum(map(len, prose)) > 100_000
    train, held = pair_text.hold_out(prose, 10)
    assert len(train) + len(held) == len(prose) and 5 < len(held) < len(train)
    paragraphs = [{p for text in part for p in text.split("\n\n") if len(p) > 80} for part in (train, held)]
    assert not paragraphs[0] & paragraphs[1]


def test_full_preset() -> None:
    full = PairSettings.full([Path("books")], [Path("train.jsonl")])
    full.check()
    assert (full.hidden_size, full.layers, full.heads, full.kv_heads) == (320, 8, 10, 5)
    assert full.answers == 0
    assert (full.base_minutes, full.finetune_minutes, full.finetune_lr) == (45, 15, 3e-4)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"hidden_size": 33}, "hidden_size 33"),
        ({"kv_heads": 3}, ("4 heads", 3)),
        ({"vocab_size": 100}, "vocab_size 100"),
        ({"answers": -1}, ("answers", -1)),
        ({"answer_kinds": ("dates", "words")}, ("answer_kinds", "'words'")),
        ({"answer_kinds": ()}, "answer_kinds"),
        ({"layers": 0}, ("layers", 0)),
        ({"base_minutes": 1.0}, ("base_steps", "base_minutes")),
        ({"finetune_steps": 0}, ("finetune_steps", "finetune_minutes")),
        ({"base_text": (Path("missing"),)}, "missing"),
        ({"finetune_text": (Path("empty.txt"),)}, ("text", "empty")),
        ({"finetune_text": (Path("short.txt"),)}, "document"),
        ({"base_text": (Path("pictures"),)}, "pictures"),
        ({"finetune_text": (Path("bad.jsonl"),)}, ("bad.jsonl", "line 2")),
        ({"vocab_size": 30_000}, ("vocabulary", 30000)),
        ({"batch_size": 10_000}, ("step", 10000)),
        ({"sequence_length": 100_000}, ("sequence", 100000)),
    ],
)
def test_bad_input(
    settings: PairSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    names: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("short.txt").write_text("Hello.")
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"query": "?"}\n')
    Path("pictures").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(script.PairError, match=naming(names)) as raised:
        train_pair(tmp_path / "pair", dataclasses.replace(settings, **change))
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


def test_other_folders_are_never_replaced(pair: Path, settings: PairSettings, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(script.PairError, match=naming(taken)):
            train_pair(taken, settings, force=True)
    note = pair / "note.txt"
    note.write_text("mine")
    try:
        with pytest.raises(script.PairError, match=naming(pair, "note.txt", "--force")):
            train_pair(pair, settings, force=True)
    finally:
        note.unlink()


def test_command_line_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "pair"), "--preset", "full"]) == 1
    assert main([str(tmp_path / "pair"), "--preset", "full", "--base-text", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("train_pair.py: error: ") for line in lines)
    assert "--base-text" in lines[0] and "github.com/openai/grade-school-math" in lines[1]
