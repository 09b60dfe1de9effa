"""The plot of a repository in its own folder: `--card-plot` of compress and inspect."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support.commands import failure
from support.messages import naming
from support.tiny_models import Pair, same_files

from impart_hf.cli.main import main
from impart_hf.modeling.model_files import CheckpointError
from impart_hf.repository.card_plot import PICTURE, add_card_plot

pytest.importorskip("matplotlib")


def _links(folder: Path) -> list[str]:
    return re.findall(r"^!\[.*\]\((.*)\)$", (folder / "README.md").read_text(), re.MULTILINE)


def test_a_plot_is_added_and_replaced(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = (repository / "README.md").read_text()
    assert main(["inspect", str(repository), "--card-plot"]) == 0
    picture = repository / PICTURE
    assert picture.read_bytes().startswith(b"\x89PNG") and _links(repository) == [PICTURE]
    assert (repository / "README.md").read_text().startswith(card.rstrip())
    picture.write_bytes(b"old")
    moved = card.replace("# ", f"![mine]({PICTURE})\n\n# ", 1)  # a link that the publisher has put elsewhere
    (repository / "README.md").write_text(moved)
    assert main(["inspect", str(repository), "--card-plot", "--json"]) == 0
    assert picture.read_bytes() != b"old" and (repository / "README.md").read_text() == moved
    assert "tensor" in capsys.readouterr().out
    assert main(["verify", str(repository), "--quiet"]) == 0


@pytest.mark.parametrize("settings", [("--method", "lowrank", "--ratio", "4"), ("--method", "exact")])
def test_compress_makes_it_without_counting_it(tiny_pair: Pair, tmp_path: Path, settings: tuple[str, ...]) -> None:
    pair = (str(tiny_pair.base), str(tiny_pair.finetuned))
    for name, more in (("plain", ()), ("shown", ("--card-plot",))):
        assert main(["compress", *pair, str(tmp_path / name), *settings, "--quiet", *more]) == 0
    shown = tmp_path / "shown"
    assert _links(shown) == [PICTURE] and (shown / PICTURE).is_file()
    text = (shown / "README.md").read_text()
    (shown / PICTURE).unlink()
    (shown / "README.md").write_text(text[: text.index("\n![")].rstrip("\n") + "\n")
    plain = tmp_path / "plain" / "README.md"
    plain.write_text(plain.read_text().rstrip("\n") + "\n")
    assert same_files(tmp_path / "plain", shown)  # its sizes and ratio, too


def test_without_matplotlib_nothing_is_done(
    tiny_pair: Pair,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path.name: path.read_bytes() for path in repository.iterdir()}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "out"
    for command in (
        ("compress", tiny_pair.base, tiny_pair.finetuned, out, "--card-plot"),
        ("inspect", repository, "--card-plot"),
    ):
        assert "impart-hf[plot]" in failure(capsys, *command)
    assert not out.exists() and before == {path.name: path.read_bytes() for path in repository.iterdir()}


def test_what_has_no_card_to_show_it(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "user/delta" in failure(capsys, "inspect", "user/delta", "--card-plot")
    with pytest.raises(CheckpointError, match=naming("user/delta")):
        add_card_plot("user/delta")
    (repository / "README.md").unlink()
    with pytest.raises(CheckpointError, match=naming("README.md")):
        add_card_plot(repository)
    assert not (repository / PICTURE).exists()


def test_a_forecast_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--card-plot" in failure(capsys, "compress", "user/a", "user/b", "out", "--dry-run", "--card-plot")
