"""Saves that are killed, or that find the disk full: the dense checkpoint or the delta is there, whole."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoint_runs import decoded, dense, load_start, make_trainer, same_bits
from support.messages import naming
from support.tiny_models import Pair

from impart_hf import DeltaCheckpointCallback
from impart_hf.checkpointing.folders import is_delta
from impart_hf.common.files import OutputError
from impart_hf.storage.workspace import Workspace

# Trains, and kills itself at a call of a function on the files of a save.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[5])
from support.checkpoint_runs import load_start, make_trainer
from impart_hf import DeltaCheckpointCallback

base, output, name, number = sys.argv[1:5]
calls, change = [], getattr(os, name)

def counted(path, *more, **settings):
    if "/checkpoint-2/model.s" in str(path) if name == "unlink" else "/.delta-" in str(path):
        calls.append(path)
        if len(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
    return change(path, *more, **settings)

class Callback(DeltaCheckpointCallback):
    def on_save(self, *args, **kwargs):
        setattr(os, name, counted)
        super().on_save(*args, **kwargs)

make_trainer(load_start(Path(base)), Path(output), [Callback()], max_steps=2).train()
print(len(calls))
"""


@pytest.fixture(scope="module")
def unbroken(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of four steps with dense checkpoints; not to be written to."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    make_trainer(load_start(tiny_pair.base), output, [], max_steps=4).train()
    return output


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("open", 9), ("replace", 2), ("replace", 20), ("unlink", 1)])
def test_a_killed_save(name: str, number: int, tiny_pair: Pair, unbroken: Path, tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", KILLED, str(tiny_pair.base), str(tmp_path), name, str(number), tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    checkpoint = tmp_path / "checkpoint-2"
    assert is_delta(checkpoint) == (name == "unlink")
    assert same_bits(dense(checkpoint), dense(unbroken / "checkpoint-2"))
    if is_delta(checkpoint):
        assert same_bits(decoded(checkpoint), dense(unbroken / "checkpoint-2"))
    trainer = make_trainer(load_start(tiny_pair.base), tmp_path, [DeltaCheckpointCallback()], max_steps=4)
    trainer.train(resume_from_checkpoint=DeltaCheckpointCallback.restore(tmp_path))
    assert same_bits(decoded(tmp_path / "checkpoint-4"), dense(unbroken / "checkpoint-4"))
    assert not list(tmp_path.glob(".*")), "what the killed run left is removed"


@pytest.mark.parametrize("step", range(1, 8))
def test_a_kill_between_any_two_changes(
    step: int, tiny_pair: Pair, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delta takes its place by renames, of which the last decides."""

    class Killed(BaseException):
        pass

    replace, stops = os.replace, {1: 1, 2: 2, 3: 3, 4: 10, 5: 30}.get(step)
    placed: list[str] = []

    def counted(source: str | Path, target: str | Path) -> None:
        if Path(target).parent.name == "checkpoint-2":
            is_config = Path(target).name == "config.json"
            if (step == 6 and is_config) or len(placed) + 1 == stops:
                raise Killed
            placed.append(Path(target).name)
            replace(source, target)
            if step == 7 and is_config:
                raise Killed
            return
        replace(source, target)

    trainer = make_trainer(load_start(tiny_pair.base), tmp_path, [DeltaCheckpointCallback()], max_steps=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", counted)
        trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert is_delta(checkpoint) == (step == 7)
    restored = DeltaCheckpointCallback.restore(tmp_path)
    assert restored == str(checkpoint) and same_bits(dense(checkpoint), dense(unbroken / "checkpoint-2"))
    if step == 7:
        assert same_bits(decoded(checkpoint), dense(unbroken / "checkpoint-2"))


def test_a_kill_while_weights_are_restored(
    tiny_pair: Pair, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was half written counts for nothing, and is written again."""
    make_trainer(load_start(tiny_pair.base), tmp_path, [DeltaCheckpointCallback()], max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    left = checkpoint / ".restoring-killed"
    left.mkdir()
    (left / "lock").touch()
    (left / "model.safetensors").write_bytes(b"half")
    assert DeltaCheckpointCallback.restore(tmp_path) == str(checkpoint)
    assert not left.exists() and same_bits(dense(checkpoint), dense(unbroken / "checkpoint-2"))


def test_a_full_disk(tiny_pair: Pair, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make_trainer(load_start(tiny_pair.base), tmp_path, [DeltaCheckpointCallback()], max_steps=2)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=naming("full")):
        patch.setattr(Workspace, "put_record", full)
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert same_bits(dense(tmp_path / "checkpoint-2"), dense(unbroken / "checkpoint-2"))


def test_no_room_for_restored_weights(tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(load_start(tiny_pair.base), tmp_path, [DeltaCheckpointCallback()], max_steps=2).train()
    before = sorted((tmp_path / "checkpoint-2").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 990, 10))
    with pytest.raises(OutputError, match=naming(10)):
        DeltaCheckpointCallback.restore(tmp_path)
    assert sorted((tmp_path / "checkpoint-2").iterdir()) == before
