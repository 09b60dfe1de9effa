"""What a delta repository is to keep, instead of a ratio: the user's target.

The command line makes one before any work, so nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..common.validation import check_positive, check_whole_number

if TYPE_CHECKING:
    from ..calibration.text import CalibrationSource


@dataclass(frozen=True)
class QualityTarget:
    """The quality that a delta repository is to keep on a validation text; exactly one limit must be given.

    Attributes:
        validation: validation text, of the kinds that `compress` takes for calibration.
        max_kl: the most KL(fine-tune || delta), in nats per token.
        max_loss_increase: the most by which the text's cross-entropy may be above the fine-tune's: a number of nats per
            token, or a share of the fine-tune's as a string such as "0.5%".
        samples, length: the most sequences of the text, and tokens per sequence.
        batch_size: sequences evaluated at a time.
    """

    validation: CalibrationSource
    max_kl: float | None = None
    max_loss_increase: float | str | None = None
    samples: int = 64
    length: int = 512
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if self.validation is None:
            raise ValueError("a target is kept on a text, but validation is None: give a validation text")
        if (self.max_kl is None) == (self.max_loss_increase is None):
            raise ValueError("a target has one limit: give either max_kl or max_loss_increase")
        if self.max_kl is not None:
            check_positive(max_kl=self.max_kl)
        else:
            _increase(self.max_loss_increase)
        check_whole_number(1, samples=self.samples, batch_size=self.batch_size)
        check_whole_number(2, length=self.length)

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"KL from the fine-tune at most {self.max_kl:g} nats/token"  # without a "|", for the card's table
        number, is_share = _increase(self.max_loss_increase)
        return (
            f"cross-entropy at most {f'{number:g} %' if is_share else f'{number:g} nats/token'} above the fine-tune's"
        )

    def limit(self, reference_loss: float) -> float:
        """Return the limit in nats per token.

        Args:
            reference_loss: the fine-tune's cross-entropy on the text, nats per token.
        """
        if self.max_kl is not None:
            return float(self.max_kl)
        number, is_share = _increase(self.max_loss_increase)
        return number / 100 * reference_loss if is_share else number

    def measured(self, divergence: float, loss: float, reference_loss: float) -> float:
        """Return the value that is limited, in nats per token, from a delta's KL and cross-entropy."""
        return divergence if self.max_kl is not None else loss - reference_loss


def _increase(value: float | str | None) -> tuple[float, bool]:
    """Return the number of a limit on an increase, and whether it is in percent.

    Raises:
        ValueError: if it is not a finite number above 0, with or without a percent sign.
    """
    text = str(value).strip()
    try:
        number = math.nan if isinstance(value, bool) else float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(
            f'max_loss_increase must be a number above 0 of nats/token, or of percent such as "0.5%", got {value!r}'
        )
    return number, text.endswith("%")
