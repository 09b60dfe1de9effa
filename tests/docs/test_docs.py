"""The documents name what exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_pictures_exist_and_nothing_is_left_to_fill_in(document: Path) -> None:
    text = document.read_text("utf-8")
    for name in re.findall(r"\b(?:docs|scripts|tests|modeling|impart_hf)/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (document.parent / picture).exists(), picture
    assert not re.findall(r"^[A-Z]+_[A-Z]+$", text, re.MULTILINE)
