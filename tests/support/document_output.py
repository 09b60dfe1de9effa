"""What a document shows, compared with what a command printed."""

from __future__ import annotations

import re

TOLERANCE = 0.1
# With the unit of a size, if there is one
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?: ?([kMG]?B)\b)?")
_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_TIME = re.compile(r"\s*(?:s|min|ms)\b")
_PATH = re.compile(r"(?<![\w.])/[\w./-]+")


def differences(shown: str, printed: str, tolerance: float | None = TOLERANCE) -> list[str]:
    """What of a shown output was not printed: a line for every line of it that cannot be found.

    Lines are looked for in their order, each after the one before it. Spaces do not count, nor do rules of dashes,
    paths from the root, and times, which depend on the machine.

    Args:
        shown: from a document; a line of "…" alone, or at the end of a line, stands for what is left out.
        printed: by a command.
        tolerance: how far numbers may be from those shown, relative to the larger; None takes any number.
    """
    found, rest = [], printed.splitlines()
    for line in filter(str.strip, shown.splitlines()):
        if line.strip() == "…":
            continue
        places = [place for place, other in enumerate(rest) if _same(line, other, tolerance)]
        if places:
            rest = rest[places[0] + 1 :]
            continue
        alike = [other.strip() for other in printed.splitlines() if _same(line, other, None)]
        found.append(f"shown:   {line.strip()}\n  printed: {alike[0] if alike else 'no such line'}")
    return found


def missing_values(source: str, printed: str, count: int | None = None, tolerance: float = TOLERANCE) -> list[str]:
    """The numbers of a table or paragraph that were not printed.

    Args:
        source: Markdown. A row's numbers must be in a printed line that has the text of its first cell.
        printed: by a command.
        count: how many numbers of a paragraph to look for, from its beginning; all, if None.
        tolerance: as for `differences`.
    """
    if not source.lstrip().startswith("|"):
        return _missing(_numbers(source)[:count], printed, tolerance)
    found = []
    for row in source.splitlines()[2:]:
        label, *cells = [cell.strip(" `*") for cell in row.strip().strip("|").split("|")]
        lines = [line for line in printed.splitlines() if label in re.split(r"[\s|]+", line)]
        found += [f"{label}: {value}" for value in _missing(_numbers(" ".join(cells)), "\n".join(lines), tolerance)]
    return found


def updated(shown: str, printed: str) -> str:
    """A shown output with its lines replaced by those that were printed and differ from them in numbers alone."""
    lines, rest = [], printed.splitlines()
    for line in shown.splitlines():
        places = [place for place, other in enumerate(rest) if line.strip() and _same(line, other, None)]
        if not places or _same(line, rest[places[0]], 0.0) or line.rstrip().endswith("…"):
            lines.append(line)
        else:
            lines.append(rest[places[0]].rstrip())
        rest = rest[places[0] + 1 :] if places else rest
    return "\n".join(lines) + "\n"


def _same(line: str, other: str, tolerance: float | None) -> bool:
    """Whether two lines have the same words, and numbers that are close."""
    words, others = _words(line), _words(other)
    if words.endswith("…"):
        words, others = words[:-1].rstrip(), others[: len(words) - 1].rstrip()
    if words != others:
        return False
    pairs = zip(_matches(line), _matches(other), strict=False)
    return tolerance is None or all(
        _TIME.match(line, one.end()) or _close(one.group(), two.group(), tolerance) for one, two in pairs
    )


def _words(line: str) -> str:
    text = _NUMBER.sub("#", _PATH.sub("PATH", line))
    return " ".join(re.sub(r"-{3,}|─+", "-", text).split())


def _matches(line: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(_PATH.sub(lambda path: "P" * len(path.group()), line)))


def _numbers(text: str) -> list[str]:
    return [match.group() for match in _NUMBER.finditer(text)]


def _missing(values: list[str], printed: str, tolerance: float) -> list[str]:
    there = _numbers(printed)
    return [value for value in values if not any(_close(value, other, tolerance) for other in there)]


def _close(one: str, other: str, tolerance: float) -> bool:
    """Whether a shown number is near another, or the other rounded to as many digits."""
    first, unit = _value(one)
    second, _ = _value(other)
    return abs(first - second) <= max(tolerance * max(abs(first), abs(second)), 0.51 * unit)


def _value(number: str) -> tuple[float, float]:
    """A number, in bytes if it is a size, and what one is in its last digit."""
    digits, unit = re.fullmatch(r"(\S*?) ?([kMG]?B)?", number).groups()  # type: ignore[union-attr]
    mantissa, _, exponent = digits.replace(",", "").partition("e")
    factor = _UNITS.get(unit, 1.0) * 10.0 ** int(exponent or 0)
    return float(mantissa) * factor, factor * 10.0 ** -len(mantissa.partition(".")[2])
