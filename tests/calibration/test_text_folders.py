"""Calibration text in files and folders of several forms: all of it is read, or an error says what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.messages import naming
from support.tiny_models import tiny_tokenizer

from impart_hf.calibration.text import calibration_tokens

TEXTS = ["The first text is a short one.", "The second is another.", "A third."]


def texts_of(source: Path) -> list[str]:
    """All texts of a source, read back from its tokens."""
    tokens = calibration_tokens(source, tiny_tokenizer(), samples=100_000, length=2)
    return tiny_tokenizer().decode(tokens[:, 1]).split(tiny_tokenizer().eos_token)


def test_one_record_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text("\n" + json.dumps({"text": TEXTS[0], "id": 3}, indent=2))
    assert texts_of(tmp_path / "one.json") == TEXTS[:1]


def test_a_folder_with_files_of_several_types(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    (tmp_path / "b.txt").write_text(TEXTS[1])
    datasets.Dataset.from_list([{"body": TEXTS[2]}]).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "picture.png").touch()
    (tmp_path / "README.md").write_text("What the files are.")
    assert sorted(texts_of(tmp_path)) == sorted(TEXTS)


def test_a_folder_with_files_of_several_types_for_training(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name, text in (("train.jsonl", TEXTS[0]), ("train-2.json", TEXTS[1]), ("test.jsonl", TEXTS[2])):
        (tmp_path / name).write_text(json.dumps({"text": text}))
    (tmp_path / "train.txt").write_text("More.")
    assert sorted(texts_of(tmp_path)) == sorted([*TEXTS[:2], "More."])


def test_the_files_that_a_folders_card_names(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    (tmp_path / "notes.txt").write_text("Not of the data set.")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
    assert texts_of(tmp_path) == TEXTS[:1]


def test_a_folder_without_a_split_for_training(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    with pytest.raises(ValueError, match=naming(tmp_path, "train", "['test']", "files")):
        texts_of(tmp_path)
