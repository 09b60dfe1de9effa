"""Jobs of several processes, started as users start them: the bytes of one process, and errors with a name."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.calibrated import TEXT
from support.tiny_models import Pair, save_pair, tiny_config
from support.workspaces import differing, finished

from impart_hf import ExactConfig, ImPartConfig, ImPartRdConfig, QualityTarget, compress
from impart_hf.common.files import OutputError
from impart_hf.merging.merge import merge
from impart_hf.storage.output import check_visible

METHODS = {
    "impart-rd": ImPartRdConfig(compression_ratio=8),
    "impart": ImPartConfig(compression_ratio=8),
    "exact": ExactConfig(),
}
MERGE = "merge_method: ties\nbase_model: {base}\nmodels:\n- {{model: {finetuned}, parameters: {{density: 0.5}}}}\n"

# What several users' scripts do, in one job, because starting processes takes longer than their work.
JOB = """
import os, sys
from pathlib import Path
from impart_hf import ExactConfig, ImPartConfig, ImPartRdConfig, QualityTarget, compress, forecast
from impart_hf.merging.merge import merge

base, finetuned, out = sys.argv[1:4]
compress(base, finetuned, out + "/impart-rd", ImPartRdConfig(compression_ratio=8))
compress(base, finetuned, out + "/impart", ImPartConfig(compression_ratio=8))
compress(base, finetuned, out + "/exact", ExactConfig())
text = dict(calibration=out + "/text.txt", calibration_samples=24, calibration_length=32)  # six batches
compress(base, finetuned, out + "/calibrated", ImPartRdConfig(compression_ratio=8), **text)
compress(*sys.argv[4:6], out + "/experts", ImPartRdConfig(compression_ratio=8), **text)
target = QualityTarget(out + "/text.txt", max_kl=0.001, samples=6, length=32, batch_size=2)
compress(base, finetuned, out + "/target", ImPartRdConfig(), target=target)
found = forecast(base, finetuned, ImPartRdConfig(compression_ratio=8), **text)  # one process measures for all
if os.environ.get("WORLD_SIZE", "1") != str(found.process_count):
    sys.exit(f"a job of {found.process_count} processes is forecast")
merge(out + "/merge.yaml", out + "/merged", max_shard_size="100KB")
merge(out + "/merge.yaml", out + "/compressed", compression=ImPartConfig(compression_ratio=8))
"""
# The disk is full for the last process, at the third of its records.
FULL = """
import errno, sys
from impart_hf.cli.main import main
from impart_hf.common import processes
from impart_hf.storage.workspace import Workspace

stored, put_record = [], Workspace.put_record

def put_on_full_disk(self, name, data, about):
    stored.append(name)
    if processes.number() == 1 and len(stored) == 3:
        raise OSError(errno.ENOSPC, "No space left on device")
    put_record(self, name, data, about)

Workspace.put_record = put_on_full_disk
sys.exit(main(["compress", *sys.argv[1:4], "--method", "impart", "--ratio", "8", "--quiet"]))
"""


def launcher(count: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]


def run_job(folder: Path, count: int, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = folder / "program.py"
    path.write_text(program, "utf-8")
    return subprocess.run(
        [*launcher(count), str(path), *map(str, arguments)], capture_output=True, text=True, timeout=600
    )


def write_merge(pair: Pair, folder: Path) -> Path:
    path = folder / "merge.yaml"
    path.write_text(MERGE.format(base=pair.base, finetuned=pair.finetuned), "utf-8")
    return path


@pytest.fixture(scope="module")
def alone(tiny_pair: Pair, pair_of: Callable[[str], Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    for name, method in METHODS.items():
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), folder / name, method)
    (folder / "text.txt").write_text(TEXT, "utf-8")
    for name, pair in (("calibrated", tiny_pair), ("experts", pair_of("mixtral"))):
        compress(
            str(pair.base), str(pair.finetuned), folder / name, METHODS["impart-rd"],
            calibration=str(folder / "text.txt"), calibration_samples=24, calibration_length=32,
        )  # fmt: skip
    target = QualityTarget(str(folder / "text.txt"), max_kl=0.001, samples=6, length=32, batch_size=2)
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), folder / "target", ImPartRdConfig(), target=target)
    config = write_merge(tiny_pair, folder)
    merge(config, folder / "merged", max_shard_size="100KB")
    merge(config, folder / "compressed", compression=METHODS["impart"])
    return folder


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_job_makes_the_bytes_of_one_process(
    count: int, tiny_pair: Pair, pair_of: Callable[[str], Pair], alone: Path, tmp_path: Path
) -> None:
    write_merge(tiny_pair, tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    experts = pair_of("mixtral")
    job = run_job(tmp_path, count, JOB, tiny_pair.base, tiny_pair.finetuned, tmp_path, experts.base, experts.finetuned)
    assert job.returncode == 0, job.stderr[-3000:]
    for name in (*METHODS, "calibrated", "experts", "target", "merged", "compressed"):
        assert differing(tmp_path / name, alone / name) == [], name
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.process
@pytest.mark.slow
def test_a_full_disk_in_one_process_is_named_and_the_rest_is_kept(tiny_pair: Pair, alone: Path, tmp_path: Path) -> None:
    job = run_job(tmp_path, 2, FULL, tiny_pair.base, tiny_pair.finetuned, tmp_path / "impart")
    assert job.returncode != 0
    errors = [line for line in job.stderr.splitlines() if line.startswith("impart-hf: error")]
    assert any("full" in line and "resume" in line for line in errors), job.stderr[-3000:]
    assert any("process 1 of 2 failed on " in line for line in errors), job.stderr[-3000:]
    assert not (tmp_path / "impart").exists()
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "impart", METHODS["impart"])
    assert differing(tmp_path / "impart", alone / "impart") == []


@pytest.mark.process
@pytest.mark.slow
def test_a_job_with_a_killed_process_ends_and_is_resumed(tmp_path: Path) -> None:
    """The launcher names the process; the command, given again, goes on from what all processes have stored."""
    config = tiny_config("llama", num_hidden_layers=16, hidden_size=128, intermediate_size=256)
    pair, output = save_pair(tmp_path, config), tmp_path / "delta"
    command = [*launcher(2), "-m", "impart_hf.cli", "compress", str(pair.base), str(pair.finetuned), str(output)]
    command += ["--method", "impart", "--ratio", "8", "--quiet"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while len(finished(output)) < 6:
            assert job.poll() is None, "the job was over before a process could be killed"
            time.sleep(0.01)
        os.kill(worker(job.pid, 1), signal.SIGKILL)
        _, errors = job.communicate(timeout=120)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    assert "rank      : 1" in errors
    assert not output.exists()
    assert len(finished(output)) >= 6
    compress(str(pair.base), str(pair.finetuned), output, METHODS["impart"])
    compress(str(pair.base), str(pair.finetuned), tmp_path / "unbroken", METHODS["impart"])
    assert differing(output, tmp_path / "unbroken") == []


def worker(launcher_pid: int, rank: int) -> int:
    """Return the process id of the launcher's child with this number."""
    for child in Path(f"/proc/{launcher_pid}/task/{launcher_pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"the launcher has no child with rank {rank}")


def test_a_process_on_another_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the processes of a job need one file system; choose an output folder on it"):
        check_visible(tmp_path / "missing" / "mark")
    check_visible(tmp_path)


@pytest.mark.process
def test_commands_that_do_not_share_work_are_refused_in_a_job(tiny_pair: Pair, tmp_path: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", "impart_hf.cli", "reconstruct", str(tiny_pair.base), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 1
    assert "'reconstruct' runs in one process: start it without accelerate launch or torchrun" in result.stderr
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**environment, "RANK": "1"})
    assert (result.returncode, result.stderr) == (1, "")
