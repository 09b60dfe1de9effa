"""The package imports nothing that only some platforms have."""

from __future__ import annotations

import ast
from pathlib import Path

import impart_hf

POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


def test_no_module_of_one_platform_is_imported() -> None:
    for path in Path(impart_hf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(str(node.module))
            assert not POSIX_ONLY & {name.partition(".")[0] for name in names}, path
