"""The pairs of models that the study compresses: given ones, and two that it trains itself."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import train_pair
from exercises import write_exercises
from train_pair import PairSettings

_EXERCISES = "exercises.jsonl"


@dataclass(frozen=True)
class Pair:
    """A base, a fine-tune, and text.

    Attributes:
        train: text that the fine-tune was trained on, for calibration and distillation.
        heldout: text of the same kind that it was not trained on, to measure on.
        other: text of the base's kind, also measured on, or None.
    """

    name: str
    base: Path
    finetuned: Path
    train: Path
    heldout: Path
    other: Path | None = None

    @classmethod
    def given(cls, text: str) -> Pair:
        """Parse NAME=BASE,FINETUNED,TRAIN_TEXT,HELDOUT_TEXT[,OTHER_TEXT].

        Raises:
            ValueError: for anything else.
        """
        name, _, rest = text.partition("=")
        paths = [Path(part) for part in rest.split(",") if part]
        if not name or len(paths) not in (4, 5):
            raise ValueError(f"--pair must be NAME=BASE,FINETUNED,TRAIN_TEXT,HELDOUT_TEXT[,OTHER_TEXT], got {text!r}")
        return cls(name, *paths)

    def digest(self) -> str:
        """Return a hash of all weights and texts, which identifies the pair."""
        digest = hashlib.sha256()
        for folder in (self.base, self.finetuned):
            for path in sorted(folder.glob("*.safetensors")):
                digest.update(path.read_bytes())
        for path in filter(None, (self.train, self.heldout, self.other)):
            digest.update(path.read_bytes())
        return digest.hexdigest()


# The pairs that the study trains. The base's text is this Python's standard library. All heads have their own keys and
# values: with fewer KV heads, the small matrices could not reach high ratios with the other methods.
TRAINED: Mapping[str, PairSettings] = {
    # A small delta: a short fine-tune at a low learning rate, on the language reference
    "light": PairSettings(
        answers=0, hidden_size=256, layers=4, heads=8, kv_heads=8, intermediate_size=512, vocab_size=2048,
        base_steps=400, finetune_steps=100, lr=2e-3, finetune_lr=1e-4, batch_size=4, sequence_length=256,
    ),
    # Wider and shallower, with an output projection of its own, and a strong fine-tune on exercises
    "wide": PairSettings(
        finetune_text=(Path(_EXERCISES),), answers=0,
        hidden_size=384, layers=2, heads=6, kv_heads=6, intermediate_size=768, vocab_size=1024, tied=False,
        base_steps=400, finetune_steps=200, lr=2e-3, finetune_lr=3e-4, batch_size=4, sequence_length=256, seed=1,
    ),
}  # fmt: skip


def trained(name: str, work: Path, settings: PairSettings | None = None) -> Pair:
    """Return a pair of `TRAINED`, in a folder of `work`; it is trained if it does not exist yet.

    Raises:
        train_pair.PairError: if it cannot be trained here.
    """
    settings = settings or TRAINED[name]
    if settings.finetune_text == (Path(_EXERCISES),):
        exercises = work / _EXERCISES
        write_exercises(exercises)
        settings = dataclasses.replace(settings, finetune_text=(exercises,))
    folder = work / "pairs" / name
    train_pair.train_pair(folder, settings)
    texts = (train_pair.FINETUNE_TRAIN, train_pair.FINETUNE_HELDOUT, train_pair.BASE_HELDOUT)
    return Pair(name, folder / "base", folder / "finetuned", *(folder / text for text in texts))
