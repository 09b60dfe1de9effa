"""Patterns for what a message names, so that tests do not depend on its wording."""

from __future__ import annotations

import re


def naming(*names: object) -> str:
    """A pattern for `match=` and `re.search`: the text names all of these, in any order, as whole words.

    Args:
        names: tensors, fields, options, files or values, or tuples of them.

    naming("beta", 1.5) matches "beta must lie in [0, 1), got 1.5", but not "beta must lie in [0, 1), got 1.55".
    """
    flat = [part for name in names for part in (name if isinstance(name, tuple) else (name,))]
    return "(?s)^" + "".join(f"(?=.*{_word(str(part))})" for part in flat)


def _word(name: str) -> str:
    before = r"(?<![\w.])" if name[:1].isdigit() else r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w|\.\d)" if name[-1:].isdigit() else r"(?!\w)" if re.search(r"\w$", name) else ""
    return before + re.escape(name) + after
