"""How a compressed model is distilled, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.validation import check_number, check_seed, check_whole

TRAINED = ("codes", "scales")
_RATES = ("scale_rate", "code_rate")
_SHARES = ("scale_share", "warm_up", "validation_share")


@dataclass(frozen=True)
class DistillSettings:
    """How the numbers that records store are trained.

    Attributes:
        steps: of Adam, at least 1.
        blocks: None to train the whole model, towards the fine-tune's logits; else how many decoder layers are trained
            at a time, each group in so many steps, towards the fine-tune's hidden states behind them, or its logits
            behind the last. Not quite as good, and room for so many layers is enough.
        trains: "codes": sizes first, then with them the kept values themselves; "scales": sizes alone, which are the
            singular values of a factored record, or the scales of a direct one.
        scale_rate: learning rate of the logarithms of the factors by which sizes change, in (0, 1]: at 0.01 a step
            changes a size by about 1 %.
        code_rate: learning rate of kept values, in (0, 1], in units of their root mean square; half of it for each bit
            of a code beyond the first.
        scale_share: share of the steps, in (0, 1), before values are trained as well.
        warm_up: share of the steps, in (0, 1), in which a rate comes up to its full height, from when it begins on. All
            rates fall linearly to zero.
        batch_size: sequences a step, over all processes and accumulated gradients, at least 1.
        validation_share: share of the sequences, in (0, 1), that is held out; rounded, but at least one sequence.
        checks: how often the held-out sequences are looked at, and the state is saved, at least 1.
        patience: checks in a row, each worse than the one before, after which training stops; at least 1. Checks while
            rates come up do not count.
        seed: of the order of the sequences, from 0 to 2^32 - 1.
        training: more fields of transformers' TrainingArguments, such as {"gradient_accumulation_steps": 4}.
    """

    steps: int = 300
    blocks: int | None = None
    trains: str = "codes"
    scale_rate: float = 0.05
    code_rate: float = 0.03
    scale_share: float = 0.1
    warm_up: float = 0.1
    batch_size: int = 8
    validation_share: float = 0.125
    checks: int = 8
    patience: int = 3
    seed: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if self.trains not in TRAINED:
            raise ValueError(f"trains must be one of {', '.join(TRAINED)}, got {self.trains!r}")
        counts = ["steps", "batch_size", "checks", "patience", *([] if self.blocks is None else ["blocks"])]
        check_whole(1, **{name: getattr(self, name) for name in counts})
        check_seed(self.seed)
        for name in (*_RATES, *_SHARES):
            value = getattr(self, name)
            check_number(name, value)
            if not (0 < value < 1 or value == 1 and name in _RATES):
                limit = "at most" if name in _RATES else "below"
                raise ValueError(f"{name} must be above 0 and {limit} 1, got {value}")


@dataclass(frozen=True)
class DistillReport:
    """What training did.

    Attributes:
        steps: taken.
        best_step: the one after which the held-out sequences were matched best; 0 if all records stay as they were.
        before, after: KL(fine-tune || compressed) on the held-out sequences, in nats per token; `after` is measured
            with the numbers as they are stored.
        untrained: the tensors whose records were left alone, see `distill`.
    """

    steps: int
    best_step: int
    before: float
    after: float
    untrained: tuple[str, ...]
