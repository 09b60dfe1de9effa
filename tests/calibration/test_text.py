"""Calibration text: every kind of source gives the sequences that its text stands for, every bad one a clear error."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import naming
from support.tiny_models import tiny_tokenizer

from impart_hf.calibration import text as calibration_text
from impart_hf.calibration.text import BUILT_IN, TextField, calibration_tokens, text_name, within_positions

CHAT = [{"role": "user", "content": "Is it small?"}, {"role": "assistant", "content": "It is."}]
TEXTS = ["The first text is a short one.", "Ünïcode in the second.", "A third,\nof two lines."]


def numbered(count: int) -> list[str]:
    """Texts without two equal stretches of a few tokens."""
    return [f"{number} is the number; " * 3 for number in range(count)]


def encoded(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def texts_of(source: Any, tokenizer: Any = None) -> list[str]:
    """All texts of a source, read back from its tokens."""
    tokenizer = tokenizer or tiny_tokenizer()
    tokens = calibration_tokens(source, tokenizer, samples=100_000, length=2)
    return tokenizer.decode(tokens[:, 1]).split(tokenizer.eos_token)


def templated(template: str | None) -> Any:
    """The tiny tokenizer with another chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def rendered(messages: list[dict], tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def without(*names: str) -> Any:
    """The tiny tokenizer without some of its special tokens."""
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    for name in {"bos_token", "eos_token"} - set(names):
        setattr(tokenizer, name, getattr(tiny_tokenizer(), name))
    return tokenizer


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    """The same texts as every kind of source that keeps them apart."""
    records = [{"text": text, "url": "somewhere", "id": 3} for text in TEXTS]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "array.json").write_text("  \n" + json.dumps(records, indent=2))
    (tmp_path / "strings.json").write_text(json.dumps(TEXTS, ensure_ascii=False), "utf-8")
    (tmp_path / "content.JSONL").write_text(
        "\n".join(json.dumps({"content": text, "title": "none"}) for text in TEXTS), "utf-8-sig"
    )
    (tmp_path / "only.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    halves = [{"prompt": text[:9], "completion": text[9:], "source": "somewhere"} for text in TEXTS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, halves)))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return {
        **{path.name: path for path in tmp_path.iterdir()},
        "string path": str(tmp_path / "lines.jsonl"),
        "list": TEXTS,
        "tuple": tuple(TEXTS),
        "records": [records[0], halves[1], TEXTS[2]],
    }


@pytest.mark.parametrize(
    "kind",
    [
        "lines.jsonl",
        "lines.json",
        "array.json",
        "strings.json",
        "content.JSONL",
        "only.jsonl",
        "pairs.jsonl",
        "folder",
        "string path",
        "list",
        "tuple",
        "records",
    ],
)
def test_every_kind_of_source_gives_its_texts(sources: dict[str, Any], kind: str) -> None:
    if kind == "folder":
        pytest.importorskip("datasets")
    assert texts_of(sources[kind]) == TEXTS


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama", "max_position_embeddings": 64}, 64),
        ({"model_type": "llama", "max_position_embeddings": 4096}, 2048),
        ({"model_type": "xlnet"}, 2048),  # its configuration says -1: there is no limit
    ],
)
def test_sequences_are_not_longer_than_the_models_positions(config: dict[str, Any], expected: int) -> None:
    assert within_positions(2048, config) == expected


def test_a_text_file_is_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n" + "\n".join(TEXTS * 10), "utf-8-sig")
    monkeypatch.setattr(calibration_text, "PIECE_CHARACTERS", 64)  # read in several pieces
    (text,) = texts_of(path)
    assert text.strip() == "\n".join(TEXTS * 10)


def test_blank_texts_are_passed_over() -> None:
    assert texts_of(["", TEXTS[0], " \n", {"text": ""}, TEXTS[1]]) == TEXTS[:2]


@pytest.mark.parametrize(
    "record",
    [
        {"content": "other", "text": "The text."},
        {"messages": None, "prompt": "other", "completion": "other", "text": "The text."},
        {"messages": None, "prompt": "The ", "completion": "text."},
        {"messages": None, "prompt": None, "completion": None, "chosen": "The text."},
        {"body": "The text."},
    ],
)
def test_the_first_format_that_a_record_has_is_taken(record: dict) -> None:
    assert texts_of([record]) == ["The text."]


@pytest.mark.parametrize("kind", ["list", "jsonl", "array"])
def test_messages_are_what_the_chat_template_makes_of_them(tmp_path: Path, kind: str) -> None:
    record = {"messages": CHAT, "prompt": CHAT[0]["content"], "id": "a"}
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([record] if kind == "array" else record))
    expected = rendered(CHAT, tiny_tokenizer())
    assert expected.count(tiny_tokenizer().bos_token_id) == 2  # the template begins every message with it
    tokens = calibration_tokens([record] if kind == "list" else path, tiny_tokenizer(), length=len(expected))
    assert tokens.tolist() == [expected]


@pytest.mark.parametrize("end", ["", "</s>", "</s>\n"])
@pytest.mark.parametrize("start", ["", "<s>"])
def test_special_tokens_of_a_template_are_not_doubled(start: str, end: str) -> None:
    template = (
        f"{start}{{% for m in messages %}}{{{{ m['role'] + ': ' + m['content'] }}}} {{% endfor %}}{{{{ '{end}' }}}}"
    )
    tokenizer = templated(template)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    one = rendered(CHAT, tokenizer)
    assert (bos in one, eos in one) == (bool(start), bool(end))
    expected = ([] if start else [bos]) + one + ([] if end else [eos]) + one
    tokens = calibration_tokens([{"messages": CHAT}] * 2, tokenizer, length=len(expected))
    assert tokens.tolist() == [expected]


def test_every_sequence_has_one_start_wherever_it_is_cut() -> None:
    chat = rendered(CHAT, tiny_tokenizer())
    bos, eos = tiny_tokenizer().bos_token_id, tiny_tokenizer().eos_token_id
    second = chat.index(bos, 1)
    tokens = calibration_tokens([{"messages": CHAT}] * 3, tiny_tokenizer(), length=second)
    # The second message starts the second sequence, with the token that the template wrote.
    assert tokens[:2].tolist() == [chat[:second], (chat[second:] + [eos] + chat)[:second]]
    for length in range(2, 20):
        tokens = calibration_tokens([{"messages": CHAT}] * 3, tiny_tokenizer(), length=length)
        assert (tokens[:, 0] == bos).all() and not (tokens[:, 1] == bos).any()


def test_content_is_the_templates_affair() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "small?"}]}]
    calls = [*parts, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "measure"}}]}]
    tokenizer = templated(
        "{% for m in messages %}{% for p in m['content'] or [] %}{{ p['text'] }}{% endfor %}"
        "{% for c in m['tool_calls'] or [] %} -> {{ c['function']['name'] }}{% endfor %}{% endfor %}"
    )
    assert texts_of([{"messages": parts}, {"messages": calls}], tokenizer) == [
        "Is it small?",
        "Is it small? -> measure",
    ]


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ messages[5]['content'] }}", "no element 5"),
        ("{% for %}", "chat template"),
    ],
)
def test_messages_that_the_template_rejects(tmp_path: Path, template: str | None, names: Any) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"text": "plain"}) + "\n" + json.dumps({"messages": CHAT}))
    with pytest.raises(ValueError, match=naming("line 2", path, names)):
        texts_of(path, templated(template))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("allenai/c4:en@validation", ("allenai/c4", "en", "validation")),
        ("allenai/c4:en", ("allenai/c4", "en", "train")),
        ("owner/data.v1@test", ("owner/data.v1", None, "test")),
        ("wikitext", ("wikitext", None, "train")),
    ],
)
def test_names_of_data_sets(monkeypatch: pytest.MonkeyPatch, name: str, expected: tuple) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple] = []

    def load_dataset(path: str, config: str | None, split: str, streaming: bool) -> list[dict]:
        assert streaming
        asked.append((path, config, split))
        return [{"label": 1, "text": text} for text in TEXTS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of(name) == TEXTS
    assert asked == [expected]


def test_no_more_of_a_data_set_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield {"text": TEXTS[0]}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: endless())
    assert calibration_tokens("owner/endless", tiny_tokenizer(), samples=3, length=20).shape == (3, 20)
    assert read <= 4 * 3 * 20


def test_a_data_set_that_cannot_be_read() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match=naming("owner/nothing")):
        texts_of("owner/nothing")


def test_the_library_for_data_sets_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=naming("owner/name", "datasets", "impart-hf[calibration]")):
        texts_of("owner/name")


@pytest.mark.parametrize("lost", [(), ("bos_token",), ("eos_token",), ("bos_token", "eos_token")])
def test_sequences_are_the_joined_texts_cut_to_length(lost: tuple[str, ...]) -> None:
    tokenizer, length = without(*lost), 16
    start = [] if "bos_token" in lost else [tokenizer.bos_token_id]
    end = [] if "eos_token" in lost else [tokenizer.eos_token_id]
    stream = encoded(TEXTS[0]) + end + encoded(TEXTS[1]) + end + encoded(TEXTS[2])
    step = length - len(start)
    expected = [start + stream[i : i + step] for i in range(0, len(stream) - step + 1, step)]
    assert len(expected) > 1
    tokens = calibration_tokens(TEXTS, tokenizer, samples=100, length=length)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == expected


def test_pieces_of_a_file_are_joined_without_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(numbered(20)))
    monkeypatch.setattr(calibration_text, "PIECE_CHARACTERS", 100)
    tokens = calibration_tokens(path, tiny_tokenizer(), length=32)
    assert tiny_tokenizer().eos_token_id not in tokens
    assert tokens[:, 1:].flatten().tolist() == encoded(path.read_text())[: tokens[:, 1:].numel()]


def test_draws_follow_the_seed() -> None:
    def drawn(seed: int) -> torch.Tensor:
        return calibration_tokens(numbered(200), tiny_tokenizer(), samples=8, length=32, seed=seed)

    everything = calibration_tokens(numbered(200), tiny_tokenizer(), samples=1000, length=32).tolist()
    one = drawn(0)
    assert one.shape == (8, 32)
    assert torch.equal(one, drawn(0))
    assert not torch.equal(one, drawn(1))
    assert (one[:, 0] == tiny_tokenizer().bos_token_id).all()
    places = [everything.index(sequence) for sequence in one.tolist()]
    assert places == sorted(set(places)) and places[-1] < 4 * 8


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("", "no text"),
        (" \n\n", "no text"),
        ('{"text": "good"}\n{"text": ', ("line 2", "JSON")),
        ('{"text": "good"}\n{"text": 7}', ("line 2", "text")),
        ('{"title": "text", "body": "text"}', ("line 1", "title", "body", "--text-field", "'text'")),
        ("{}", ("line 1", "fields")),
        ('["good", 7]', ("record 1", 7)),
        ('{"prompt": "one", "id": "two"}', ("line 1", "prompt", "id")),
        ('{"prompt": "one", "completion": 7}', ("line 1", "'prompt'", "'completion'")),
        ('{"prompt": "one", "completion": null}', ("line 1", "'prompt'", "'completion'")),
        ('{"prompt": [1], "completion": "two"}', ("line 1", "message 0", "'prompt'")),
        ('{"messages": "hello"}', ("line 1", "'messages'", "'hello'")),
        ('{"messages": {"role": "user", "content": "a"}}', ("line 1", "'messages'", "{'role'")),
        ('{"messages": []}', ("line 1", "'messages'", "[]")),
        ('{"messages": ["hello", 7]}', ("message 0", "line 1", "'hello'")),
        ('{"messages": [[{"role": "user", "content": "a"}]]}', ("message 0", "line 1", "'role'")),
        ('{"messages": [{"content": "a"}]}', ("message 0", "line 1", "'role'")),
        ('[{"messages": [{"role": 1, "content": "a"}]}]', ("message 0", "record 0", "'role'")),
        ('{"messages": [{"role": "user", "text": "a"}]}', ("message 0", "line 1", "'content'")),
        ('{"messages": [{"role": "user", "content": 7}]}', ("message 0", "line 1", "'content'")),
        ("[]", "no text"),
    ],
)
def test_bad_records(tmp_path: Path, content: str, names: Any) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=naming(path, names)):
        texts_of(path)


@pytest.mark.parametrize("name", ["bytes.txt", "bytes.jsonl"])
def test_bytes_that_are_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 not text")
    with pytest.raises(ValueError, match=naming(tmp_path / name, "UTF-8")):
        texts_of(tmp_path / name)


def test_a_file_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(ValueError, match=naming("table.csv", ".txt", ".jsonl", ".json", ".parquet")):
        texts_of(tmp_path / "table.csv")


@pytest.mark.parametrize("source", [Path("nowhere"), "nowhere/text.txt", "./nowhere", "/nowhere/at/all", "name@"])
def test_a_file_that_is_missing(source: Any) -> None:
    with pytest.raises(FileNotFoundError, match=naming(str(source).removeprefix("./"))):
        texts_of(source)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ([], ("list", "no text")),
        (["", " "], ("list", "no text")),
        (["good", 7], ("entry 1", 7)),
        ([["nested"]], ("entry 0", "['nested']")),
        ([{3: "one", "b": "two"}], ("entry 0", 3, "b")),
        ({"text": "good"}, ("path", "list", "{'text'")),
        (b"bytes", ("path", "list", "b'bytes'")),
        (None, ("path", "list", "None")),
    ],
)
def test_bad_lists(source: Any, names: tuple) -> None:
    with pytest.raises(ValueError, match=naming("text", names)):
        texts_of(source)


def test_public_names_of_texts(tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    assert text_name(tmp_path / "text.txt") == text_name(TextField(tmp_path / "text.txt", "body")) == "text.txt"
    assert text_name("allenai/c4:en@validation") == "allenai/c4:en@validation"
    assert text_name(["one", "two"]) == "2 texts"


def test_too_little_text_says_how_much_there_is() -> None:
    count = len(encoded(TEXTS[0])) + 1  # and the begin-of-text token
    with pytest.raises(ValueError, match=rf"{naming('text')}.*\b{count} tokens.*\b{count} tokens") as caught:
        calibration_tokens(TEXTS[:1], tiny_tokenizer(), length=count + 1)
    assert "text" in str(caught.value)
    assert calibration_tokens(TEXTS[:1], tiny_tokenizer(), length=count).shape == (1, count)


@pytest.mark.parametrize("settings", [{"samples": 0}, {"length": 1}])
def test_settings_that_make_no_sequence(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=naming("sequence", *settings.values())):
        calibration_tokens(TEXTS, tiny_tokenizer(), **settings)


def test_the_built_in_text_is_enough_for_several_sequences() -> None:
    tokens = calibration_tokens(BUILT_IN, tiny_tokenizer(), samples=128, length=2048)
    assert tokens.shape[1] == 128 and len(tokens) >= 4
    assert calibration_tokens(BUILT_IN, tiny_tokenizer(), samples=2, length=16).shape == (2, 16)
    assert text_name(BUILT_IN) == "built-in"
