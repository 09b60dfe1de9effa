"""What a run shows of its stages, on a terminal and in a log."""

import io
import re
import sys

import pytest

from impart_hf.common import progress as module
from impart_hf.common.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace standard error; pytest does so itself before a test, after its fixtures."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the bars, in its only entry."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_when_a_stage_begins_and_one_when_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.plan(["Scanning", "Writing"])
    assert list(progress.track(list(range(500)), "Scanning")) == list(range(500))
    with progress.bar(3, "Writing") as bar:
        bar.show("a tensor")
        bar.update(3)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d+\.\d s", "0 s", line) for line in lines] == [
        "1/2 Scanning", "1/2 Scanning: done in 0 s", "2/2 Writing", "2/2 Writing: done in 0 s",
    ]  # fmt: skip


def test_a_stage_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), Progress().bar(2, "Verifying"):
        raise ValueError
    assert capsys.readouterr().err == "Verifying\n"


def test_nothing_is_shown_quietly_or_by_another_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(enabled: bool) -> str:
        progress = Progress(enabled)
        assert list(progress.track([1, 2], "Verifying")) == [1, 2]
        return capsys.readouterr().err

    assert run(False) == ""
    monkeypatch.setenv("RANK", "1")
    assert run(True) == ""
    monkeypatch.setenv("RANK", "0")
    assert run(True) != ""


def test_a_terminal_has_a_bar_of_the_stage_and_what_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    progress = Progress()
    progress.plan(["Scanning", "Writing"])
    for _ in progress.track(["model.norm.weight"], "Scanning"):
        pass
    assert "1/2 Scanning   0%" in terminal.getvalue() and "model.norm.weight" in terminal.getvalue()
    assert "1/2 Scanning 100%" in terminal.getvalue().splitlines()[-1]


def test_one_stage_has_no_number_and_an_empty_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    progress = Progress()
    progress.plan(["Verifying"])
    assert list(progress.track([], "Verifying")) == []
    assert "Verifying 100%" in terminal.getvalue() and "1/1" not in terminal.getvalue()


def test_later_plans_go_on_where_the_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.plan(["Merging", "Scanning", "Compressing"])
    with progress.bar(1, "Merging"):
        pass
    progress.plan(["Compressing"])  # the scan is known
    with progress.bar(1, "Compressing"):
        pass
    assert capsys.readouterr().err.splitlines()[2] == "2/2 Compressing"


def test_times_left(clock: list[float]) -> None:
    progress = Progress(False)
    progress.plan(["Compressing", "Distilling", "Writing"])
    progress.expect({"Distilling": 3600.0})
    bar = progress.bar(100, "Compressing")
    clock[0] = 60.0
    bar.update(2)
    assert bar.times() == "01:00"  # 2 % are no measure of the rest
    bar.update(18)
    assert bar.times() == "01:00, 04:00 left"  # how long writing takes is not known
    bar.finish()
    progress.expect({"Writing": 60.0})
    bar = progress.bar(300, "Distilling")
    clock[0] += 1.0
    bar.update(100)
    assert bar.times() == "00:01"  # too early
    clock[0] += 9.0
    assert bar.times() == "00:10, 00:20 left, 01:20 left in all"


def test_work_of_an_earlier_run_says_nothing_of_the_speed(clock: list[float]) -> None:
    bar = Progress(False).bar(100, "Decomposing", 80)
    clock[0] = 10.0
    bar.update(10)
    assert bar.times() == "00:10, 00:10 left"


def test_equal_parts_of_a_stage_are_yet_to_come(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.plan(["Distilling", "Writing"])
    progress.expect({"Writing": 1.0})
    bar = progress.part("layers 1 to 2 of 6", 2).bar(10, "Distilling")
    clock[0] = 5.0
    bar.update(5)
    assert bar.times() == "00:05, 00:25 left, 00:26 left in all"
    bar.finish()
    assert capsys.readouterr().err.splitlines()[0] == "1/2 Distilling layers 1 to 2 of 6"


def test_rounded_fractions_do_not_overflow_a_bar(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    terminal = on_terminal(monkeypatch)
    with Progress().bar(0.3, "Compressing") as bar:
        bar.update(0.1 + 0.2)
        bar.update(0.1)
    assert not recwarn.list and "100%" in terminal.getvalue()
