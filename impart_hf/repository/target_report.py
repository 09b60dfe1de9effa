"""The report on a search for the smallest repository that keeps a target."""

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TriedRatio:
    """One ratio that was tried.

    Attributes:
        ratio: the requested compression ratio.
        bytes: size of its repository.
        kl: KL(fine-tune || delta) on the validation text, nats per token.
        loss: cross-entropy of the text, nats per token.
        seconds: time to compress and measure it.
    """

    ratio: float
    bytes: int
    kl: float
    loss: float
    seconds: float

    def summary(self) -> dict[str, float]:
        """Return the entry in the model card."""
        return {"ratio": self.ratio, "bytes": self.bytes, "kl": _digits(self.kl), "loss": _digits(self.loss)}


@dataclass(frozen=True)
class TargetReport:
    """The result of a search.

    Attributes:
        target: the target in words.
        limit: the most that is allowed, nats per token.
        measured: what was measured of the repository, at most the limit, nats per token.
        text: public name of the validation text.
        tokens: number of its tokens that were predicted.
        reference_loss: the fine-tune's cross-entropy on them, nats per token.
        tried: the ratios that were tried, in that order.
        chosen: that of the repository.
        remark: what the user should know of the result, or "".
    """

    target: str
    limit: float
    measured: float
    text: str
    tokens: int
    reference_loss: float
    tried: tuple[TriedRatio, ...]
    chosen: TriedRatio
    remark: str = ""

    @property
    def evaluations(self) -> int:
        """Number of ratios that were tried."""
        return len(self.tried)

    def summary(self) -> str:
        """Return the target and what was measured in one line, as config.json records it."""
        tried = "1 ratio" if self.evaluations == 1 else f"{self.evaluations} ratios"
        return f"{self.target} on {self.text}: {self.measured:.4g} measured on {self.tokens} tokens, {tried} tried"

    def card_data(self) -> dict[str, Any]:
        """Return the model card's entry on the search."""
        entry: dict[str, Any] = {"target": self.target, "text": self.text, "tokens": self.tokens}
        entry |= {"measured": _digits(self.measured), "fine_tune_loss": _digits(self.reference_loss)}
        entry |= {"evaluations": self.evaluations, "tried": [tried.summary() for tried in self.tried]}
        return {"impart_hf_target": entry}

    def widest(self, count: int) -> "TargetReport":
        """Return a report whose entries are at least as long as those after `count` ratios, to set bytes aside."""
        longest = -1.234e-100
        tried = TriedRatio(1.234e-100, 10**13, longest, longest, 0.0)
        return replace(self, measured=longest, reference_loss=longest, tried=(tried,) * count)

    def table(self) -> str:
        """Return a table with a line for each ratio, from the lowest to the highest, the chosen one marked."""
        lines = [f"{'ratio':>9}{'bytes':>14}{'KL, nats/token':>17}{'loss, nats/token':>18}"]
        for tried in sorted(self.tried, key=lambda tried: tried.ratio):
            mark = "  chosen" if tried == self.chosen else ""
            lines.append(f"{tried.ratio:>9g}{tried.bytes:>14}{tried.kl:>17.4g}{tried.loss:>18.5f}{mark}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "evaluations": self.evaluations}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
