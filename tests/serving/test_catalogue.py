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
        ("math=/no/such/folder", ("/no/such/folder", "neither", "Hub id")),
        ("math=no-folder", ("'no-folder'", "neither", "Hub id")),
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


class TestFind:
    def test_by_name_folder_and_id(self, tiny_repository: Path, tmp_path: Path) -> None:
        tenants = tmp_path / "tenants"
        tenants.mkdir()
        shutil.copytree(tiny_repository, tenants / "one")
        catalogue = Catalogue(f"{tenants},math=user/math@v1,mine={tiny_repository}")
        one, mine = NamedDelta("one", str(tenants / "one")), NamedDelta("mine", str(tiny_repository))
        assert catalogue.find(BASE) == NamedDelta(BASE, None)
        for name in ("one", str(tenants / "one")):
            assert catalogue.find(name) == one
        assert catalogue.find("mine") == catalogue.find(str(tiny_repository)) == mine
        assert catalogue.find("math") == catalogue.find("user/math") == NamedDelta("math", "user/math", "v1")

    def test_nothing_else(self, tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tenants = tmp_path / "tenants"
        shutil.copytree(tiny_repository, tenants / "sub" / "one")
        shutil.copytree(tiny_repository, tenants / ".hidden")
        shutil.copytree(tiny_repository, tmp_path / "outside")
        (tenants / "link").symlink_to(tmp_path / "outside")
        monkeypatch.chdir(tmp_path)
        catalogue = Catalogue(str(tenants))
        names = ["user/x", "../outside", "sub/one", ".hidden", "..", "", "tenants/sub/one", "x" * 5000, "a\0b", "/a\0"]
        names += ["/\ud800", f"{tenants}/./sub/one", f"{tenants}//link"]
        for name in [*names, str(tmp_path / "outside"), str(tenants / ".hidden"), str(tenants / "sub" / "one")]:
            assert catalogue.find(name) is None, name

    def test_what_is_allowed(self, tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("tenants/one", "others/one", "user/here"):
            shutil.copytree(tiny_repository, tmp_path / name)
        (tmp_path / "tenants" / "out").symlink_to(tmp_path / "others" / "one")
        monkeypatch.chdir(tmp_path)
        catalogue = Catalogue("", allowed=f"user/*, {tmp_path}/tenants/*")
        assert catalogue.find("user/math") == NamedDelta("user/math", "user/math")
        place = str(tmp_path / "tenants" / "one")
        assert catalogue.find(place) == NamedDelta(place, place)
        nested = shutil.copytree(tiny_repository, tmp_path / "tenants" / "sub" / "one")
        others = [
            "users/math",
            "user",
            "user/here",
            "user/../x",
            "user/a/b",
            str(tmp_path / "others" / "one"),
            str(nested),
        ]
        for name in [*others, str(tmp_path / "tenants" / "out"), f"{tmp_path}/tenants/../others/one"]:
            assert catalogue.find(name) is None, name
        assert Catalogue("").find("user/math") is None

    def test_patterns_of_ids_permit_no_folders(self, tiny_repository: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_repository, tmp_path / "user" / "math-delta")
        catalogue = Catalogue("", allowed="*/math-delta, */*")
        assert catalogue.find("any/math-delta") is not None
        assert catalogue.find(str(tmp_path / "user" / "math-delta")) is None

    def test_relative_folder_is_never_a_hub_id(
        self, tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its children's paths look like ids."""
        shutil.copytree(tiny_repository, tmp_path / "deltas" / "one")
        monkeypatch.chdir(tmp_path)

        def fetch(*arguments: object, **_: object) -> None:
            raise AssertionError(f"fetched {arguments}")

        monkeypatch.setattr("impart_hf.modeling.model_files.hf_hub_download", fetch)
        for setting in ("deltas", "./deltas"):
            catalogue = Catalogue(setting)
            assert catalogue.find("one") == NamedDelta("one", str(tmp_path / "deltas" / "one"))
            assert catalogue.find("evil") is None
            monkeypatch.chdir("/")
            assert catalogue.find("one") is not None
            monkeypatch.chdir(tmp_path)

    def test_labels_that_clients_cannot_make_up(self, tiny_repository: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_repository, tmp_path / "one")
        catalogue = Catalogue(f"{tmp_path},math=user/math", allowed="org/*")
        assert [catalogue.label(name) for name in (BASE, "one", "math")] == [BASE, "one", "math"]
        assert {catalogue.label(name) for name in ("org/x", "two", str(tmp_path / "one"), "../one")} == {"others"}

    def test_name_of_another_model(self) -> None:
        with pytest.raises(ValueError, match=naming("'math'", "another")):
            Catalogue("math=user/math").check_names({"math", "x"})
