"""Measure what a save costs: the Trainer's own checkpoints against exact deltas of the start and of the last.

A base, such as the one that real_pair.py makes, is trained for a few steps by transformers' Trainer, once for each
dtype of the weights. Its dense checkpoints are then handed to DeltaCheckpointCallback as the Trainer does it, so that
every way stores the same weights. The callback's time comes on top of the Trainer's own, which writes first. Every
checkpoint is restored at the end and compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerControl, TrainerState, TrainingArguments

from impart_hf import DeltaCheckpointCallback
from impart_hf.calibration.text import BUILT_IN, calibration_tokens
from impart_hf.checkpointing.folders import checkpoint_of, checkpoints_in, dense_files
from impart_hf.modeling.checkpoints import Checkpoint, same_values
from impart_hf.modeling.model_files import HubOptions


class Sequences(torch.utils.data.Dataset):
    """Sequences of tokens, int64 (sequences, length), as inputs and labels."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class TimedTrainer(Trainer):
    """A Trainer that measures how long it writes the model.

    Attributes:
        seconds: of every save.
    """

    seconds: list[float]

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        super().save_model(*args, **kwargs)
        self.seconds.append(time.perf_counter() - started)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def training_settings(output: Path, options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output), max_steps=options.steps, save_steps=options.save_every, save_only_model=True,
        per_device_train_batch_size=options.batch_size, learning_rate=options.learning_rate, use_cpu=True,
        report_to="none", disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip


def train(base: Path, dtype: str, output: Path, options: argparse.Namespace) -> tuple[Any, list[float]]:
    """Train with dense checkpoints, and return the model and the seconds of every save."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = calibration_tokens(options.text or BUILT_IN, tokenizer, samples=256, length=options.length)
    trainer = TimedTrainer(model=model, args=training_settings(output, options), train_dataset=Sequences(tokens))
    trainer.seconds = []
    trainer.train()
    return model, trainer.seconds


def handed_over(dense: Path, way: str, model: Any, base: Path, output: Path, options: argparse.Namespace) -> dict:
    """Give a run's dense checkpoints to the callback, one after the other, and return means over them."""
    callback = DeltaCheckpointCallback(str(base), of=way)
    args, state, control = training_settings(output, options), TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control, model=model)
    seconds = []
    for source in checkpoints_in(dense):
        state.global_step = int(source.name.rpartition("-")[2])
        target = checkpoint_of(output, state.global_step)
        target.mkdir()
        for path in source.iterdir():
            os.link(path, target / path.name)
        started = time.perf_counter()
        callback.on_save(args, state, control)
        seconds.append(time.perf_counter() - started)
    callback.on_train_end(args, state, control)  # until then the last checkpoint may keep its dense weights
    sizes = [folder_bytes(checkpoint) for checkpoint in checkpoints_in(output)]
    restoring = []
    for checkpoint in checkpoints_in(output):
        started = time.perf_counter()
        callback.restore(checkpoint)
        restoring.append(time.perf_counter() - started)
        check_same(checkpoint, dense / checkpoint.name)
        for path in dense_files(checkpoint):
            path.unlink()
    return {"seconds": seconds, "bytes": sizes, "restoring": restoring}


def check_same(restored: Path, dense: Path) -> None:
    """Check that two checkpoints have the same weights.

    Raises:
        SystemExit: if not.
    """
    with tempfile.TemporaryDirectory(dir=restored.parent) as folder:
        (Path(folder) / "config.json").write_bytes((dense / "config.json").read_bytes())
        for path in dense_files(restored):
            os.link(path, Path(folder) / path.name)
        one, other = Checkpoint(folder, HubOptions()), Checkpoint(str(dense), HubOptions())
        if one.names() != other.names() or not all(same_values(one.tensor(n), other.tensor(n)) for n in one.names()):
            raise SystemExit(f"{restored} is not {dense}")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each dtype and way: means over the saves."""
    rows = []
    for run in runs:
        plain = run["ways"]["save_pretrained"]
        for way, found in run["ways"].items():
            own = mean(found["seconds"])
            total = own if found is plain else own + mean(plain["seconds"])
            restoring = found.get("restoring")
            rows.append(
                {
                    "weights": run["dtype"],
                    "checkpoint": way if found is plain else f"delta of the {way}",
                    "MB a save": f"{mean(found['bytes']) / 1e6:.1f}",
                    "of save_pretrained": f"{mean(found['bytes']) / mean(plain['bytes']):.3f}",
                    "s a save": f"{total:.2f}",
                    "of that the callback, s": "" if found is plain else f"{own:.2f}",
                    "restoring the last, s": "" if restoring is None else f"{restoring[-1]:.2f}",
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_checkpoints.py", description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder that holds the model to train as base/, from real_pair.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints.json")
    parser.add_argument("--dtypes", type=measure.comma_separated(str), default=["bfloat16", "float32"],
                        help="dtypes of the trained weights (default: bfloat16,float32)")  # fmt: skip
    parser.add_argument("--ways", type=measure.comma_separated(str), default=["start", "last"],
                        help="what deltas are of (default: start,last)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=40, help="steps of training (default: 40)")
    parser.add_argument("--save-every", type=int, default=10, help="steps between two saves (default: 10)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (default: 64)")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a step (default: 2)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="default: 1e-5")
    parser.add_argument("--text", help="text to train on; the built-in one by default")
    options = parser.parse_args(argv)
    base = options.work / "base"
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("work", "output")}
    runs: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory(dir=options.output) as folder:
            dense = Path(folder) / "dense"
            model, seconds = train(base, dtype, dense, options)
            sizes = [folder_bytes(checkpoint) for checkpoint in checkpoints_in(dense)]
            ways: dict[str, Any] = {"save_pretrained": {"seconds": seconds, "bytes": sizes}}
            for way in options.ways:
                ways[way] = handed_over(dense, way, model, base, Path(folder) / way, options)
            runs.append({"dtype": dtype, "ways": ways})
            results = {"machine": measure.machine(), "settings": settings, "runs": runs}
            (options.output / "checkpoints.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    print(measure.table(table_rows(runs)))
    print(f"\n{measure.machine_line()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
