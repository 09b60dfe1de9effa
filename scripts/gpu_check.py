"""Check and measure everything that an accelerator does, in at most eight minutes on one GPU.

Needs PyTorch with CUDA, transformers and accelerate, and uses Triton, PEFT and pytest where they are; no network, and
the package need not be installed. Sections are in the order of their worth: the first minute says whether everything
works, so that a run that is cut short is worth something. On a GPU each section has a process of its own, so that
neither a hang nor an error that leaves the device unusable ends the others. The JSON is written after every row.

Without a GPU, --small tries the script out on the CPU: kernels run in Triton's interpreter, and no time is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Triton reads this when transformers imports it.
os.environ.setdefault("TRITON_INTERPRET", str(int(not os.path.exists("/dev/nvidiactl"))))

import measure
import torch
from gpu_correctness import checks
from gpu_material import Notes
from gpu_timings import apply, decode, encode, load, more

# The sections, each with the share of all time by whose end it should be done.
SECTIONS = {
    "checks": (checks, 0.16),
    "decode": (decode, 0.34),
    "encode": (encode, 0.5),
    "load": (load, 0.76),
    "apply": (apply, 0.9),
    "more": (more, 1.0),
}
_GRACE = 10  # seconds after its time before a section's process is ended


def write_atomically(path: Path, content: Any) -> None:
    waiting = path.with_name(path.name + ".part")
    waiting.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(waiting, path)


def run_here(name: str, seconds: float, small: bool, save: Any) -> None:
    """Run a section in this process; `save` gets its content after every row."""
    notes = Notes(name, seconds, small, save)
    notes.attempt(name, SECTIONS[name][0])
    save(notes.content)


def run_apart(name: str, seconds: float, small: bool, save: Any) -> None:
    """Run a section in a process of its own, and end it if it takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--out", str(out)]
        command += ["--seconds", str(seconds), *(["--small"] if small else [])]
        failure = ""
        process = subprocess.Popen(command, start_new_session=True)
        try:
            if code := process.wait(seconds + _GRACE):
                failure = f"the section's process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            failure = f"the section's process was ended after {seconds + _GRACE:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
        content = json.loads(out.read_text("utf-8")) if out.exists() else Notes(name, 0, small, lambda _: None).content
        if failure:
            content["failures"].append({"what": name, "traceback": [failure]})
            print(f"[{name}] FAILED: {failure}", flush=True)
        save(content)


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the sections and return the content of the JSON file."""
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"machine": measure.machine(device), "small": arguments.small, "sections": {}}
    for name in arguments.sections:
        began, share = time.monotonic(), SECTIONS[name][1]

        def save(content: dict[str, Any], name: str = name, began: float = began) -> None:
            section = {"seconds": round(time.monotonic() - began, 1), "succeeded": not content["failures"]}
            results["sections"][name] = section | content
            results["seconds"] = round(time.monotonic() - started, 1)
            write_atomically(arguments.out, results)

        seconds = share * arguments.seconds - (began - started)
        print(f"== {name}: {max(0, seconds):.0f} s", flush=True)
        if seconds < 10:
            save({"tables": {}, "goals": [], "failures": [], "left_out": [{"what": name, "why": "no time left"}]})
        else:
            (run_apart if arguments.apart else run_here)(name, seconds, arguments.small, save)
    return results


def summary(results: dict[str, Any]) -> str:
    """Return the tables, the goals and what failed, as markdown."""
    lines = ["Machine: " + ", ".join(f"{name} {value}" for name, value in results["machine"].items())]
    goals, failures, left_out = [], [], []
    for name, section in results["sections"].items():
        for title, rows in section["tables"].items():
            columns = dict.fromkeys(column for row in rows for column in row)
            table = measure.table([dict.fromkeys(columns, "") | row for row in rows])
            lines += ["", f"{name}: {title}", "", table]
        goals += section["goals"]
        failures += [f"{name}: {f['what']}: {f['traceback'][0]}" for f in section["failures"]]
        left_out += [f"{name}: {left['what']}: {left['why']}" for left in section["left_out"]]
    if goals:
        lines += ["", "Goals", "", measure.table(goals)]
    for title, items in (("Left out", left_out), ("Failed", failures)):
        if items:
            lines += ["", title, "", *(f"* {item}" for item in items)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="default: gpu_check.json")
    parser.add_argument("--seconds", type=float, default=450, help="time for all sections (default: 450)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try out the script")
    parser.add_argument(
        "--sections", type=lambda text: text.split(","), default=list(SECTIONS), metavar="NAMES",
        help=f"comma-separated, of {','.join(SECTIONS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--apart", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="run each section in a process of its own (default: on a GPU)",
    )  # fmt: skip
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() and not arguments.small:
        parser.error("there is no CUDA device: give --small to try the script out on the CPU")
    if unknown := [name for name in arguments.sections if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]}; choose of {', '.join(SECTIONS)}")
    if arguments.worker:
        write = lambda content: write_atomically(arguments.out, content)  # noqa: E731
        run_here(arguments.worker, arguments.seconds, arguments.small, write)
        return 0
    results = check(arguments)
    print("\n" + summary(results))
    return 0 if all(section["succeeded"] for section in results["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
