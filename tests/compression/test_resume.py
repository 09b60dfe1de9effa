"""Runs that are killed, and runs that meet: real processes, killed with SIGKILL, watched through their files only."""

from __future__ import annotations

import fcntl
import importlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import naming
from support.tiny_models import Pair, edit_tensors, save_pair, tiny_config
from support.workspaces import break_off, differing, file_name, finished, hidden

from impart_hf import DareConfig, ImPartConfig, LowRankConfig, compress
from impart_hf.common.files import OutputError
from impart_hf.methods import MethodConfig
from impart_hf.storage.workspace import Workspace

METHOD = ImPartConfig(compression_ratio=4, seed=7)
# The child does what a user's script does; it lives in a process of its own to be killed.
CHILD = """
import sys
from impart_hf import ImPartConfig, compress
compress(*sys.argv[1:4], ImPartConfig(compression_ratio=4, seed=int(sys.argv[4])))
"""
LAST = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def slow_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair with enough matrices to be caught in the middle of."""
    config = tiny_config("llama", num_hidden_layers=16, hidden_size=128, intermediate_size=256)
    return save_pair(tmp_path_factory.mktemp("slow"), config)


@pytest.fixture(scope="module")
def unbroken(slow_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of its own process makes that nobody disturbs."""
    output = tmp_path_factory.mktemp("unbroken") / "delta"
    assert start(slow_pair, output).wait() == 0
    return output


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for child in started:
        child.kill()
        child.wait()


def start(pair: Pair, output: Path, seed: int = 7) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, str(pair.base), str(pair.finetuned), str(output), str(seed)]
    return subprocess.Popen(command)


def finish(pair: Pair, output: Path) -> None:
    compress(str(pair.base), str(pair.finetuned), output, METHOD)


def kill_when(child: subprocess.Popen[bytes], moment: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not moment():
        assert child.poll() is None, "the run was over before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.kill()
    assert child.wait() == -signal.SIGKILL


@pytest.mark.process
@pytest.mark.xdist_group("killed runs")
def test_a_killed_run_goes_on_where_it_stopped(
    slow_pair: Pair, unbroken: Path, tmp_path: Path, children: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "delta"
    children.append(start(slow_pair, output))
    kill_when(children[0], lambda: hidden(output).exists() and len(finished(output)) > 0)
    assert not output.exists()
    kept = finished(output)
    assert kept

    pipeline = importlib.import_module("impart_hf.compression.encoding")
    encode, redone = pipeline.tasks_of, []
    monkeypatch.setattr(pipeline, "tasks_of", lambda t, *args: redone.append(t.name) or encode(t, *args))
    finish(slow_pair, output)
    assert not set(map(file_name, redone)) & set(kept)
    assert len(redone) + len(kept) == 16 * 7 + 2
    assert differing(output, unbroken) == []
    assert [p.name for p in tmp_path.iterdir()] == ["delta"]


@pytest.mark.process
@pytest.mark.xdist_group("killed runs")
def test_killed_again_and_again(slow_pair: Pair, unbroken: Path, tmp_path: Path, children: list[Any]) -> None:
    """In a new process each time: what is finished only ever grows."""
    output, before = tmp_path / "delta", {}
    for goal in (20, 60):
        children.append(start(slow_pair, output))
        kill_when(children[-1], lambda goal=goal: len(finished(output)) >= goal)
        after = finished(output)
        assert after.items() >= before.items(), "a finished tensor was done again"
        before = after
    finish(slow_pair, output)
    assert differing(output, unbroken) == []


@pytest.mark.process
@pytest.mark.xdist_group("killed runs")
def test_killed_during_assembly(slow_pair: Pair, unbroken: Path, tmp_path: Path, children: list[Any]) -> None:
    output = tmp_path / "delta"
    children.append(start(slow_pair, output))
    kill_when(children[0], lambda: any((hidden(output) / "repository").glob("*")))
    assert not output.exists()
    finish(slow_pair, output)
    assert differing(output, unbroken) == []


@pytest.mark.process
@pytest.mark.xdist_group("killed runs")
def test_killed_while_an_older_repository_is_replaced(
    slow_pair: Pair, unbroken: Path, tmp_path: Path, children: list[Any]
) -> None:
    """Whenever the kill comes, the output folder is the old repository, or the new one, or for an instant missing."""
    output = tmp_path / "delta"
    old = tmp_path / "old"
    compress(str(slow_pair.base), str(slow_pair.finetuned), old, LowRankConfig(compression_ratio=4))
    shutil.copytree(old, output)
    children.append(start(slow_pair, output))
    kill_when(children[0], lambda: any((hidden(output) / "repository").glob("*")))
    assert not output.exists() or not differing(output, old) or not differing(output, unbroken)
    finish(slow_pair, output)
    assert differing(output, unbroken) == [] and sorted(p.name for p in tmp_path.iterdir()) == ["delta", "old"]


def stop_after_five(pair: Pair, output: Path) -> dict[str, int]:
    return break_off(lambda: compress(str(pair.base), str(pair.finetuned), output, METHOD), output, 5)


@pytest.mark.parametrize(
    "other",
    [ImPartConfig(compression_ratio=5, seed=7), ImPartConfig(compression_ratio=4, seed=8), DareConfig(4, seed=7)],
    ids=["ratio", "seed", "method"],
)
def test_other_settings_discard_the_work(tiny_pair: Pair, tmp_path: Path, other: MethodConfig) -> None:
    stop_after_five(tiny_pair, tmp_path / "delta")
    for name in ("delta", "fresh"):
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / name, other)
    assert differing(tmp_path / "delta", tmp_path / "fresh") == []


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_input_that_changed_meanwhile_is_noticed(tiny_pair: Pair, tmp_path: Path, side: str) -> None:
    for folder in (tiny_pair.base, tiny_pair.finetuned):
        shutil.copytree(folder, tmp_path / folder.name)
    pair = Pair(tmp_path / tiny_pair.base.name, tmp_path / tiny_pair.finetuned.name)
    stop_after_five(pair, tmp_path / "delta")
    # One bit of one number, in a tensor that is finished: nothing but its checksum tells.
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(getattr(pair, side), lambda t: t[name].view(torch.int16).view(-1)[77].bitwise_xor_(1))
    for output in ("delta", "fresh"):
        compress(str(pair.base), str(pair.finetuned), tmp_path / output, METHOD)
    assert differing(tmp_path / "delta", tmp_path / "fresh") == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fingerprint": null}', "null"])
def test_a_plan_cut_off_by_a_kill(tiny_pair: Pair, tmp_path: Path, content: str) -> None:
    stop_after_five(tiny_pair, tmp_path / "delta")
    (hidden(tmp_path / "delta") / "plan.json").write_text(content)
    for output in ("delta", "fresh"):
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / output, METHOD)
    assert differing(tmp_path / "delta", tmp_path / "fresh") == []


def test_half_written_and_removed_leftovers(tiny_pair: Pair, tmp_path: Path) -> None:
    """A record cut off while it was written is no record; of a workspace half removed, only the lock may be left."""
    output = tmp_path / "delta"
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "fresh", METHOD)
    stop_after_five(tiny_pair, output)
    victim = hidden(output) / "records" / file_name(LAST)
    victim.with_suffix(".writing").write_bytes(b"half")
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), output, METHOD)
    assert differing(output, tmp_path / "fresh") == []
    again = tmp_path / "again"
    stop_after_five(tiny_pair, again)
    for victim, spoil in zip(sorted((hidden(again) / "records").glob("*"))[:2], (b"", b"\0" * 200), strict=True):
        victim.write_bytes(spoil)  # as a power cut may leave them
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), again, METHOD)
    assert differing(again, tmp_path / "fresh") == []
    for leftovers in ([], ["lock"]):
        hidden(output).mkdir()
        for name in leftovers:
            (hidden(output) / name).touch()
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), output, METHOD)
        assert differing(output, tmp_path / "fresh") == [] and not hidden(output).exists()


@pytest.mark.process
@pytest.mark.xdist_group("killed runs")
def test_two_runs_at_once(slow_pair: Pair, unbroken: Path, tmp_path: Path, children: list[Any]) -> None:
    output = tmp_path / "delta"
    children.append(start(slow_pair, output))
    while not finished(output):
        assert children[0].poll() is None
        time.sleep(0.001)
    # Stopped, not killed: it holds the lock for as long as the rest of this test takes.
    children[0].send_signal(signal.SIGSTOP)
    for method in (METHOD, LowRankConfig(compression_ratio=4)):
        with pytest.raises(OutputError, match=naming("another process", output)):
            compress("/not/even/looked/at", "/neither", output, method)
    children[0].send_signal(signal.SIGCONT)
    assert children[0].wait() == 0
    assert differing(output, unbroken) == []


def test_a_run_that_starts_while_another_publishes(tmp_path: Path) -> None:
    """The second has opened the lock file that the first then removes: it must not believe that it holds the lock."""
    first, second = Workspace(tmp_path / "delta"), Workspace(tmp_path / "delta")
    first.begin("work", 0)
    with pytest.raises(OutputError, match=naming("another process", tmp_path / "delta")):
        second.begin("work", 0)
    (first.repository / "config.json").write_text('{"model_type": "delta_compressed"}')
    flock = fcntl.flock
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(OutputError, match=naming("another process", tmp_path / "delta")),
    ):

        def publish_first(*args: Any) -> None:
            patch.setattr(fcntl, "flock", flock)
            with first:
                first.publish()
            flock(*args)

        patch.setattr(fcntl, "flock", publish_first)
        second.begin("work", 0)
    assert (tmp_path / "delta" / "config.json").exists()


@pytest.mark.parametrize("config", [ImPartConfig, DareConfig, LowRankConfig])
def test_same_inputs_and_seed_same_bytes(tiny_pair: Pair, tmp_path: Path, config: type[MethodConfig]) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / name, config(compression_ratio=4, seed=seed))
    assert differing(tmp_path / "one", tmp_path / "two") == []
    files = [(tmp_path / name / "delta_model.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] != files[1]


def test_killed_after_publishing(tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older repository is still in the workspace, which has a plan: the same command must be able to replace it."""
    output, other = tmp_path / "delta", LowRankConfig(compression_ratio=4)
    finish(tiny_pair, output)

    def killed(self: Workspace) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Workspace, "discard", killed)
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), output, other)
    assert (hidden(output) / "replaced").exists()
    for _ in range(2):
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), output, other)
        assert [p.name for p in tmp_path.iterdir()] == ["delta"]


def test_killed_between_the_renames_of_publishing(tiny_pair: Pair, tmp_path: Path) -> None:
    """The older repository has gone into the workspace already: other work must not throw it away."""
    output = tmp_path / "delta"
    finish(tiny_pair, output)
    hidden(output).mkdir()
    (hidden(output) / "lock").touch()
    output.rename(hidden(output) / "replaced")
    with Workspace(output) as workspace:
        assert not workspace.begin("other work", 1)
        assert (output / "config.json").exists()


def test_a_resumed_run_reads_the_models_again_only_if_their_files_changed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading both takes minutes at real sizes."""
    output, scanned = tmp_path / "delta", []
    module = importlib.import_module("impart_hf.compression.scan")
    scan = module.scan_tensor
    monkeypatch.setattr(module, "scan_tensor", lambda name, *models: scanned.append(name) or scan(name, *models))
    stop_after_five(pair, output)
    count = len(scanned)
    assert count > 20
    finish(pair, output)
    assert len(scanned) == count
    stop_after_five(pair, tmp_path / "other")
    edit_tensors(pair.finetuned, lambda tensors: tensors.update({LAST: tensors[LAST] + 1}))
    finish(pair, tmp_path / "other")
    assert len(scanned) == 3 * count
    compress(str(pair.base), str(pair.finetuned), tmp_path / "fresh", METHOD)
    assert differing(tmp_path / "other", tmp_path / "fresh") == []
