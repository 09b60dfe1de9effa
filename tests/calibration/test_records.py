"""Records of the usual data sets: each gives the text that it stands for, any other an error with its fields."""

from __future__ import annotations

import copy
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
    """A tokenizer of which only the chat template matters: it writes the messages, or tools and messages, as JSON."""

    chat_template = "given"

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool, tools: Any = None) -> str:
        assert not tokenize
        return json.dumps(messages if tools is None else [{"tools": tools}, *messages])


class Plain:
    """A tokenizer without a chat template."""

    chat_template = None


def read_with(template: str, record: Any) -> str:
    """The text of a record that a real template writes."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return text_of(record, "line 7 of 'a.jsonl'", tokenizer)


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
        pytest.param({"prompt": ASKED, "chosen": CHAT[1], "rejected": {}}, id="preference, chosen an object"),
        pytest.param({"messages": CHAT[:1], "chosen": SAID, "rejected": "No."}, id="messages and chosen"),
        pytest.param({"messages": CHAT, "chosen": CHAT[1:], "rejected": []}, id="messages with the chosen reply"),
        pytest.param({"messages": CHAT, "chosen": True}, id="chosen, but no reply"),
        pytest.param({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {}}, id="sharegpt ranking"),
        pytest.param({"question": ASKED, "answer": [SAID, "Yes."]}, id="nq_open"),
        pytest.param({"prompt": CHAT[:1], "completion": [SAID, "Yes."]}, id="completions to choose from"),
        pytest.param({"content": "", "messages": CHAT}, id="chat beside empty text"),
        pytest.param({"id": "1", "content": "A title", "messages": CHAT}, id="chat beside a title"),
        pytest.param({"text": "A: Hm.", "conversations": SHAREGPT, "id": "x"}, id="chat beside its text"),
        pytest.param({"text": " ", "instruction": ASKED, "output": SAID}, id="instruction beside blank text"),
        pytest.param({"messages": [{"role": "human"} | {"content": ASKED}, CHAT[1]]}, id="role human"),
        pytest.param({"messages": [{"role": "User", "content": ASKED}, CHAT[1] | {"role": "model"}]}, id="role model"),
        pytest.param(
            {"conversations": [{"from": "USER", "value": ASKED}, {"from": "Bot", "value": SAID}]}, id="from USER"
        ),
        pytest.param({"prompt": CHAT[:1], "completion": CHAT[1:], "label": True}, id="kto"),
    ],
)
def test_a_chat_is_read_whatever_its_format(record: dict[str, Any]) -> None:
    assert read(record) == CHAT


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"prompt": "The sky", "completion": " is blue.", "id": "x"}, "The sky is blue."),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "\n\nHuman: a\n\nAssistant: b"),
        ({"text": "All of it.", "messages": None, "conversations": [], "id": "x"}, "All of it."),
        ({"text": "All of it.", "data": [ASKED, SAID]}, "All of it."),
        ({"text": "All of it.", "data": [{"rows": 3}], "label": False}, "All of it."),
        ({"prompt": "The sky", "completion": [" is blue.", " is grey."]}, "The sky is blue."),
        ({"id": "x", "text": None}, ""),
        ({"id": "x", "text": " ", "content": ""}, ""),
        ({"prompt": "The sky", "completion": " is green.", "label": False}, ""),
        ({"messages": CHAT, "label": False}, ""),
        ({"instruction": ASKED, "output": SAID, "kto_tag": False}, ""),
        ({"body": "word"}, "word"),
        ({"source": "Several words."}, "Several words."),
    ],
)
def test_text_that_no_template_belongs_to(record: dict[str, Any], text: str) -> None:
    assert read(record) == text


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": SHAREGPT, "system": "Be brief.", "tools": ""},
        {"messages": CHAT, "system": "Be brief."},
        {"messages": [SYSTEM | {"role": "System"}, *CHAT], "system": "Be verbose."},
        {"prompt": CHAT[:1], "completion": CHAT[1:], "system": "Be brief."},
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


def test_the_history_of_an_instruction_comes_before_it() -> None:
    record = {"system": "Be brief.", "instruction": ASKED, "input": "", "output": SAID}
    earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    assert read(record | {"history": [["Hello.", "Hi."]] * 2}) == [SYSTEM, *earlier, *earlier, *CHAT]
    assert read(record | {"history": []}) == read(record | {"history": None}) == [SYSTEM, *CHAT]
    with pytest.raises(ValueError, match=naming("line 7", "history")):
        read(record | {"history": [["Hello.", 7]]})


@pytest.mark.parametrize("weights", [[0, 1], [1, 0]])
def test_messages_that_are_not_learned_are_read(weights: list[int]) -> None:
    messages = [message | {"weight": weight} for message, weight in zip(CHAT, weights, strict=True)]
    assert read({"messages": messages}) == messages


@pytest.mark.parametrize("write", [json.dumps, list])
def test_tools_are_given_to_the_template(write: Any) -> None:
    tools = [{"type": "function", "function": {"name": "measure"}}]
    assert read({"messages": CHAT, "tools": write(tools)}) == [{"tools": tools}, *CHAT]
    assert read({"conversations": SHAREGPT, "tools": write(tools)}) == [{"tools": tools}, *CHAT]


@pytest.mark.parametrize("tools", [None, "", "measure(x)", "{}", [], ["measure"], 3])
def test_tools_that_are_no_list_of_schemas_are_left_out(tools: Any) -> None:
    assert read({"messages": CHAT, "tools": tools}) == CHAT


BY_ROLE = "".join(
    f"{{% {'el' if number else ''}if m['role'] == '{role}' %}}[{role}]{{{{ m['content'] }}}}"
    for number, role in enumerate(("user", "assistant"))
)
FOR_STRINGS = f"{{% for m in messages %}}{BY_ROLE}{{% endif %}}{{% endfor %}}"
FOR_PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
ADDING = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
ADDING_JSON = "{% for m in messages %}{{ m['role'] }}{{ m['content'] | tojson }}{% endfor %}"


@pytest.mark.parametrize("image", [[], [{"type": "image"}]])
@pytest.mark.parametrize(
    ("template", "text"),
    [(FOR_STRINGS, f"[user]{ASKED}[assistant]{SAID}"), (ADDING, f"user{ASKED}assistant{SAID}")],
)
def test_parts_for_a_template_that_takes_strings(template: str, text: str, image: list[Any]) -> None:
    parts = [*image, {"type": "text", "text": ASKED[:4]}, {"type": "text", "text": ASKED[4:]}]
    assert read_with(template, {"messages": [{"role": "user", "content": parts}, CHAT[1]]}) == text


def test_strings_for_a_template_that_takes_parts() -> None:
    assert read_with(FOR_PARTS, {"messages": CHAT}) == ASKED + SAID


@pytest.mark.parametrize("role", ["system", "tool", "ann"])
def test_a_message_that_the_template_leaves_out(role: str) -> None:
    # The content is also in another message, so that it is found in the text.
    messages = [{"role": role, "content": SAID}, *CHAT]
    with pytest.raises(ValueError, match=naming("line 7", role, "chat template")):
        read_with(FOR_STRINGS, {"messages": messages})
    assert read_with(FOR_STRINGS, {"messages": [{"role": role, "content": " "}, *CHAT]})


def test_a_content_that_the_template_writes_in_another_way_is_not_left_out() -> None:
    chat = [{"role": "user", "content": 'He said "a\nb".'}]
    assert read_with(ADDING_JSON, {"messages": chat}) == 'user"He said \\"a\\nb\\"."'
    upper = ADDING.replace("m['content']", "m['content'].upper()")
    assert read_with(upper, {"messages": CHAT}) == f"user{ASKED.upper()}assistant{SAID.upper()}"


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
        ({"data": ["One document.", "Another."]}, ("data", "--text-field")),
        ({"id": "x", "data": ["One document.", "Another.", "A third."]}, ("data", "--text-field")),
        ({"id": "abc123"}, ("id", "--text-field")),
        ({"page_url": "https://example.org/a"}, ("page_url", "--text-field")),
        ({"UUID": "0f"}, ("UUID", "--text-field")),
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
