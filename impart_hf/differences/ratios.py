"""What `impart-rd` would lose at several ratios, foretold from singular values: nothing is encoded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..compression.plan import UnreachableRatioError, make_plan
from ..methods import ImPartRdConfig
from ..repository.kl_forecast import TensorErrors, kl_forecast
from .tensor_diff import TensorDiff

RATIOS = (8, 16, 32, 64, 128)
# What config.json and the model card take, about; and no repository is split.
_CONFIG_BYTES, _CARD_BYTES, _UNSPLIT = 3000, 1536, 1 << 62


@dataclass(frozen=True)
class RatioEstimate:
    """What is to be expected of `impart-rd` at a ratio, without calibration.

    Attributes:
        ratio: the compression ratio.
        bytes: the most that the repository takes.
        share: the forecast of KL(fine-tune || delta) / KL(fine-tune || base), and its range: least, forecast, largest.
    """

    ratio: float
    bytes: int
    share: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ratio_estimates(
    tensors: Sequence[TensorDiff], checkpoint_bytes: int, ratios: Sequence[float] = RATIOS
) -> list[RatioEstimate]:
    """Return estimates for ratios that can be reached; none if no matrix changed or singular values were left out.

    Bytes are shared out as a compression shares them out, and the errors that this is expected to leave are forecast
    as those of a repository are (docs/methods/kl-forecast.md).

    Args:
        checkpoint_bytes: size of the fine-tune's weight files.
    """
    spectra = {tensor.name: tensor.spectra for tensor in tensors if tensor.spectra}
    estimates: list[RatioEstimate] = []
    for ratio in ratios if spectra else ():
        method = ImPartRdConfig(compression_ratio=ratio)
        try:
            plan = make_plan(
                [tensor.plan() for tensor in tensors], method, checkpoint_bytes, _CONFIG_BYTES, _CARD_BYTES, _UNSPLIT
            )
        except UnreachableRatioError:
            break
        encoded = [(planned, one) for planned in plan.encoded for one in spectra[planned.name]]
        if not encoded:
            continue
        found = method.allocation([one for _, one in encoded], sum(planned.max_bytes for planned in plan.encoded))
        errors = [
            TensorErrors(
                min(1.0, one.relative_norm or 0.0),
                dropped / one.energy,
                ((dropped + noise) / one.energy) ** 0.5,
                bool(direct),
                planned.vocabulary,
            )
            for (planned, one), dropped, noise, direct in zip(
                encoded, found.dropped, found.noise, found.by_entries, strict=True
            )
        ]
        low, share, high = map(float, kl_forecast(errors) or (0.0, 0.0, 0.0))
        estimates.append(RatioEstimate(ratio, plan.allowed_bytes, (low, share, high)))
    return estimates
