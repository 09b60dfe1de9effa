"""Files of JSON lines that grow line by line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.messages import naming

from impart_hf.common.json_lines import JsonLines, read_json_lines


def test_lines_are_there_when_they_are_appended(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "lines.jsonl")
    assert file.lines == []
    for number in range(3):
        file.append({"number": number, "text": "ä\u2028"})
        assert read_json_lines(tmp_path / "lines.jsonl") == file.lines
    assert JsonLines(tmp_path / "lines.jsonl").lines == [{"number": n, "text": "ä\u2028"} for n in range(3)]


@pytest.mark.parametrize("rest", [b'{"a": 2', b'{"a": 2}', "ä".encode()[:1]])
def test_an_incomplete_last_line_is_dropped(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + rest)
    assert read_json_lines(path) == [{"a": 1}]
    JsonLines(path).append({"a": 3})
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("line", [b"[1]\n", b"nothing\n", b"\xff\n"])
def test_another_line_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line)
    with pytest.raises(ValueError, match=naming("lines.jsonl", 2)):
        JsonLines(path)
