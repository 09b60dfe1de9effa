"""Output folders and disks that will not do: one clear error, and what was there is left alone."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.messages import naming
from support.refusals import refuses, run
from support.tiny_models import Pair, load_tensors

from impart_hf import ImPartRdConfig, LowRankConfig
from impart_hf.common.files import OutputError


@pytest.mark.parametrize("which", ["base", "finetuned"])
def test_output_on_top_of_a_model(pair: Pair, which: str) -> None:
    folder = getattr(pair, which)
    before = load_tensors(folder)
    refuses(pair, OutputError, naming(folder), folder)
    assert load_tensors(folder).keys() == before.keys()


def test_output_is_a_file(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "delta").write_text("mine")
    refuses(pair, OutputError, naming(tmp_path / "delta", "folder"), tmp_path / "delta")
    assert (tmp_path / "delta").read_text() == "mine"


def test_output_is_a_link(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "delta").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    refuses(pair, OutputError, naming(tmp_path / "delta", "folder"), tmp_path / "delta")
    refuses(pair, OutputError, naming(tmp_path / "dangling", "folder"), tmp_path / "dangling")


@pytest.mark.parametrize("config", [None, "not json", "[]", '{"model_type": "llama"}'])
def test_output_is_a_foreign_folder(pair: Pair, tmp_path: Path, config: str | None) -> None:
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "thesis.tex").write_text("years of work")
    if config is not None:
        (tmp_path / "delta" / "config.json").write_text(config)
    refuses(pair, OutputError, naming(tmp_path / "delta", "delta repository"), tmp_path / "delta")
    assert (tmp_path / "delta" / "thesis.tex").read_text() == "years of work"


def test_output_of_ours_is_replaced(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "delta"
    output.mkdir()  # an empty folder is free
    run(pair, output)
    first = (output / "delta_model.safetensors").read_bytes()
    (output / "delta_model-00001-of-00002.safetensors").write_bytes(b"left by an older run")
    run(pair, output, LowRankConfig(compression_ratio=4))
    assert (output / "delta_model.safetensors").read_bytes() != first
    assert not (output / "delta_model-00001-of-00002.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta", "finetuned"]


@pytest.mark.parametrize("folder", [".git", "results"])
def test_a_folder_within_an_older_output_is_not_thrown_away(pair: Pair, tmp_path: Path, folder: str) -> None:
    run(pair, tmp_path / "delta")
    (tmp_path / "delta" / folder).mkdir()
    refuses(pair, OutputError, naming(tmp_path / "delta", folder), tmp_path / "delta")


def test_files_that_come_to_the_output_during_the_run_are_not_thrown_away(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = importlib.import_module("impart_hf.compression.pipeline")
    write = pipeline.write_repository

    def meddle(*args: Any) -> Any:
        (tmp_path / "delta").mkdir()
        (tmp_path / "delta" / "notes.txt").write_text("mine")
        return write(*args)

    monkeypatch.setattr(pipeline, "write_repository", meddle)
    with pytest.raises(OutputError, match=naming(tmp_path / "delta", "delta repository")):
        run(pair, tmp_path / "delta")
    assert (tmp_path / "delta" / "notes.txt").read_text() == "mine"


def test_output_inside_missing_folders(pair: Pair, tmp_path: Path) -> None:
    run(pair, tmp_path / "a" / "b" / "delta")
    assert (tmp_path / "a" / "b" / "delta" / "config.json").exists()


def test_output_below_a_file(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuses(pair, OutputError, naming(tmp_path / "file", "folder"), tmp_path / "file" / "sub" / "delta")


def test_output_name_too_long(pair: Pair, tmp_path: Path) -> None:
    for name in ("x" * 300, "x" * 253, "x" * 241, "ß" * 121):  # the hidden folder has a longer name
        refuses(pair, OutputError, naming(tmp_path / "new" / name, 240), tmp_path / "new" / name)
        assert not (tmp_path / "new").exists()
    run(pair, tmp_path / ("x" * 240))


def test_hidden_folder_that_is_not_ours(pair: Pair, tmp_path: Path) -> None:
    hidden = tmp_path / ".delta.partial"
    hidden.mkdir()
    (hidden / "diary").write_text("mine")
    refuses(pair, OutputError, naming(hidden), tmp_path / "delta")
    shutil.rmtree(hidden)
    hidden.symlink_to(pair.base)
    refuses(pair, OutputError, naming(hidden), tmp_path / "delta")
    assert load_tensors(pair.base)


def test_parent_that_may_not_be_written_to(pair: Pair, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() == 0:
        # Root may write anywhere; what it may not write to is a folder that the kernel holds still.
        locked = Path("/proc/self")
    refuses(pair, OutputError, naming(locked / "delta", locked, "folder"), locked / "delta")


def test_a_limit_that_cannot_be_kept(pair: Pair, tmp_path: Path) -> None:
    message = refuses(pair, ValueError, naming("7000 bytes") + ".*[0-9]+ are fixed", max_bytes=7000,
                      method=ImPartRdConfig())  # fmt: skip
    found = re.search(r" (\d+) bytes\D*$", message)
    assert found is not None and 7000 < int(found[1]) < 65_000
    report = run(pair, tmp_path / "delta", ImPartRdConfig(), max_bytes=int(found[1]))
    assert report.repository_bytes <= int(found[1]) and not report.shortfall


def test_disk_too_small_for_the_result(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    refuses(pair, OutputError, naming(1048576) + ".*[0-9]+ are needed", tmp_path / "a" / "delta")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(pair: Pair, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(10 << 20))
    refuses(pair, OutputError, naming(small_disk, "bytes") + ".*[0-9]+ are needed", small_disk / "delta")


def test_mount_point(pair: Pair, small_disk: Path) -> None:
    refuses(pair, OutputError, naming(small_disk, "mount point"), small_disk)


def test_disk_that_fills_up_with_spectra(pair: Pair, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's error, when it writes to a file, would not say that the disk is full."""
    budgets = importlib.import_module("impart_hf.compression.budgets")
    decompose = budgets.singular_values

    def fill(*arguments: Any) -> Any:
        with pytest.raises(OSError), (small_disk / "ballast").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        return decompose(*arguments)

    monkeypatch.setattr(budgets, "singular_values", fill)
    with pytest.raises(OutputError, match=naming("disk", small_disk, "full")):
        run(pair, small_disk / "delta", ImPartRdConfig(4))
    (small_disk / "ballast").unlink()
    monkeypatch.setattr(budgets, "singular_values", decompose)
    run(pair, small_disk / "delta", ImPartRdConfig(4))


def test_disk_that_fills_up_during_the_work(
    pair: Pair, small_disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another program takes the space meanwhile; when it is given back, the run goes on."""
    pipeline = importlib.import_module("impart_hf.compression.encoding")
    encode, encoded = pipeline.tasks_of, []
    ballast = small_disk / "ballast"

    def fill(tensor: Any, *args: Any) -> Any:
        encoded.append(tensor.name)
        if len(encoded) == 4:
            with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return encode(tensor, *args)

    monkeypatch.setattr(pipeline, "tasks_of", fill)
    with pytest.raises(OutputError, match=naming("disk", small_disk, "full")) as caught:
        run(pair, small_disk / "delta")
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert not (small_disk / "delta").exists()
    ballast.unlink()
    finished, encoded[:] = encoded[:3], [""] * 4
    run(pair, small_disk / "delta")
    assert len(encoded) > 8 and not set(finished) & set(encoded)
    run(pair, tmp_path / "unbroken")
    for path in (tmp_path / "unbroken").iterdir():
        assert (small_disk / "delta" / path.name).read_bytes() == path.read_bytes()
