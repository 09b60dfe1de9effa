"""Which code a method's records come from, as a digest, so that results of earlier code can be told."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import impart_hf
from impart_hf.common.version import __version__
from impart_hf.methods import method_class

ROOT = Path(impart_hf.__file__).parent
_FOLLOWED = ("methods", "coding", "modeling")  # imports from other packages do not decide what is stored
_STEPS = {"calibration": "calibration", "distill": "distillation"}  # the package of each step


@functools.cache
def code_digest(name: str) -> str:
    """Return 12 hexadecimal digits that change with the code of a method, of what it imports, and of its steps.

    Comments and docstrings do not count.

    Args:
        name: METHOD, METHOD+calibration, METHOD+distill, or "" for what no method has made, which gives "".

    Raises:
        ValueError: if there is no such method.
    """
    if not name:
        return ""
    method, *steps = name.split("+")
    found = {Path(inspect.getfile(method_class(method))), ROOT / "compression" / "budgets.py"}
    for step in steps:
        found.update((ROOT / _STEPS[step]).glob("*.py"))
    trees: dict[Path, ast.Module] = {}
    waiting = list(found)
    while waiting:
        path = waiting.pop()
        trees[path] = ast.parse(path.read_text("utf-8"))
        new = set(_imported(path, trees[path])) - found
        found |= new
        waiting += new
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(trees):
        digest.update(path.name.encode() + _code(trees[path]).encode())
    return digest.hexdigest()[:12]


def _imported(path: Path, tree: ast.Module) -> Iterator[Path]:
    """Yield the modules of the followed packages that a module imports relatively."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for file in (folder.with_suffix(".py"), *(folder / f"{name.name}.py" for name in node.names)):
                if file.is_file() and file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in _FOLLOWED:
                    yield file


def _code(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
