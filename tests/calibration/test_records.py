"""Records of the usual data sets: each gives the text that it stands for, any other an error with its fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.messages import naming
from support.tiny_models import tiny_tokenizer

from impart_hf.calibration.records import text_of
from impart_hf.calibration.text import TextField, calibration_tokens

ASKED, SAID = "Is it small?", "It is."
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]


class Template:
    """A tokenizer of which only the chat template matters: it writes the messages as JSON."""

    chat_template = "given"

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool) -> str:
        assert not tokenize
        return json.dumps(messages)


class Plain:
    """A tokenizer without a chat template."""

    chat_template = None


def read(record: Any, field: str | None = None) -> Any:
    """The text of a record; a chat as its messages."""
    text = text_of(record, "line 7 of 'a.jsonl'", Template(), field)  # type: ignore[arg-type]
    return json.loads(text) if text.startswith("[{") else text


@pytest.mark.parametrize(
    "record",
    [
        pytest.param({"messages": CHAT, "prompt": ASKED, "prompt_id": "f0"}, id="ultrachat_200k"),
        pytest.param({"id": "Qw3x_0", "conversations": SHAREGPT}, id="sharegpt"),
        pytest.param({"id": "a", "conversations": CHAT}, id="sharegpt with roles"),
        pytest.param({"conversations": [ASKED, SAID], "source": "stackexchange"}, id="lima"),
        pytest.param({"id": "17", "data": [ASKED, SAID]}, id="ultrachat"),
        pytest.param({"conversation_id": "c", "conversation": CHAT, "model": "m"}, id="lmsys"),
        pytest.param({"prompt": CHAT[:1], "completion": CHAT[1:]}, id="prompt and completion as chats"),
        pytest.param({"id": "q", "question": ASKED, "answer": SAID}, id="gsm8k"),
        pytest.param({"prompt": ASKED, "response": SAID}, id="prompt and response"),
        pytest.param({"instruction": ASKED, "input": "", "output": SAID}, id="alpaca"),
        pytest.param({"instruction": ASKED, "context": None, "response": SAID, "category": "open"}, id="dolly"),
        pytest.param({"id": "o", "system_prompt": "", "question": ASKED, "response": SAID}, id="openorca"),
        pytest.param({"prompt": ASKED, "chosen": SAID, "rejected": "No."}, id="preference"),
        pytest.param({"prompt": ASKED, "chosen": CHAT[1:], "rejected": CHAT[:1]}, id="preference, chosen a message"),
        pytest.param({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": []}, id="preference as chats"),
        pytest.param({"prompt": ASKED, "prompt_id": "p", "chosen": CHAT, "rejected": CHAT}, id="ultrafeedback"),
        pytest.param({"chosen": CHAT, "rejected": CHAT}, id="preference without prompt"),
    ],
)
def test_a_chat_is_read_whatever_its_format(record: dict[str, Any]) -> None:
    assert read(record) == CHAT


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"prompt": "The sky", "completion": " is blue.", "id": "x"}, "The sky is blue."),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "\n\nHuman: a\n\nAssistant: b"),
        ({"text": "All of it.", "conversations": SHAREGPT, "id": "x"}, "All of it."),
        ({"id": "x", "text": None}, ""),
    ],
)
def test_text_that_no_template_belongs_to(record: dict[str, Any], text: str) -> None:
    assert read(record) == text


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": SHAREGPT, "system": "Be brief.", "tools": ""},
        {"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT], "system": "Be brief."},
        {"system_prompt": "Be brief.", "question": ASKED, "response": SAID},
        {"system": "Be brief.", "question": ASKED, "chosen": SAID, "rejected": "No."},
    ],
)
def test_a_system_message_in_a_field_of_its_own(record: dict[str, Any]) -> None:
    assert read(record) == [SYSTEM, *CHAT]


def test_what_an_instruction_refers_to_is_part_of_it() -> None:
    record = {"instruction": "Translate.", "input": "Hallo.", "output": "Hello."}
    asked = {"role": "user", "content": "Translate.\nHallo."}
    assert read(record) == [asked, {"role": "assistant", "content": "Hello."}]


def test_other_senders_and_parts_are_the_templates_affair() -> None:
    parts = [{"type": "text", "text": ASKED}]
    turns = [{"from": "Human", "value": parts}, {"from": "observation", "value": "7"}, {"from": "ann", "value": "Hm."}]
    expected = [("user", parts), ("tool", "7"), ("ann", "Hm.")]
    assert read({"conversations": turns}) == [{"role": role, "content": content} for role, content in expected]


@pytest.mark.parametrize("content", [ASKED, [{"type": "text", "text": ASKED}, {"type": "image"}]])
def test_without_a_template_what_was_said_is_joined(content: Any) -> None:
    record = {"conversations": [{"from": "human", "value": content}, {"from": "gpt", "value": SAID}]}
    assert text_of(record, "it", Plain()) == f"{ASKED}\n{SAID}"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"id": "x", "turns": [ASKED, SAID]}, ("id", "turns", "list")),
        ({"id": "x", "label": 3}, ("id", "label", "number")),
        ({"url": "somewhere"} | {"tokens": [1, 2]}, ("url", "tokens")),
        ({"id": "x", "body": "The text."}, ("id", "body")),
        ({"id": "x", "conversations": None}, ("conversations", "null")),
        ({"id": "x", "conversations": []}, ("conversations", "[]")),
        ({"id": "x", "data": [1, 2]}, ("message 0", "data")),
        ({"conversations": [SHAREGPT[0], SAID]}, ("message 1", "conversations")),
        ({"conversations": [{"from": "gpt"}]}, ("message 0", "value")),
        ({"conversations": [{"value": SAID}]}, ("message 0", "from")),
        ({"question": ASKED, "answer": {"text": SAID}}, ("question", "answer")),
        ({"question": ASKED, "answer": None}, ("question", "answer")),
        ({"prompt": ASKED, "chosen": [], "rejected": []}, ("chosen", "[]")),
    ],
)
def test_a_record_of_another_form_is_refused_with_its_place(record: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=naming("line 7 of 'a.jsonl'", names)):
        read(record)


def test_how_to_choose_is_said() -> None:
    with pytest.raises(ValueError, match=naming("turns", "--text-field")):
        read({"id": "x", "turns": [ASKED, SAID]})


@pytest.mark.parametrize(
    ("value", "expected"), [("A text.", "A text."), ([ASKED, SAID], CHAT), (SHAREGPT, CHAT), (None, "")]
)
def test_a_field_is_read_if_it_is_named(value: Any, expected: Any) -> None:
    assert read({"text": "other", "turns": value}, "turns") == expected


@pytest.mark.parametrize("record", [{"text": "other"}, {"turns": 7}, {"turns": {}}])
def test_a_named_field_without_text(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=naming("line 7", "turns")):
        read(record, "turns")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_files_of_chats(tmp_path: Path, kind: str) -> None:
    records = [{"id": str(number), "conversations": SHAREGPT} for number in range(20)]
    path = tmp_path / f"chats.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        datasets = pytest.importorskip("datasets")
        if kind == "folder":
            path.mkdir()
        datasets.Dataset.from_list(records).to_parquet(path / "train.parquet" if kind == "folder" else path)
    for source in (path, TextField(path, "conversations")):
        tokens = calibration_tokens(source, tiny_tokenizer(), samples=2, length=48)
        assert f"user: {ASKED}\n" in tiny_tokenizer().decode(tokens[0])


def test_a_broken_record_among_others_is_found(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    good = {"id": "x", "conversations": SHAREGPT}
    path.write_text("\n".join(json.dumps(record) for record in (good, good, {"id": "x"} | {"turns": []}, good)))
    with pytest.raises(ValueError, match=naming("line 3", path, "turns")):
        calibration_tokens(path, tiny_tokenizer(), samples=100, length=8)
