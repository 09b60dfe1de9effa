"""The setting that says which deltas a server offers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.messages import naming

from impart_hf.serving.catalogue import BASE, Catalogue, NamedDelta


def names(catalogue: Catalogue) -> dict[str, tuple[str | None, str | None]]:
    return {name: (delta.repo, delta.revision) for name, delta in catalogue.offered().items()}


def test_entries() -> None:
    catalogue = Catalogue(" math=user/math-delta@v1 ,code=user/code-delta,, ")
    assert names(catalogue) == {
        BASE: (None, None),
        "math": ("user/math-delta", "v1"),
        "code": ("user/code-delta", None),
    }
    assert names(Catalogue("")) == {BASE: (None, None)}


def test_folder_is_looked_at_every_time(tiny_repository: Path, tmp_path: Path) -> None:
    catalogue = Catalogue(str(tmp_path))
    assert list(names(catalogue)) == [BASE]
    shutil.copytree(tiny_repository, tmp_path / "b")
    shutil.copytree(tiny_repository, tmp_path / "a@1")
    shutil.copytree(tiny_repository, tmp_path / ".being written")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert names(catalogue) == {
        BASE: (None, None),
        "a@1": (str(tmp_path / "a@1"), None),
        "b": (str(tmp_path / "b"), None),
    }
    shutil.rmtree(tmp_path / "b")
    assert "b" not in names(catalogue)


def test_folder_with_an_at_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "delta@2").mkdir()
    assert names(Catalogue(f"mine={tmp_path / 'delta@2'}"))["mine"] == (str(tmp_path / "delta@2"), None)


def test_delta_that_the_engine_was_started_on(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_repository, tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    started_on = NamedDelta("one", "one/")
    assert names(Catalogue(os.curdir, started_on))["one"] == (str(tmp_path / "one"), None)
    assert list(names(Catalogue("two=user/two", started_on))) == [BASE, "one", "two"]


@pytest.mark.parametrize(
    "setting, names",
    [
        ("user/delta", ("'user/delta'", "NAME=REPO", "folder")),
        ("=user/delta", ("'=user/delta'", "NAME=REPO")),
        ("math=", ("'math='", "NAME=REPO")),
        ("math=user/delta@", ("'math=user/delta@'", "NAME=REPO")),
        ("math=user/one,math=user/two", ("'math'", "user/one", "user/two")),
        ("base=user/one", ("'base'", "user/one")),
    ],
)
def test_bad_settings(setting: str, names: tuple) -> None:
    with pytest.raises(ValueError, match=naming(names)):
        Catalogue(setting)


def test_two_folders_with_one_name(tiny_repository: Path, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shutil.copytree(tiny_repository, tmp_path / folder / "same")
    with pytest.raises(ValueError, match=naming("'same'", tmp_path / "x" / "same", tmp_path / "y" / "same")):
        Catalogue(f"{tmp_path / 'x'},{tmp_path / 'y'}")
