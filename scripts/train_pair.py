"""Train a small LLaMA and a full fine-tune of it, from scratch, on public text: a real pair without any download.

    python scripts/train_pair.py PAIR                                   # a minute or so, text of this Python
    python scripts/train_pair.py PAIR --preset full --base-text books/ code/ --finetune-text train.jsonl   # an hour

`demo` trains the base on the standard library's source code and the fine-tune on the language reference and on records
with exact answers (exact_answers.py), so the numbers depend on the Python version. `full` has the shape of the pair
that the project's results were measured on; you provide its text. With step counts (not minutes), the same seed,
versions, processor and number of threads give the same bytes. PAIR then holds

    base/, finetuned/                        LlamaForCausalLM in bfloat16, tokenizer, generation_config
    base_heldout.txt, finetune_heldout.txt   text that neither model was trained on
    finetune_train.txt                       the fine-tune's text, for calibration
    tasks/                                   held-out records with exact answers, as tasks of lm-eval (demo only)
    pair.json                                settings, versions, perplexities, size of the delta
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # OpenMP reads this when torch is loaded. Threads that spin while they wait make a run several times slower if
    # another program uses one of the cores; threads that sleep cost nothing measurable here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import exact_answers
import pair_text
import pair_training
import torch
import transformers
from pair_text import PairError
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BASE_HELDOUT, FINETUNE_HELDOUT, FINETUNE_TRAIN = "base_heldout.txt", "finetune_heldout.txt", "finetune_train.txt"
RECORD = "pair.json"
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_PAIR_FILES = tuple(f"{model}/{name}" for model in ("base", "finetuned") for name in _MODEL_FILES) + (
    BASE_HELDOUT,
    FINETUNE_HELDOUT,
    FINETUNE_TRAIN,
)
_ENTRIES = {"base", "finetuned", BASE_HELDOUT, FINETUNE_HELDOUT, FINETUNE_TRAIN, exact_answers.TASKS, RECORD}


@dataclasses.dataclass(frozen=True)
class PairSettings:
    """The settings of the training. The defaults are the `demo` preset.

    Each stage has either `*_steps` or `*_minutes`. Minutes are wall-clock time and give a different pair on every
    machine.
    """

    base_text: tuple[Path, ...] | None = None  # files and folders; None: this Python's standard library
    finetune_text: tuple[Path, ...] | None = None  # files and folders; None: this Python's language reference
    answers: int = 30_000  # records with exact answers that the fine-tune also learns; 0 for none
    answer_kinds: tuple[str, ...] = ("dates", "json")  # what a model of this size learns in a minute
    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    intermediate_size: int = 704
    vocab_size: int = 2048
    tied: bool = True  # input embeddings and output projection are one matrix
    base_steps: int | None = 300
    base_minutes: float | None = None
    finetune_steps: int | None = 480
    finetune_minutes: float | None = None
    lr: float = 1.5e-3
    finetune_lr: float = 1.5e-3
    batch_size: int = 4  # sequences per step
    sequence_length: int = 128  # tokens
    hold_out_every: int = 10  # one document in this number is held out
    evaluation_tokens: int = 16_384  # tokens of each held-out text on which perplexity is measured
    seed: int = 0

    @classmethod
    def full(cls, base_text: Sequence[Path], finetune_text: Sequence[Path]) -> PairSettings:
        """Return the shape and the training time of the pair that the project's results were measured on."""
        return cls(
            base_text=tuple(base_text),
            finetune_text=tuple(finetune_text),
            answers=0,
            hidden_size=320,
            layers=8,
            heads=10,
            kv_heads=5,
            intermediate_size=864,
            vocab_size=4096,
            base_steps=None,
            base_minutes=45.0,
            finetune_steps=None,
            finetune_minutes=15.0,
            lr=1.5e-3,
            finetune_lr=3e-4,
            batch_size=8,
            sequence_length=256,
            evaluation_tokens=65_536,
        )

    def check(self) -> None:
        """Raise `PairError` for settings that are not valid."""
        for name in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "batch_size"):
            if getattr(self, name) < 1:
                raise PairError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % (2 * self.heads):
            raise PairError(f"hidden_size {self.hidden_size} is not an even multiple of {self.heads} heads")
        if self.heads % self.kv_heads:
            raise PairError(f"{self.heads} heads are not a multiple of {self.kv_heads} kv_heads")
        if self.vocab_size < pair_text.SMALLEST_VOCABULARY:
            raise PairError(f"vocab_size {self.vocab_size} must be at least {pair_text.SMALLEST_VOCABULARY}")
        if self.sequence_length < 2 or self.hold_out_every < 2:
            raise PairError("sequence_length and hold_out_every must be at least 2")
        for stage in ("base", "finetune"):
            steps, minutes = getattr(self, f"{stage}_steps"), getattr(self, f"{stage}_minutes")
            if (steps is None) == (minutes is None):
                raise PairError(f"give either {stage}_steps or {stage}_minutes")
            if (steps if minutes is None else minutes) <= 0:
                raise PairError(f"{stage}_steps or {stage}_minutes must be more than 0")
        if self.answers < 0:
            raise PairError(f"answers is {self.answers}; it must not be negative")
        if strange := [kind for kind in self.answer_kinds or ("",) if kind not in exact_answers.KINDS]:
            raise PairError(f"answer_kinds has {strange[0]!r}; choose from {', '.join(exact_answers.KINDS)}")
        if self.lr <= 0 or self.finetune_lr <= 0:
            raise PairError("lr and finetune_lr must be more than 0")


def train_pair(output_dir: Path, settings: PairSettings, *, force: bool = False) -> None:
    """Train the pair of `settings` and write it to `output_dir`, completely or not at all.

    An existing finished pair is kept, whatever it was trained with, unless `force` is given. A folder that holds
    anything else is never replaced. Bad input raises `PairError`.
    """
    settings.check()
    output_dir = Path(output_dir)
    if _is_pair(output_dir):
        if not force:
            same = _recorded_settings(output_dir) == _as_json(settings)
            note = "" if same else " (trained with other settings; --force trains it again)"
            print(f"{output_dir}: using the existing finished pair{note}")
            return
        others = sorted({entry.name for entry in output_dir.iterdir()} - _ENTRIES)
        if others:
            raise PairError(
                f"{output_dir} holds more than the pair ({others[0]}), which --force would delete; move it first"
            )
    elif output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise PairError(f"{output_dir} exists and is not a pair of models; choose another folder")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        with pair_training.quiet():
            _write_pair(new, settings)
        if output_dir.exists():
            output_dir.rename(Path(scratch, "old"))
        new.rename(output_dir)


def _write_pair(folder: Path, settings: PairSettings) -> None:
    started = time.perf_counter()
    base_train, base_held = pair_text.hold_out(
        pair_text.standard_library() if settings.base_text is None else pair_text.read_documents(settings.base_text),
        settings.hold_out_every,
    )
    finetune_train, finetune_held = pair_text.hold_out(
        pair_text.language_reference()
        if settings.finetune_text is None
        else pair_text.read_documents(settings.finetune_text),
        settings.hold_out_every,
    )
    length = settings.sequence_length
    tokenizer = pair_text.train_tokenizer(base_train, settings.vocab_size, max(512, length))
    # All text is checked before any training, so that errors do not appear after 45 minutes.
    evaluation: dict[str, torch.Tensor] = {}
    for name, documents in ((BASE_HELDOUT, base_held), (FINETUNE_HELDOUT, finetune_held)):
        text = pair_text.join(documents)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        evaluation[name] = pair_text.evaluation_blocks(tokenizer, text, length, settings.evaluation_tokens)
    base_blocks = pair_text.training_blocks(tokenizer, base_train, length, settings.batch_size)
    finetune_blocks = pair_text.training_blocks(tokenizer, finetune_train, length, settings.batch_size)
    finetune_labels = finetune_blocks
    if settings.answers:
        records = _write_answers(folder, settings)
        finetune_train = pair_text.interleaved(finetune_train, exact_answers.passages_of(records))
        blocks, labels = pair_text.answer_blocks(tokenizer, records, length)
        finetune_blocks, finetune_labels = torch.cat([finetune_blocks, blocks]), torch.cat([finetune_labels, labels])
    (folder / FINETUNE_TRAIN).write_text(pair_text.join(finetune_train), encoding="utf-8", newline="\n")

    model = _new_model(settings, tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {torch.get_num_threads()} threads", flush=True)
    stages = (
        ("base", base_blocks, base_blocks, settings.base_steps, settings.base_minutes, settings.lr),
        (
            "finetuned", finetune_blocks, finetune_labels, settings.finetune_steps, settings.finetune_minutes,
            settings.finetune_lr,
        ),
    )  # fmt: skip
    perplexities: dict[str, dict[str, float]] = {}
    base_weights: dict[str, torch.Tensor] = {}
    for name, blocks, labels, steps, minutes, lr in stages:
        pair_training.train(
            model, blocks, name, labels=labels, steps=steps, minutes=minutes, lr=lr, batch_size=settings.batch_size,
            seed=settings.seed,
        )  # fmt: skip
        # The fine-tune starts from the weights as saved in bfloat16, so that the delta is the difference of the files.
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        model.float()
        perplexities[name] = {text: pair_training.perplexity(model, ids) for text, ids in evaluation.items()}
        if name == "base":
            base_weights = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    delta = pair_training.delta_size(base_weights, dict(model.named_parameters()))

    print(f"{'perplexity':<12}{BASE_HELDOUT:>22}{FINETUNE_HELDOUT:>22}")
    for name, row in perplexities.items():
        print(f"{name:<12}{row[BASE_HELDOUT]:>22.2f}{row[FINETUNE_HELDOUT]:>22.2f}")
    seconds = time.perf_counter() - started
    print(f"mean |dW|/|W| of the linear layers {delta:.3f}; {seconds:.0f} s in all")
    record = {
        "settings": _as_json(settings),
        "parameters": model.num_parameters(),
        "perplexity": perplexities,
        "mean_relative_delta": delta,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", newline="\n")


def _write_answers(folder: Path, settings: PairSettings) -> list[exact_answers.ExactRecord]:
    """Write the tasks, and return the records to train on."""
    make = functools.partial(exact_answers.exact_records, seed=settings.seed, kinds=settings.answer_kinds)
    records = make(settings.answers)
    held_out = make(exact_answers.TEST_RECORDS * len(settings.answer_kinds), held_out=True)
    exact_answers.write_tasks(folder / exact_answers.TASKS, records, held_out)
    return records


def _new_model(settings: PairSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained base, float32; a seed always gives the same weights."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            head_dim=settings.hidden_size // settings.heads,
            tie_word_embeddings=settings.tied,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            # At these sizes PyTorch's fused attention on a CPU takes 1.7 times as long as plain attention if bfloat16
            # products are fast, and 0.9 times as long otherwise.
            attn_implementation="eager",
        )
    )
    # For padding batches of prompts. In the model's configuration it would exclude the token's embedding from training.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    return model


# ---- the folder ----------------------------------------------------------------------------------------------------


def _is_pair(folder: Path) -> bool:
    # The folder gets its name only when it is complete, so checking the names is enough.
    return all((folder / name).is_file() for name in _PAIR_FILES)


def _as_json(settings: PairSettings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def _recorded_settings(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- command line --------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_pair.py",
        description="Train a small LLaMA and a full fine-tune of it, from scratch, on public text.",
        epilog="Options that are not given come from the preset. Nothing is downloaded.",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the pair")
    parser.add_argument(
        "--preset", choices=("demo", "full"), default="demo", help="settings to start from (default: demo)"
    )
    parser.add_argument("--force", action="store_true", help="train again if a finished pair exists")
    texts = parser.add_argument_group("text (default of demo: the standard library, the language reference)")
    texts.add_argument("--base-text", type=Path, nargs="+", metavar="PATH", help="files and folders of text")
    texts.add_argument(
        "--finetune-text", type=Path, nargs="+", metavar="PATH", help=f"text or jsonl; {pair_text.GSM8K_HINT}"
    )
    texts.add_argument(
        "--answers", type=int, metavar="N", help="records with exact answers that the fine-tune also learns, 0 for none"
    )
    texts.add_argument(
        "--answer-kinds", type=lambda text: text.split(","), metavar="KIND,…", help="kinds of them (default: all)"
    )
    shape = parser.add_argument_group("shape of the models")
    for name in ("hidden-size", "layers", "heads", "kv-heads", "intermediate-size", "vocab-size"):
        shape.add_argument(f"--{name}", type=int, metavar="N")
    tied = shape.add_mutually_exclusive_group()
    tied.add_argument(
        "--tied",
        action="store_true",
        default=None,
        help="one matrix for input embeddings and output projection (default)",
    )
    tied.add_argument("--untied", action="store_false", dest="tied", default=None)
    training = parser.add_argument_group("training")
    for stage in ("base", "finetune"):
        length = training.add_mutually_exclusive_group()
        length.add_argument(f"--{stage}-steps", type=int, metavar="N")
        length.add_argument(
            f"--{stage}-minutes", type=float, metavar="M", help="wall-clock minutes; not exactly repeatable"
        )
    training.add_argument("--lr", type=float, help="peak learning rate of the base")
    training.add_argument("--finetune-lr", type=float)
    training.add_argument("--batch-size", type=int, metavar="N", help="sequences per step")
    training.add_argument("--sequence-length", type=int, metavar="N", help="tokens per sequence")
    training.add_argument("--seed", type=int, metavar="N")
    return parser


def _settings_of(options: argparse.Namespace) -> PairSettings:
    if options.preset == "full":
        if options.base_text is None:
            raise PairError("the full preset needs --base-text: files or folders of about 20 MB of plain text")
        if options.finetune_text is None:
            raise PairError(f"the full preset needs --finetune-text; {pair_text.GSM8K_HINT}")
        preset = PairSettings.full(options.base_text, options.finetune_text)
    else:
        preset = PairSettings()
    names = {field.name for field in dataclasses.fields(PairSettings)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    for name, value in list(given.items()):
        if isinstance(value, list):
            given[name] = tuple(value)
    for stage in ("base", "finetune"):  # given steps replace the preset's minutes, and vice versa
        if f"{stage}_steps" in given:
            given[f"{stage}_minutes"] = None
        elif f"{stage}_minutes" in given:
            given[f"{stage}_steps"] = None
    return dataclasses.replace(preset, **given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        train_pair(options.output, _settings_of(options), force=options.force)
    except (PairError, OSError) as error:
        print(f"train_pair.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
