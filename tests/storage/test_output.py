"""Which folders may be written to, for each of the two kinds of output."""

from __future__ import annotations

from pathlib import Path

import pytest

from impart_hf.common.files import OutputError
from impart_hf.storage.output import check_output


@pytest.mark.parametrize("replaces_delta", [False, True])
def test_free_places(tmp_path: Path, replaces_delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "missing", "missing/below"):
        assert check_output(name, replaces_delta=replaces_delta) == tmp_path / name


@pytest.mark.parametrize("replaces_delta", [False, True])
def test_places_that_are_taken(tmp_path: Path, replaces_delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("file", "link", "full", ".", "file/below", "x" * 300):
        with pytest.raises(OutputError, match=str(tmp_path / name)):
            check_output(name, replaces_delta=replaces_delta)


def test_only_a_delta_repository_makes_room_for_another(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "delta_compressed"}')
    assert check_output(tmp_path, replaces_delta=True) == tmp_path
    with pytest.raises(OutputError, match="not an empty folder"):
        check_output(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OutputError, match="not a delta repository"):
        check_output(tmp_path, replaces_delta=True)
