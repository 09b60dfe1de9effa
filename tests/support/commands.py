"""Running the command line in this process."""

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
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


# Hands its arguments over, and ends with the status that comes back.
_STUB = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "{folder}/arguments"
exit "$(cat "{folder}/status")"
"""


def run_with_commands_here(script: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Run a shell script whose `impart-hf` commands run quietly in this process: one of their own costs 5 s each.

    Args:
        script: the program and its arguments.
        folder: that does not exist yet, for the command that the script finds.
        environment: more environment variables.

    Returns:
        The script's exit status.
    """
    folder.mkdir()
    command, arguments, status = (folder / name for name in ("impart-hf", "arguments", "status"))
    command.write_text(_STUB.format(folder=folder))
    command.chmod(0o755)
    os.mkfifo(arguments)
    os.mkfifo(status)
    path = f"{folder}:{os.environ['PATH']}"
    with subprocess.Popen(script, env={**os.environ, **environment, "PATH": path}) as process:

        def close() -> None:
            """Let go of the loop below once the script has ended."""
            process.wait()
            arguments.open("wb").close()

        threading.Thread(target=close, daemon=True).start()
        while given := arguments.read_bytes():
            status.write_text(str(main([*given.decode().split("\0")[:-1], "--quiet"])))
    return process.returncode
