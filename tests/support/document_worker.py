"""A process that runs commands of impart-hf and Python blocks for a document, one after the other.

    python document_worker.py

A process of its own for each would take seconds to import torch. Requests are lines of JSON on standard input: "cwd",
"env" (all variables), and "argv" (words after `impart-hf`) or "code", a Python block, which shares its names with the
blocks before it under the same "document". Answers are lines of JSON: "status", "stdout", "stderr".
"""

import json
import os
import sys
import tempfile
import traceback
from typing import Any


def answer(request: dict[str, Any], names: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Do what a request asks, with standard output and error going to files for as long."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        for number, file in enumerate((out, err), 1):
            os.dup2(file.fileno(), number)
        try:
            status = _run(request, names)
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        except Exception:
            traceback.print_exc()
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return {"status": status, "stdout": texts[0], "stderr": texts[1]}


def _run(request: dict[str, Any], names: dict[str, dict[str, Any]]) -> int:
    if "argv" in request:
        from impart_hf.cli.main import main

        return main(request["argv"])
    exec(compile(request["code"], "block", "exec"), names.setdefault(request["document"], {"__name__": "block"}))
    return 0


def serve() -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    names: dict[str, dict[str, Any]] = {}
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line), names)) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve()
