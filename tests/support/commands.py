"""Running the command line in this process."""

from pathlib import Path

import pytest

from impart_hf.cli.main import main


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("impart-hf: error: ")
    return line
