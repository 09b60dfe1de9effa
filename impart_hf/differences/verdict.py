"""Which method fits a difference, in plain sentences, and the commands to run."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ..methods import ImPartRdConfig
from ..repository.report import human_bytes
from .groups import Group
from .ratios import RatioEstimate
from .sides import Side

EQUAL, METADATA, STORED, EXACT, LOSSY = "equal", "metadata", "stored", "exact", "impart-rd"
# An exact store fits if it takes at most this for an entry of the tensors that changed.
_FEW_BITS = 1.0
# The share of the fine-tune's effect that a lossy delta may be expected to lose.
_LITTLE = 0.01
_ESTIMATE = "an estimate from singular values, not a measurement"


@dataclass(frozen=True)
class Verdict:
    """Which method fits.

    Attributes:
        method: "equal" (nothing to store), "metadata" (no weights differ, but other files do), "stored" (a delta
            repository beside its own base), "exact" or "impart-rd".
        ratio: the compression ratio to ask for, if the method has one and it could be estimated.
        text: why, in one or two sentences.
        commands: what to run, with OUT for the folder to write.
    """

    method: str
    ratio: float | None
    text: str
    commands: tuple[str, ...] = ()


def verdict(
    base: Side,
    finetuned: Side,
    total: Group,
    changed_entries: int,
    checkpoint_bytes: int,
    estimates: Sequence[RatioEstimate],
    other_changes: int,
    *,
    alone: bool = False,
) -> Verdict:
    """Say which method fits.

    Args:
        total: the sum over all tensors.
        changed_entries: entries of the tensors that changed.
        checkpoint_bytes: size of the fine-tune's weight files.
        estimates: of `impart-rd`, by rising ratio.
        other_changes: number of fields of config.json, sidecar files and dtypes that differ.
        alone: whether a delta repository is compared with its own base.
    """
    if not total.changed and not total.added_rows:
        if other_changes:
            return Verdict(METADATA, None, "No weight differs, only what is listed above: there is no delta to store.")
        return Verdict(EQUAL, None, "The two are equal: no weight differs, and there is no delta to store.")
    what = _described(total)
    exact = f"{human_bytes(total.exact_bytes)}, 1/{checkpoint_bytes / max(1, total.exact_bytes):.3g} of the checkpoint"
    if alone:
        return Verdict(STORED, None, f"{what} An exact store of this difference would take about {exact}.")
    best = _best(estimates)
    usual = checkpoint_bytes / ImPartRdConfig().compression_ratio
    few = 8 * total.exact_bytes <= _FEW_BITS * changed_entries
    small = total.exact_bytes <= (usual if best is None else max(usual, best.bytes))
    if total.nonfinite or few or small:
        reason = "other methods refuse NaN and infinity, and " if total.nonfinite else ""
        text = f"{what} Store it exactly: {reason}that takes about {exact} (estimated)."
        return Verdict(EXACT, None, text, _commands(base, finetuned, "--method exact"))
    if best is None:
        text = f"{what} Stored exactly it would take about {exact}; a lossy delta takes less, at the ratio you choose."
        return Verdict(LOSSY, None, text, _commands(base, finetuned, f"--method {LOSSY}"))
    low, share, high = (f"{100 * share:.2g} %" for share in best.share)
    loses = f"a KL to the fine-tune of about {share} of the base's ({low} to {high})"
    advice = "" if best.share[1] < _LITTLE else "; that is much, so measure it before you publish"
    text = (
        f"{what} Stored exactly it would take about {exact}; impart-rd at ratio {best.ratio:g} takes "
        f"{human_bytes(best.bytes)} and is expected to have {loses}, {_ESTIMATE}{advice}."
    )
    return Verdict(LOSSY, best.ratio, text, _commands(base, finetuned, f"--method {LOSSY} --ratio {best.ratio:g}"))


def _best(estimates: Sequence[RatioEstimate]) -> RatioEstimate | None:
    """Return the highest ratio at which little is lost, or the lowest of all."""
    fitting = [one for one in estimates if one.share[1] < _LITTLE]
    return fitting[-1] if fitting else estimates[0] if estimates else None


def _described(total: Group) -> str:
    """Say in a sentence how much changed."""
    parts = [f"{100 * total.share:.3g} % of all entries changed in {total.changed_tensors} of {total.tensors} tensors"]
    if total.changed:
        parts.append(f"on average by {100 * total.relative_norm:.2g} % of the weights' norm")
    if total.added_rows:
        parts.append(f"and {total.added_rows} rows were added")
    if total.nonfinite:
        parts.append(f"and {total.nonfinite} numbers are NaN or infinite in one of the two")
    return ", ".join(parts) + "."


def _commands(base: Side, finetuned: Side, options: str) -> tuple[str, ...]:
    """Return the commands that store the difference; what is a delta repository is made dense first."""
    commands, names = [], []
    for side, dense, revision in ((base, "DENSE_BASE", "--base-revision"), (finetuned, "DENSE", "--revision")):
        stated = [] if side.revision is None else [revision, side.revision]
        if side.delta is None:
            names.append(side.source)
            options = f"{options} {shlex.join(stated)}".rstrip()
        else:
            own = [] if side.revision is None else ["--revision", side.revision]
            commands.append(shlex.join(["impart-hf", "reconstruct", side.source, dense, *own]))
            names.append(dense)
    return (*commands, f"impart-hf compress {shlex.join([*names, 'OUT'])} {options}")
