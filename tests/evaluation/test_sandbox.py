"""Programs that a model may write: ordinary ones have the verdict that they deserve, hostile ones do no harm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.messages import naming

from impart_hf.evaluation.sandbox import Isolation, Limits, Outcome, Sandbox, SandboxError

GENEROUS = Limits(seconds=30)
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux", reason="programs are confined on Linux alone"),
]


@pytest.fixture(scope="module", params=["isolated", "unisolated"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    if request.param == "isolated":
        isolated(GENEROUS)
    return request.param


@pytest.fixture(scope="module")
def sandbox(isolation: Isolation) -> Sandbox:
    return Sandbox(isolation, GENEROUS)


def isolated(limits: Limits) -> Sandbox:
    try:
        return Sandbox("isolated", limits)
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "program, reason",
    [
        ("def f(x): return x + 1\nassert f(1) == 2", None),
        ("import numpy as np\nassert np.ones(3) @ np.ones(3) == 3", None),
        ("import re, math, heapq, datetime, asyncio, typing, collections\nasyncio.run(asyncio.sleep(0))", None),
        ("import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()", None),
        ("open('file', 'w').write('text')\nassert open('file').read() == 'text'", None),
        ("print('x' * 10 ** 6)", None),
        ("if __name__ == '__main__': raise ValueError", None),  # code_eval does not run a program as the main one
        ("assert 1 == 2, 'one is two'", "AssertionError: one is two"),
        ("def f(:", "SyntaxError"),
        ("missing()", "NameError"),
        ("input()", "Bad file descriptor"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("text = '\ud800'", "UnicodeEncodeError"),
        ("assert '\u00e9' == 'e'", "AssertionError"),
        ("raise ValueError('x' * 10 ** 6)", "ValueError: xxx"),
    ],
)
def test_ordinary_programs(program: str, reason: str | None, sandbox: Sandbox) -> None:
    found = sandbox.run(program)
    assert found.passed == (reason is None)
    assert (reason or "") in found.reason and len(found.reason) <= 500


HOSTILE = {
    "exit": ("import sys\nsys.exit(0)", "SystemExit"),
    "exit of the process": ("import os\nos._exit(0)", "status 0 before the end"),
    "exit at the interpreter's exit": (
        "import atexit, os\natexit.register(os._exit, 0)\nassert False",
        "AssertionError",
    ),
    "a guessed answer": (
        "import os\nfor i in range(3, 60):\n try: os.write(i, b'0' * 32)\n except OSError: pass",
        "end",
    ),
    "no descriptors": ("import os\nos.closerange(3, 60)", "Bad file descriptor|status"),
    "crash": ("import ctypes\nctypes.string_at(0)", "signal 11"),
    "memory": ("x = bytearray(3 << 30)", "MemoryError"),
    "fork": ("import os\nwhile True: os.fork()", "PermissionError"),
    "a child that passes": ("import os\nif os.fork(): os._exit(0)", "PermissionError"),
    "another program": ("import subprocess\nsubprocess.run(['/bin/true'])", "PermissionError"),
    "large file": ("open('file', 'wb').write(bytes(17 << 20))", "File too large"),
    "many descriptors": ("files = [open('/dev/null') for _ in range(100)]", "Too many open files"),
    "signal to its parent": ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    "signal to all": ("import os\nos.kill(-1, 9)", "PermissionError"),
    "memory of its parent": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.ptrace(16, os.getppid(), None, None) == 0, os.strerror(ctypes.get_errno())",
        "not permitted",
    ),
    "memory that stays": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.shmget(0, 1 << 20, 0o1600) >= 0, os.strerror(ctypes.get_errno())",
        "not permitted",
    ),
    "namespaces of its own": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.unshare(0x10000000) == 0, os.strerror(ctypes.get_errno())",
        "not permitted",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_programs(case: str, sandbox: Sandbox) -> None:
    program, reason = HOSTILE[case]
    found = sandbox.run(program)
    assert not found.passed
    assert any(part in found.reason for part in reason.split("|")), found.reason


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        "import signal, time\nfor s in (1, 2, 14, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(1000)",
        "import os, time\nos.setsid() if os.getsid(0) != os.getpid() else 0\ntime.sleep(1000)",
        "class E(Exception):\n def __str__(self):\n  while True: pass\nraise E",
        "import threading\ndef f(): sum(iter(int, 1))\nfor _ in range(20): threading.Thread(target=f).start()\nf()",
        "while True: print('x' * 10 ** 7)",
    ],
    ids=["loop", "catches all", "ignores signals", "new session", "endless message", "threads", "endless output"],
)
def test_time_is_limited(program: str, isolation: Isolation) -> None:
    sandbox = Sandbox(isolation, Limits(seconds=0.5))
    started = time.monotonic()
    assert sandbox.run(program) == Outcome(False, "timed out after 0.5 s")
    assert time.monotonic() - started < 10


def test_network_is_out_of_reach(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = sandbox.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert not found.passed and "PermissionError" in found.reason


def test_nothing_of_the_user_reaches_an_isolated_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = isolated(GENEROUS)
    monkeypatch.setenv("SECRET_KEY", "secret")
    (tmp_path / "mine.txt").write_text("mine")
    for attempt in (
        f"open({str(tmp_path / 'mine.txt')!r})",
        f"open({str(tmp_path / 'new.txt')!r}, 'w')",
        "open('/proc/1/environ')",
        "import os\nopen(os.path.join(os.path.dirname(os.__file__), 'evil.py'), 'w')",
        "open('/usr/evil', 'w')",
        "import os\nos.chdir('/')\nos.mkdir('evil')",
    ):
        found = sandbox.run(attempt)
        assert not found.passed and ("No such file" in found.reason or "Read-only" in found.reason), found.reason
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert sandbox.run("import os\nassert 'SECRET_KEY' not in os.environ and os.listdir() == []").passed
    # A program sees itself alone, and has no rights in its namespaces either.
    assert sandbox.run("import os\nassert os.getpid() == 1").passed
    assert "PermissionError" in sandbox.run("import os\nos.chroot('/')").reason


def test_the_folders_of_an_isolated_program_are_limited() -> None:
    sandbox = isolated(Limits(seconds=30, disk_bytes=4 << 20))
    program = "for i in range(10): open(f'file{i}', 'wb').write(bytes(1 << 20))"
    assert "No space left" in sandbox.run(program).reason
    assert sandbox.run("open('file', 'wb').write(bytes(1 << 20))").passed


def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    """Folders deeper than Python's own removal can go, and folders that may not be read."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    deep = "for _ in range(2000):\n os.mkdir('d')\n os.chdir('d')"
    program = f"import os\nos.makedirs('closed/inner')\nos.chmod('closed', 0)\n{deep}"
    assert sandbox.run(program).passed
    assert list(tmp_path.iterdir()) == []


def test_programs_run_side_by_side(isolation: Isolation) -> None:
    """Each verdict is its own program's, and sleeping programs do not wait for one another."""
    sandbox = Sandbox(isolation, GENEROUS, workers=8)
    programs = [f"import time\ntime.sleep(1)\nassert {i} % 3" for i in range(16)]
    started = time.monotonic()
    found = sandbox.run_all(programs)
    assert [outcome.passed for outcome in found] == [bool(i % 3) for i in range(16)]
    assert time.monotonic() - started < 14
    assert sandbox.run_all([]) == []


def test_a_verdict_does_not_depend_on_the_run(sandbox: Sandbox) -> None:
    orders = {sandbox.run("raise ValueError(list({'a', 'b', 'c', 'd', 'e'}))").reason for _ in range(4)}
    assert len(orders) == 1


def test_a_machine_that_cannot_start_programs_is_no_failed_program(
    monkeypatch: pytest.MonkeyPatch, isolation: Isolation
) -> None:
    sandbox = Sandbox(isolation)
    monkeypatch.setattr(sys, "executable", sys.executable + "-that-is-gone")
    with pytest.raises(OSError):
        sandbox.run("pass")
    monkeypatch.undo()
    with pytest.raises(SandboxError, match=naming(isolation)):
        Sandbox(isolation, Limits(memory_bytes=1 << 20))


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match=naming("riscv64")):
        Sandbox("unisolated")


def test_programs_end_with_the_process_that_runs_them(tmp_path: Path, isolation: Isolation) -> None:
    program = (
        "from impart_hf.evaluation.sandbox import Limits, Sandbox\n"
        f"Sandbox({isolation!r}, Limits(seconds=600)).run('while True: pass')"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    try:
        launcher, child = wait_for(lambda: at_work(process.pid))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: gone(launcher) and gone(child))


def wait_for(look: Callable[[], Any]) -> Any:
    """What `look` finds, within a minute."""
    deadline = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def at_work(pid: int) -> tuple[int, int] | None:
    """A child of a process and a child of that one which has computed for half a second."""
    pairs = [(launcher, child) for launcher in children(pid) for child in children(launcher)]
    return next((pair for pair in pairs if sum(map(int, status(pair[1])[11:13])) >= 50), None)


def children(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")  # each thread's own
    return [int(part) for file in files for part in read(file).split()]


def status(pid: int) -> list[str]:
    """The third and later fields of /proc/PID/stat; if the process is gone, as of a dead one."""
    return read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or ["X"] + ["0"] * 50


def gone(pid: int) -> bool:
    return status(pid)[0] in "XZ"


def read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
