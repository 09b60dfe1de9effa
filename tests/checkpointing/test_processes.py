"""Trainings of two processes, started as users start them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoint_runs import decoded, dense, same_bits
from support.tiny_models import Pair

# Dense checkpoints, deltas, and a run that goes on from one of them; the second time no file system is shared.
JOB = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[3])
from support.checkpoint_runs import load_start, make_trainer
from impart_hf import DeltaCheckpointCallback
from impart_hf.checkpointing import callback as module
from impart_hf.common import processes

base, output = map(Path, sys.argv[1:3])

def train(name, callbacks, checkpoint=None, **settings):
    trainer = make_trainer(load_start(base), output / name, callbacks, **settings)
    trainer.train(resume_from_checkpoint=checkpoint)

train("plain", [])
train("deltas", [DeltaCheckpointCallback()], max_steps=4)
restored = DeltaCheckpointCallback.restore(output / "deltas")
assert restored == str(output / "deltas" / "checkpoint-4")
train("deltas", [DeltaCheckpointCallback()], restored)

see = module.check_visible
def see_nothing(folder):
    if not processes.is_first():
        raise module.OutputError(f"{folder} cannot be seen")
    see(folder)
module.check_visible = see_nothing
train("alone", [DeltaCheckpointCallback()], max_steps=2)
torch.distributed.destroy_process_group()  # whose threads may otherwise abort the process at its end
"""
# An error of the first process at its second save; the other one must not wait for it.
FAILING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from support.checkpoint_runs import load_start, make_trainer
from impart_hf import DeltaCheckpointCallback
from impart_hf.common import processes

base, output = map(Path, sys.argv[1:3])

class Callback(DeltaCheckpointCallback):
    def on_save(self, args, state, control, **more):
        if processes.is_first() and state.global_step == 4:
            (output / "checkpoint-4" / "model.safetensors").unlink()
        super().on_save(args, state, control, **more)

make_trainer(load_start(base), output, [Callback()]).train()
"""


def run_job(program: str, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = folder / "program.py"
    path.write_text(program, "utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(path), *map(str, arguments), str(Path(__file__).parents[1])]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.process
@pytest.mark.slow
def test_two_processes(tiny_pair: Pair, tmp_path: Path) -> None:
    job = run_job(JOB, tmp_path, tiny_pair.base, tmp_path)
    assert job.returncode == 0, job.stderr[-3000:]
    for name, steps in (("deltas", (2, 4, 6)), ("alone", (2,))):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [f"checkpoint-{step}" for step in steps]
        for step in steps:
            checkpoint = tmp_path / name / f"checkpoint-{step}"
            assert not (checkpoint / "model.safetensors").exists() and (checkpoint / "rng_state_1.pth").exists()
            assert same_bits(decoded(checkpoint), dense(tmp_path / "plain" / checkpoint.name))


@pytest.mark.process
@pytest.mark.slow
def test_an_error_of_one_process_ends_both(tiny_pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "out"
    job = run_job(FAILING, tmp_path, tiny_pair.base, output)
    assert job.returncode != 0
    assert "model.safetensors" in job.stderr and "process 0 of 2 failed on " in job.stderr, job.stderr[-3000:]
    assert (output / "checkpoint-2" / "delta_model.safetensors").exists() and not list(output.glob(".*"))
