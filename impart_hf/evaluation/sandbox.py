"""Runs untrusted Python programs, each in a confined process of its own, and says which ran to their end.

The process has a limit of wall time, processor time, memory, open files and bytes written; an empty folder as its
home; no environment variable of the user; nowhere to print to. The kernel (seccomp) refuses it sockets, further
processes, and signals to others. If it is isolated, it also has namespaces of its own: it sees Python and the system's
libraries, read-only, and neither the user's files nor other processes.

A program passes if it ran to its end without an error, and its process then handed back a secret, which is made for
each run, and ended with status 0. So printing, `sys.exit(0)` and `os._exit(0)` ahead of the tests do not help. A
program that searches its own process for the secret could still hand it back; so could one whose values are equal to
everything. Python cannot keep apart what runs in one process.
"""

import json
import os
import platform
import secrets
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

Isolation = Literal["isolated", "unisolated"]
START_SECONDS = 60.0  # for a process to start, on a busy machine
ANSWER_BYTES = 4096
LAUNCHER, PROGRAM = (Path(__file__).with_name(f"sandbox_{name}.py") for name in ("launcher", "program"))


class SandboxError(OSError):
    """A program that could not be run as it must be: nothing is known of it."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: wall time, from its first statement on; HF evaluate's code_eval has the same.
        memory_bytes: address space.
        file_bytes: length of a file.
        disk_bytes: all files together, if isolated.
        open_files: file descriptors.
    """

    seconds: float = 3.0
    memory_bytes: int = 2 << 30
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        passed: whether it ran to its end.
        reason: otherwise, why not; "" if it did.
    """

    passed: bool
    reason: str = ""


class Sandbox:
    """Runs programs, several at a time."""

    def __init__(self, isolation: Isolation, limits: Limits | None = None, workers: int | None = None):
        """Check that programs can be run so on this machine, by running one.

        Args:
            isolation: "isolated" for namespaces of its own; "unisolated" if the program may read and write the user's
                files, because the machine has no namespaces to give.
            limits: what a program may use.
            workers: programs at a time; as many as there are cores if None.

        Raises:
            SandboxError: if they cannot.
        """
        self.isolation, self.limits = isolation, limits or Limits()
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
            system = f"{platform.system()} on {platform.machine()}"
            raise SandboxError(f"programs are confined on Linux on x86_64 and aarch64 alone, this is {system}")
        self.workers = workers or len(os.sched_getaffinity(0))
        try:
            self.run("pass")
        except SandboxError as error:
            advice = "; allow user namespaces, or take 'unisolated', which leaves the programs your files"
            raise SandboxError(
                f"programs cannot be {isolation} here: {error}{advice * (isolation == 'isolated')}"
            ) from None

    def run_all(self, programs: Sequence[str]) -> list[Outcome]:
        """Run programs side by side.

        Raises:
            SandboxError: if the machine stops one from starting.
        """
        pool = ThreadPoolExecutor(self.workers)
        try:
            return list(pool.map(self.run, programs))
        finally:
            pool.shutdown(cancel_futures=True)

    def run(self, program: str) -> Outcome:
        """Run one program.

        Raises:
            SandboxError: if the machine stops it from starting.
        """
        secret = secrets.token_hex(16).encode()
        with _folder() as folder, tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as errors:
            source.write(secret + b"\n" + program.encode("utf-8", "surrogatepass"))
            source.seek(0)
            answers, result = os.pipe()
            os.set_blocking(answers, False)
            with os.fdopen(answers, "rb", buffering=0) as answer_file:
                try:
                    process = self._start(folder, source.fileno(), result, errors)
                finally:
                    os.close(result)
                with process:
                    started, status = self._wait(process, answer_file)
                answer = _available(answer_file)
            if not started:
                errors.seek(0)
                lines = errors.read(ANSWER_BYTES).decode("utf-8", "replace").split("\n")
                raise SandboxError(next(filter(None, reversed(lines)), f"no program started in {START_SECONDS:g} s"))
        return self._outcome(answer, status, secret)

    def _start(self, folder: str, source: int, result: int, errors: Any) -> subprocess.Popen:
        settings = json.dumps(self._settings(source, result))
        return subprocess.Popen(
            [sys.executable, "-ISB", str(LAUNCHER), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(source, result),
            cwd=folder,
            env=_libraries(),
            start_new_session=True,
        )

    def _settings(self, source: int, result: int) -> dict[str, Any]:
        limits = self.limits
        prefixes = {path for prefix in (sys.prefix, sys.base_prefix) for path in (prefix, os.path.realpath(prefix))}
        return {
            "isolated": self.isolation == "isolated",
            "source": source,
            "result": result,
            "python": sys.executable,
            "harness": PROGRAM.read_text("utf-8"),
            "prefixes": sorted(prefixes),
            "libraries": _libraries(),
            "disk_bytes": limits.disk_bytes,
            "limits": {
                "CPU": ceil(limits.seconds) + 1,
                "AS": limits.memory_bytes,
                "FSIZE": limits.file_bytes,
                "NOFILE": limits.open_files,
            },
        }

    def _wait(self, process: subprocess.Popen, answers: Any) -> tuple[bool, int | None]:
        """Wait for the program's end; return whether it started, and its status, None if its time ended before."""
        assert process.stdin is not None
        poll = select.poll()  # select itself takes no descriptor above 1023
        poll.register(answers, select.POLLIN)
        started = (
            bool(poll.poll(START_SECONDS * 1000)) and answers.read(1) != b""
        )  # the line feed, unless all have closed the pipe
        try:
            return started, process.wait(self.limits.seconds if started else 0)
        except subprocess.TimeoutExpired:
            return started, None
        finally:
            process.stdin.close()  # upon which the launcher ends the program, and itself
            try:
                process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def _outcome(self, answer: bytes, status: int | None, secret: bytes) -> Outcome:
        if status is None:
            return Outcome(False, f"timed out after {self.limits.seconds:g} s")
        if status == 0 and answer == secret:
            return Outcome(True)
        if status == 1 and answer:
            return Outcome(False, answer.decode("utf-8", "replace"))
        how = f"was ended by signal {status - 128}" if status > 128 else f"ended its process with status {status}"
        return Outcome(False, f"{how} before the end of its tests")


def _available(file: Any) -> bytes:
    """What has been written to a pipe that does not block, up to `ANSWER_BYTES`."""
    return file.read(ANSWER_BYTES) or b""


def _libraries() -> dict[str, str]:
    """The variable without which some installations of Python do not start."""
    return {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}


@contextmanager
def _folder() -> Iterator[str]:
    """A folder that is removed at the end, whatever a program has put there."""
    folder = tempfile.mkdtemp(prefix="impart-hf-program-")
    try:
        yield folder
    finally:
        try:
            os.rmdir(folder)  # what an isolated program wrote went with its namespace
        except OSError:
            # A program can make folders deeper than Python's shutil can go, and folders without rights.
            subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)
