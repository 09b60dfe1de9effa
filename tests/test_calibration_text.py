"""Calibration text: every kind of source gives the sequences that its text stands for, every bad one a clear error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_tokenizer

from impart_hf import calibration_text
from impart_hf.calibration_text import calibration_tokens, read_texts

TEXTS = ["The first text is a short one.", "Ünïcode in the second.", "A third,\nof two lines."]


def numbered(count: int) -> list[str]:
    """Texts without two equal stretches of a few tokens."""
    return [f"{number} is the number; " * 3 for number in range(count)]


def encoded(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


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
    (tmp_path / "only.jsonl").write_text("\n".join(json.dumps({"body": text, "likes": 1}) for text in TEXTS))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return {
        **{path.name: path for path in tmp_path.iterdir()},
        "string path": str(tmp_path / "lines.jsonl"),
        "list": TEXTS,
        "tuple": tuple(TEXTS),
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
        "folder",
        "string path",
        "list",
        "tuple",
    ],
)
def test_every_kind_of_source_gives_its_texts(sources: dict[str, Any], kind: str) -> None:
    if kind == "folder":
        pytest.importorskip("datasets")
    assert read_texts(sources[kind]) == TEXTS


def test_a_text_file_is_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n" + "\n".join(TEXTS * 10), "utf-8-sig")
    monkeypatch.setattr(calibration_text, "_PIECE_CHARACTERS", 64)  # read in several pieces
    (text,) = read_texts(path)
    assert text.strip() == "\n".join(TEXTS * 10)


def test_blank_texts_are_passed_over() -> None:
    assert read_texts(["", TEXTS[0], " \n", TEXTS[1]]) == TEXTS[:2]


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
    assert read_texts(name) == TEXTS
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
    with pytest.raises(FileNotFoundError, match="'owner/nothing' is neither a file, nor a folder"):
        read_texts("owner/nothing")


def test_the_library_for_data_sets_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'impart-hf\[calibration\]'"):
        read_texts("owner/name")


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
    monkeypatch.setattr(calibration_text, "_PIECE_CHARACTERS", 100)
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
    ("content", "message"),
    [
        ("", "holds no text"),
        (" \n\n", "holds no text"),
        ('{"text": "good"}\n{"text": ', "line 2 of .* is not valid JSON"),
        ('{"text": "good"}\n{"text": 7}', "line 2 of .* has neither a text"),
        ('{"one": "text", "two": "text"}', "line 1 of .* has neither a text under 'text' or 'content' nor just one"),
        ('["good", 7]', "record 1 of .* has neither"),
        ("[]", "holds no text"),
    ],
)
def test_bad_records(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


@pytest.mark.parametrize("name", ["bytes.txt", "bytes.jsonl"])
def test_bytes_that_are_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 not text")
    with pytest.raises(ValueError, match=f"{name}' is not UTF-8"):
        read_texts(tmp_path / name)


def test_a_file_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"none of the types \.txt, \.jsonl, \.json"):
        read_texts(tmp_path / "table.csv")


@pytest.mark.parametrize("source", [Path("nowhere"), "nowhere/text.txt", "./nowhere", "/nowhere/at/all", "name@"])
def test_a_file_that_is_missing(source: Any) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_texts(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the list holds no text"),
        (["", " "], "the list holds no text"),
        (["good", 7], "entry 1 of the list is 7, not a string"),
        ([["nested"]], "entry 0 of the list"),
        (b"bytes", "must be a path, a data set's name or a list of strings"),
        (None, "must be a path"),
    ],
)
def test_bad_lists(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_texts(source)


def test_too_little_text_says_how_much_there_is() -> None:
    count = len(encoded(TEXTS[0]))
    with pytest.raises(ValueError, match=f"has {count} tokens.*sequences of {count + 1} tokens or less") as caught:
        calibration_tokens(TEXTS[:1], tiny_tokenizer(), length=count + 2)
    assert "more text" in str(caught.value)
    assert calibration_tokens(TEXTS[:1], tiny_tokenizer(), length=count + 1).shape == (1, count + 1)


@pytest.mark.parametrize("settings", [{"samples": 0}, {"length": 1}])
def test_settings_that_make_no_sequence(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one sequence of two tokens"):
        calibration_tokens(TEXTS, tiny_tokenizer(), **settings)
