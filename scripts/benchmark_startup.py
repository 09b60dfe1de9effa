"""Processor time of the command line before any work: help, version and usage errors of every command.

    python scripts/benchmark_startup.py

The peer is `python -c pass`, which no command can be faster than. Times are user and system time of a whole process,
the shortest of several runs.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Sequence

import measure

from impart_hf.cli.main import COMMANDS, Group

USAGE_ERRORS = (["no-such-command"], ["compress", "a", "b", "c", "--no-such-option"], ["compress", "a"])


def processor_seconds(command: Sequence[str]) -> float:
    """User and system time of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_startup.py", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the shortest counts (default: 3)")
    options = parser.parse_args(argv)
    lines = [["--help"], ["--version"], *USAGE_ERRORS]
    for name, entry in COMMANDS.items():
        subcommands = [[name, inner] for inner in entry.commands] if isinstance(entry, Group) else []
        lines += [[*command, "--help"] for command in ([name], *subcommands)]
    commands = {"python -c pass": [sys.executable, "-c", "pass"]}
    commands |= {" ".join(["impart-hf", *line]): [sys.executable, "-m", "impart_hf.cli", *line] for line in lines}
    rows = [
        {"command": name, "seconds": min(processor_seconds(command) for _ in range(options.repeats))}
        for name, command in commands.items()
    ]
    print(measure.machine_line("cpu"))
    print(measure.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
