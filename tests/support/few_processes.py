"""Benchmarks without the processes that they start: one costs five seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.load_script import load_script


def avoid_processes(patch: pytest.MonkeyPatch) -> None:
    """Let a script's first task have a process of its own, as always, and others be done here.

    mergekit always has its own: it changes libraries that it imports.
    """
    measure = load_script("measure")
    in_fresh_process, started = measure.in_fresh_process, []

    def run(script: str, task: dict[str, Any]) -> dict[str, Any]:
        if not started or task.get("tool") == "mergekit":
            started.append(script)
            return in_fresh_process(script, task)
        results: list[dict[str, Any]] = []
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(measure, "report_result", results.append)
            assert load_script(Path(script).stem).main(["--worker", json.dumps(task)]) == 0
        return json.loads(json.dumps(results[0]))

    patch.setattr(measure, "in_fresh_process", run)
