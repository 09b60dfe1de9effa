"""Settings and report of distillation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.validation import check_number, check_seed, check_whole_number

TRAINED = ("codes", "scales")
# Names of TrainingArguments' `optim`, each with the bytes of its two moments for every trained number.
OPTIMIZERS = {"adamw_torch": 8, "adamw_bnb_8bit": 2}
_RATES = ("scale_rate", "code_rate")
_SHARES = ("scale_share", "warm_up", "validation_share")


@dataclass(frozen=True)
class DistillSettings:
    """How the numbers in records are trained.

    Attributes:
        steps: steps of Adam, at least 1.
        blocks: None to train the whole model towards the fine-tune's logits; otherwise the number of decoder layers to
            train at a time. Each group takes `steps` steps, towards the fine-tune's hidden states after it, or its
            logits after the last layer. Results are slightly worse, but memory holds only that many layers.
        trains: "codes": column scales first, then column scales and kept values together; "scales": only column
            scales, which are the singular values of a factored record or the scales of a direct one.
        scale_rate: learning rate of the logarithms of the factors on column scales, in (0, 1]: at 0.01 a step changes
            a scale by about 1 %.
        code_rate: learning rate of kept values, in (0, 1], in units of their root mean square; halved for each bit of
            a code beyond the first.
        scale_share: share of the steps, in (0, 1), before kept values are trained too.
        warm_up: share of the steps, in (0, 1), over which each learning rate rises to its full value. Then all rates
            fall linearly to zero.
        batch_size: sequences per step, over all processes and accumulated gradients, at least 1.
        validation_share: share of the sequences, in (0, 1), that is held out; rounded, but at least one sequence.
        checks: number of evaluations on the held-out sequences, each with a checkpoint; at least 1.
        patience: number of successive checks, each worse than the one before, after which training stops; at least 1.
            Checks before all rates have reached their full value do not count.
        seed: seed of the order of the sequences, from 0 to 2^32 - 1.
        optim: optimizer, by its name in TrainingArguments: "adamw_torch", or "adamw_bnb_8bit", bitsandbytes' with
            moments of 8 bits. There is no weight decay, so both are Adam.
        gradient_checkpointing: keep only the inputs of every decoder layer for the backward pass, and run the layer
            again there; None to do so if activations would not fit in the memory that is free.
        micro_batch_size: sequences that a process runs at a time, at least 1; a step adds up their gradients. None for
            as many as fit in the memory that is free.
        training: additional fields of transformers' TrainingArguments, such as {"gradient_accumulation_steps": 4}.
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
    optim: str = "adamw_torch"
    gradient_checkpointing: bool | None = None
    micro_batch_size: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if self.trains not in TRAINED:
            raise ValueError(f"trains must be one of {', '.join(TRAINED)}, got {self.trains!r}")
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"optim must be one of {', '.join(OPTIMIZERS)}, got {self.optim!r}")
        if self.gradient_checkpointing not in (None, True, False):
            raise ValueError(f"gradient_checkpointing must be true, false or None, got {self.gradient_checkpointing!r}")
        optional = [name for name in ("blocks", "micro_batch_size") if getattr(self, name) is not None]
        counts = ["steps", "batch_size", "checks", "patience", *optional]
        check_whole_number(1, **{name: getattr(self, name) for name in counts})
        check_seed(self.seed)
        for name in (*_RATES, *_SHARES):
            value = getattr(self, name)
            check_number(name, value)
            if not (0 < value < 1 or value == 1 and name in _RATES):
                limit = "at most" if name in _RATES else "below"
                raise ValueError(f"{name} must be above 0 and {limit} 1, got {value}")


@dataclass(frozen=True)
class DistillReport:
    """The result of distillation.

    Attributes:
        steps: steps taken.
        best_step: the step with the lowest loss on the held-out sequences; 0 if all records are unchanged.
        before, after: KL(fine-tune || compressed) on the held-out sequences, in nats per token; `after` is measured
            with the numbers as they are stored.
        untrained: the tensors whose records were not trained, see `distill`.
    """

    steps: int
    best_step: int
    before: float
    after: float
    untrained: tuple[str, ...]
