"""What files say of models to others: no paths of this machine but that of a base without another name."""

from __future__ import annotations

from pathlib import Path

import pytest

from impart_hf.common.names import is_on_hub, public_name, recorded_base


def test_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tuned@v1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert public_name(str(folder)) == public_name(".") == "tuned@v1"
    assert public_name("user/tuned@v1") == public_name("user/tuned") == "user/tuned"


def test_recorded_base(tmp_path: Path) -> None:
    assert recorded_base("user/base", "abc", None) == ("user/base", "abc")
    assert recorded_base(str(tmp_path), None, None) == (str(tmp_path), None)
    assert recorded_base(str(tmp_path), None, "user/base") == ("user/base", None)
    assert is_on_hub("user/base") and not is_on_hub(str(tmp_path))
    with pytest.raises(ValueError, match="base_name"):
        recorded_base(str(tmp_path), None, "no/valid/id")
