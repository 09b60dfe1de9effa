"""A small pair as `impart-hf-reproduce --small` takes it, and the command in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from impart_hf.reproduce.main import main
from support.lm_eval_task import TEXT, write_task
from support.tiny_models import save_pair, tiny_config

# Large enough for all methods at ratio 32, and with two layers between the first and the last.
_SHAPE = {"num_hidden_layers": 4, "hidden_size": 192, "intermediate_size": 384}


def make_small_pair(folder: Path) -> Path:
    """A pair with texts and a task, in the layout of `scripts/train_pair.py`."""
    save_pair(folder, tiny_config("llama-tied", **_SHAPE))
    for number, name in enumerate(("finetune_train.txt", "finetune_heldout.txt", "base_heldout.txt")):
        (folder / name).write_text(TEXT[4000 * number : 4000 * (number + 1)], "utf-8")
    (folder / "tasks").mkdir()
    write_task(folder / "tasks")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """The exit status of the command, and what it prints on both streams."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()
