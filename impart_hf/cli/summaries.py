"""Short summaries of reports, for the command line."""

from ..distillation import DistillReport
from ..merging.merge import MergeReport
from ..repository.kl_forecast import FORECAST, forecast_text
from ..repository.report import CompressionReport, human_bytes
from ..repository.target_report import TargetReport


def compression_summary(report: CompressionReport, output: str, *, takes_text: bool = True) -> str:
    """Return the summary of a compression.

    Args:
        takes_text: whether the command has --calibration, so that the summary may name it.
    """
    lines = [
        f"{output}: {human_bytes(report.repository_bytes)} instead of {human_bytes(report.checkpoint_bytes)}, "
        f"ratio {report.ratio:.2f} (requested {report.requested_ratio:g}), in {report.seconds:.0f} s",
        f"{report.changed_tensors} tensors changed, {report.equal_tensors} equal to the base's; not counted: sidecar "
        f"files (tokenizer and others) {human_bytes(report.sidecar_bytes)}, reader {human_bytes(report.reader_bytes)}",
    ]
    if report.sidecar_files:
        lines.append(f"copied unchanged: {', '.join(report.sidecar_files)}")
    if not report.tensors:
        lines.append("the fine-tuned model equals the base: check BASE and FINETUNED")
    calibration, _, instead = report.method.get("calibration", "").partition(": ")
    if calibration == "none":
        advice = "with --calibration TEXT, levels are chosen for the inputs that each layer really has"
        given = f"no calibration text was given: {instead}; {advice}"
        lines.append(given if takes_text else f"without calibration: {instead}")
    elif " of " in calibration:
        lines.append(f"calibrated on {calibration}; the others without it")
    if (forecast := report.method.get(FORECAST)) is not None:
        lines.append(f"forecast, not measured: KL to the fine-tune about {forecast_text(forecast)}")
    if report.distilled:
        encoded = sum(tensor.kind == "encoded" for tensor in report.tensors)
        lines.append(
            f"distilled: KL to the fine-tune on held-out text {report.distilled.before:.4f} before, "
            f"{report.distilled.after:.4f} after, nats per token; {_best_step(report.distilled)}"
        )
        if untrained := len(report.distilled.untrained):
            lines.append(
                f"distillation trained {encoded - untrained} of {encoded} tensors, not {report.distilled.untrained[0]}"
            )
    if report.target is not None:
        lines += target_lines(report.target)
    if report.shortfall:
        lines.append(f"ratio missed: {report.shortfall}")
    notes = [(t.name, note) for t in report.tensors for note in t.notes]
    if notes:
        lines.append(f"notes on {len(notes)} tensors (--json has all), the first: {notes[0][0]}: {notes[0][1]}")
    return "\n".join(lines)


def target_lines(target: TargetReport) -> list[str]:
    """Return the summary of a search for a target."""
    remark = [target.remark] if target.remark else []
    return [f"target kept: {target.summary()}", *remark, *target.table().splitlines()]


def _best_step(distilled: DistillReport) -> str:
    if not distilled.best_step:
        return f"none of {distilled.steps} steps did better, nothing was changed"
    return f"best of {distilled.steps} steps: {distilled.best_step}"


def merge_summary(report: MergeReport, output: str) -> str:
    """Return the summary of a merge."""
    models = [model["model"] for model in report.config["models"]]
    lines = [f"{output}: {report.config['merge_method']} of {', '.join(models)}; {report.parameters:,} parameters"]
    if report.added_tokens:
        lines.append(f"{report.added_tokens} more tokens than the base")
    lines += report.notes
    if report.compression is not None:
        lines.append(compression_summary(report.compression, output, takes_text=False))
    return "\n".join(lines)
