"""Work that is shared out among the processes of a job."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from impart_hf.common import processes

PROGRAM = """
import os, signal, sys
from impart_hf.common import processes

def work():
    if processes.number() == 1 and "fail" in sys.argv:
        raise ValueError("no room")
    if processes.number() == 1 and "die" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * processes.number()

if "other" in sys.argv and processes.number() == 1:
    processes.__version__ = "0.0.1"
try:
    processes.connect(on_cpu=True)
    results = processes.together(work)
    first = processes.in_first(lambda: f"from {processes.number()}")
    own = processes.each(lambda: open(__file__).fileno() > 0)  # the result is not sent
    text = f"{results} {first} {processes.from_first(processes.number())} {own}"
except (ValueError, processes.ProcessError) as error:
    text = f"{type(error).__name__}: {error}"
with open(f"{sys.argv[1]}/{processes.number()}", "w") as file:
    file.write(text)
"""


def launched(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    program = folder / "program.py"
    program.write_text(PROGRAM, "utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*launcher, str(program), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def texts(folder: Path) -> list[str]:
    return [(folder / str(number)).read_text("utf-8") for number in range(3)]


@pytest.mark.process
def test_results_reach_every_process(tmp_path: Path) -> None:
    assert launched(tmp_path).returncode == 0
    assert texts(tmp_path) == ["[0, 10, 20] from 0 0 True"] * 3


@pytest.mark.process
def test_an_error_is_raised_everywhere_with_the_name_of_its_process(tmp_path: Path) -> None:
    launched(tmp_path, "fail")
    first, failed, last = texts(tmp_path)
    assert failed == "ValueError: no room"
    assert first == last
    assert first.startswith("ProcessError: process 1 of 3 failed on ")
    assert first.endswith(": no room")


@pytest.mark.process
def test_a_killed_process_ends_the_others_and_is_named(tmp_path: Path) -> None:
    result = launched(tmp_path, "die")
    assert result.returncode != 0
    assert "rank      : 1" in result.stderr
    assert "SIGKILL" in result.stderr


@pytest.mark.process
def test_processes_with_other_versions_are_refused(tmp_path: Path) -> None:
    launched(tmp_path, "other")
    first, *others = texts(tmp_path)
    assert "runs 0.0.1: install the same versions everywhere" in first
    assert first.startswith("ValueError: process 0 on ")
    assert all(text.startswith("ProcessError: process 0 of 3 failed on ") for text in others)


def test_one_process_works_alone() -> None:
    assert processes.together(lambda: 3) == [3]
    assert processes.in_first(lambda: "done") == "done"
    processes.connect(on_cpu=True)  # nothing to connect to

    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        processes.together(fail)
    with pytest.raises(OSError, match="full"):
        processes.each(fail)


def test_shares_hold_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most costly are dealt out first, so that the shares take about as long."""
    costs = {"a": 1, "b": 8, "c": 3, "d": 7, "e": 2}
    assert processes.share(costs, costs.__getitem__) == list("abcde")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.share(costs, costs.__getitem__) == ["b", "c", "a"]
    monkeypatch.setenv("RANK", "1")
    assert processes.share(costs, costs.__getitem__) == ["d", "e"]


def test_versions_are_compared_with_those_of_the_first_process() -> None:
    own = {"host": "a", "torch": "2", "numpy": "1"}
    processes.check_versions([own, own | {"host": "b"}])
    with pytest.raises(ValueError, match=r"process 0 on a runs torch 2, process 2 on c runs 3: install the same"):
        processes.check_versions([own, own, own | {"host": "c", "torch": "3"}])


def test_a_process_that_ends_during_a_broadcast_is_an_error_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "broadcast", closed)
    with pytest.raises(processes.ProcessError, match="another process has ended"):
        processes.broadcast(torch.zeros(1), 0)
