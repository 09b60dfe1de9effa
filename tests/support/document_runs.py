"""Running a document: its blocks in their order, in a folder of its own, with the variables that they export."""

from __future__ import annotations

import json
import re
import select
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from support.document_blocks import ROOT, Block, Command, MarkError
from support.document_ground import Ground
from support.document_output import TOLERANCE, differences, missing_values, updated
from support.loopback_hub import LoopbackHub, hub_env

SECONDS = 1800  # for a command, or until a server answers
_SUPPORT = Path(__file__).parent


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


class Worker:
    """A process for commands of impart-hf and for Python blocks; see document_worker.py."""

    def __init__(self, env: dict[str, str]):
        command = [sys.executable, str(_SUPPORT / "document_worker.py")]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> Done:
        """Run a command or block; a worker that takes too long, or dies, is an error."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self.close()
            return Done(-1, "", f"no answer within {SECONDS} s, or the process died")
        return Done(**json.loads(line))

    def close(self) -> None:
        _end(self._process)


class Server:
    """A `vllm serve` of a document, with all that it starts."""

    def __init__(self, command: str, cwd: Path, env: dict[str, str], port: int, log: Path):
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                ["bash", "-c", command], cwd=cwd, env=env, stdout=file, stderr=file, text=True
            )
        self._url = f"http://localhost:{port}/health"

    def wait(self) -> Done:
        """Until it answers."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(self._url, timeout=5)
                return Done(0, "", "")
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        return Done(1, "", self._log.read_text()[-6000:])

    def close(self) -> None:
        _end(self._process)


@dataclass
class DocumentRun:
    """The run of one document.

    A run is quick or whole. A quick one, on the stand-in for the demo, leaves slow blocks out, hands the commands of
    impart-hf to a worker, and compares outputs but for their numbers. In a whole one every command is a process.

    Attributes:
        ground: its own copy.
        hub: with the ground's repositories.
        worker: of a quick run, which other documents may share; None for a whole run.
        failures: what went wrong so far, with the place of the block.
    """

    ground: Ground
    hub: LoopbackHub
    worker: Worker | None = None
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        home = self.ground.checkout.parent / "client"
        home.mkdir()
        (home / ".curlrc").write_text("fail\n")  # an HTTP error is a failure, also of a quiet curl
        self.env = hub_env(self.hub, home) | {"CURL_HOME": str(home)}
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env['PATH']}"
        self.env["PYTHONPATH"] = str(self.ground.checkout if self.whole else ROOT)
        self.cwd = self.ground.checkout
        self.port = _free_port()
        self._own_worker: Worker | None = None
        self._server: Server | None = None
        self._printed: str | None = None  # by the last block that ran; None if a block before was left out

    @property
    def whole(self) -> bool:
        return self.worker is None

    def __enter__(self) -> DocumentRun:
        return self

    def __exit__(self, *error: object) -> None:
        for part in (self._server, self._own_worker):
            if part:
                part.close()

    def run(self, blocks: list[Block], update: bool = False) -> None:
        """Run all blocks. With `update`, outputs that differ are written into the document."""
        for block in blocks:
            if block.kind in ("commands", "python"):
                self._run_block(block)
            elif block.kind == "file":
                path = self.cwd / block.note
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
            elif block.kind == "skip":
                self._printed = None
            elif self._printed is not None:
                self._compare(block, update)
            elif self.whole:
                self.failures.append(f"{block.place}: {block.kind!r}, but the block before it does not run")

    def _compare(self, block: Block, update: bool) -> None:
        assert self._printed is not None
        if block.kind == "values":
            count = int(block.note) if block.note else None
            wrong = missing_values(block.text, self._printed, count) if self.whole else []
            self.failures += [f"{block.place}: {text}" for text in wrong]
            return
        percent = block.note.rstrip("%")
        tolerance = (float(percent) / 100 if percent else TOLERANCE) if self.whole else None
        wrong = differences(block.text, self._printed, tolerance)
        if wrong and update:
            _replace(block, updated(block.text, self._printed))
            wrong = differences(updated(block.text, self._printed), self._printed, tolerance)
        self.failures += [f"{block.place}: {text}" for text in wrong]

    def _run_block(self, block: Block) -> None:
        """Run a block's commands; what follows a failure in it is left out."""
        commands = [command for command in block.commands() if command.when != "never"]
        if not self.whole and any(command.when == "slow" for command in commands):
            self._printed = None
            commands = [command for command in commands if command.when == "fast"]
        elif commands:
            self._printed = ""
        for command in commands:
            begun = time.monotonic()
            done = self._run(block, command)
            took = f"{time.monotonic() - begun:.1f} s"
            print(f"{block.place}: {took:>8}  {command.text.splitlines()[0]}", flush=True)
            if self._printed is not None:
                self._printed += done.stdout
            if done.status:
                said = (done.stderr + done.stdout)[-3000:].strip()
                self.failures.append(f"{block.place}: status {done.status} of\n{command.text}\n{said}")
                return

    def _run(self, block: Block, command: Command) -> Done:
        text = re.sub(r"\b8000\b", str(self.port), command.text)
        if block.kind == "python":
            if "__main__" in text:
                script = self.cwd / "block.py"
                script.write_text(text)
                return self._shell("python block.py")
            return self._worker().ask(code=text, document=str(block.document), cwd=str(self.cwd), env=self.env)
        if re.match(r"make demo\b", text):
            return Done(0, self.ground.demo_output, "")
        if re.search(r"(?m)^\s*(\w+=\S*\s+)*vllm serve", text):
            return self._serve(text)
        words = shlex.split(text.replace("\\\n", " "), comments=True) if not self.whole else []
        if words and words[0] == "impart-hf":
            return self._worker().ask(argv=words[1:], cwd=str(self.cwd), env=self.env)
        if words[:2] == ["python", "-c"]:
            return self._worker().ask(code=words[2], document=command.text, cwd=str(self.cwd), env=self.env)
        return self._shell(text)

    def _worker(self) -> Worker:
        if self.worker:
            return self.worker
        self._own_worker = self._own_worker or Worker(self.env)
        return self._own_worker

    def _serve(self, command: str) -> Done:
        if self._server:
            self._server.close()
        self._server = Server(command, self.cwd, self.env, self.port, self.cwd.parent / "server.log")
        return self._server.wait()

    def _shell(self, command: str) -> Done:
        """Run a command in bash, and keep the variables that it exports and the folder that it changes to."""
        after = self.cwd.parent / "environment"
        script = f"{command}\nstatus=$?\nenv -0 > {shlex.quote(str(after))}\nexit $status"
        after.unlink(missing_ok=True)
        with subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", script],
            cwd=self.cwd,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                _end(process)
                return Done(-1, "", f"not done within {SECONDS} s")
        if after.exists():
            self.env = dict(entry.split("=", 1) for entry in after.read_text().split("\0") if "=" in entry)
            self.cwd = Path(self.env.get("PWD", str(self.cwd)))
        return Done(process.returncode, stdout, stderr)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process with all that it has started."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    process.wait(30)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _replace(block: Block, text: str) -> None:
    """Write another text into a document in place of a block's, of as many lines."""
    lines = block.document.read_text("utf-8").splitlines(keepends=True)
    new = [block.indent + line if line.strip() else line for line in text.splitlines(keepends=True)]
    last = block.line - 1 + len(new)
    if len(new) != len(block.text.splitlines()) or last > len(lines):
        raise MarkError(f"{block.place} has changed since it was read")
    lines[block.line - 1 : last] = new
    block.document.write_text("".join(lines), "utf-8")
