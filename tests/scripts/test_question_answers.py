"""Records of prompts and answers: read, tokenised, answered; and those whose answers are JSON, with their score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.load_script import load_script
from support.messages import naming
from support.tiny_models import make_model, tiny_config, tiny_tokenizer

pytestmark = pytest.mark.scripts

script, json_answers = load_script("question_answers"), load_script("json_answers")
Record = script.Record


def test_reads_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    row = {"question": "What is 1 + 1?\u2028", "answer": "Two é"}
    file.write_text(f"{json.dumps(row, ensure_ascii=False)}\n\n", "utf-8")
    assert script.read_records(file) == [Record("Question: What is 1 + 1?\u2028\nAnswer:", " Two é")]


def test_reads_text(tmp_path: Path) -> None:
    file = tmp_path / "records.txt"
    file.write_text(
        "A title\nQuestion: One?\nIt is long.\nAnswer: 1\nand more\n\nQuestion: no reply\n"
        "Instruction: Say so.\nResponse: So.\n",
        "utf-8",
    )
    assert script.read_records(file) == [
        Record("Question: One?\nIt is long.\nAnswer:", " 1\nand more"),
        Record("Instruction: Say so.\nResponse:", " So."),
    ]


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_a_file_without_records_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\n")
    with pytest.raises(ValueError, match=naming(tmp_path / name, "Answer:")):
        script.read_records(tmp_path / name)


@pytest.mark.parametrize("line", ['{"question": "?"}', "[]", "{", '{"question": 1, "answer": ""}'])
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(f'{{"question": "?", "answer": "!"}}\n{line}\n')
    with pytest.raises(ValueError, match=naming(file, "line 2")):
        script.read_records(file)


def test_tokens_and_batches() -> None:
    tokenizer = tiny_tokenizer()
    one, other = (script.tokens_of(Record(prompt, " b"), tokenizer) for prompt in ("a:", "a long one:"))
    assert one.ids[0] == tokenizer.bos_token_id and one.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(one.ids[1 : one.prompt]) == "a:" and tokenizer.decode(one.ids[one.prompt : -1]) == " b"
    assert one.targets.tolist() == [-100] * one.prompt + one.ids[one.prompt :].tolist()
    batch = script.padded([one, other], 7)
    missing = len(other.ids) - len(one.ids)
    assert missing > 0
    assert batch["input_ids"][0].tolist() == one.ids.tolist() + [7] * missing
    assert batch["attention_mask"].sum(1).tolist() == [len(one.ids), len(other.ids)]
    assert batch["labels"][0].tolist() == one.targets.tolist() + [-100] * missing


def test_answers_do_not_depend_on_the_batch() -> None:
    tokenizer, model = tiny_tokenizer(), make_model(tiny_config("gemma3"), dtype=torch.float32)
    prompts = ["a", "A fine-tuned model", "no", "the difference is"]
    batched = script.generated(model, tokenizer, prompts, new_tokens=8, batch_size=3)
    for prompt, answer in zip(prompts, batched, strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert answer == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(batched)) > 1 and all(batched)


def test_orders_come_from_their_seed_and_held_out_ones_have_other_words() -> None:
    training = json_answers.order_records(200, 0)
    heldout = json_answers.order_records(200, 0, held_out=True)
    assert training == json_answers.order_records(200, 0) != json_answers.order_records(200, 1)
    words = []
    for records in (training, heldout):
        fields = [json.loads(record.answer) for record in records]
        assert {tuple(one) for one in fields} == {("name", "city", "item", "count", "day")}
        for one, record in zip(fields, records, strict=True):
            assert all(one[key] in record.prompt for key in ("name", "city", "item", "day"))
        words.append({one[key] for one in fields for key in ("name", "city", "item")})
    assert not words[0] & words[1]


def test_a_score_counts_whole_answers() -> None:
    record = json_answers.order_records(1, 0)[0]
    fields = json.loads(record.answer)
    wrong = json.dumps({**fields, "count": fields["count"] + 1})
    short = json.dumps({"name": fields["name"]})
    other_order = json.dumps(dict(reversed(fields.items())))
    answers = [record.answer, other_order, wrong, short, f"{record.answer} {{", "12", "The order is for two.", ""]
    found = json_answers.score(answers, [record] * len(answers))
    assert (found.valid, found.right, found.records) == (4, 2, len(answers))
