"""What the demos have in common: commands shown as a user types them, headings and tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from impart_hf.cli.main import main as impart_hf


def heading(title: str) -> None:
    print(f"\n== {title}", flush=True)


def step(title: str, command: list[str]) -> None:
    """Run one impart-hf command, and print it as a user would type it; a command that fails ends the demo."""
    heading(title)
    print(f"$ impart-hf {' '.join(command)}", flush=True)
    if impart_hf(command) != 0:
        sys.exit(1)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first of which are the headings; all columns but the first are aligned on the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:
        print(row[0].ljust(first) + "".join(cell.rjust(width + 4) for cell, width in zip(row[1:], widths, strict=True)))
