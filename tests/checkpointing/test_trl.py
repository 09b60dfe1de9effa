"""TRL's trainers are Trainers: the same callback."""

from __future__ import annotations

from pathlib import Path

import datasets
import trl
from support.checkpoint_runs import decoded, dense, load_start, same_bits
from support.tiny_models import Pair, tiny_tokenizer

from impart_hf import DeltaCheckpointCallback


def test_supervised_fine_tuning(tiny_pair: Pair, tmp_path: Path) -> None:
    texts = datasets.Dataset.from_dict({"text": ["A fine-tuned model is its base model and a small difference."] * 8})

    def train(name: str, callbacks: list[DeltaCheckpointCallback], checkpoint: str | None = None) -> None:
        args = trl.SFTConfig(
            output_dir=str(tmp_path / name), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
            bf16=False, max_length=16, report_to="none", disable_tqdm=True, seed=1, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            load_start(tiny_pair.base), args, train_dataset=texts, processing_class=tiny_tokenizer(),
            callbacks=callbacks,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)

    train("plain", [])
    train("out", [DeltaCheckpointCallback()])
    for step in (2, 4):
        expected = dense(tmp_path / "plain" / f"checkpoint-{step}")
        assert same_bits(decoded(tmp_path / "out" / f"checkpoint-{step}"), expected)
    train("out", [DeltaCheckpointCallback()], DeltaCheckpointCallback.restore(tmp_path / "out" / "checkpoint-2"))
    assert same_bits(decoded(tmp_path / "out" / "checkpoint-4"), dense(tmp_path / "plain" / "checkpoint-4"))
