"""Short summaries of reports, for the command line."""

from collections.abc import Sequence

from ..compression.resources import duration
from ..merging.merge import MergeReport
from ..repository.kl_forecast import FORECAST, forecast_text
from ..repository.parts import Part
from ..repository.report import CompressionReport, human_bytes
from ..repository.target_report import TargetReport

_NAMED = 4  # of the files that are copied, those that are named


def compression_summary(
    report: CompressionReport, output: str, *, takes_text: bool = True, commands: Sequence[str] = ()
) -> str:
    """Return the summary of a compression.

    Args:
        takes_text: whether the command has --calibration, so that the summary may name it.
        commands: what the user may do next.
    """
    requested = "" if report.requested_ratio is None else f" (requested {report.requested_ratio:g})"
    lines = [
        f"{output}: {human_bytes(report.repository_bytes)} instead of {human_bytes(report.checkpoint_bytes)}, "
        f"ratio {report.ratio:.2f}{requested}, in {duration(report.seconds)}"
    ]
    if report.shortfall:
        lines.append(f"ratio missed: {report.shortfall}")
    if not report.tensors:
        lines.append("the fine-tuned model equals the base: check BASE and FINETUNED")
    lines += [*_quality(report), *_table(report.parts), *_tensors(report, takes_text), *_files(report)]
    notes = [(tensor.name, note) for tensor in report.tensors for note in tensor.notes]
    if notes:
        named = len({name for name, _ in notes})
        lines.append(f"notes on {counted(named, 'tensor')} (--json has all), the first: {notes[0][0]}: {notes[0][1]}")
    lines += [f"{'next: ' if number == 0 else ' ' * 6}{command}" for number, command in enumerate(commands)]
    return "\n".join(lines)


def target_lines(target: TargetReport) -> list[str]:
    """Return the summary of a search for a target."""
    remark = [target.remark] if target.remark else []
    return [f"target kept: {target.summary()}", *remark, *target.table().splitlines()]


def _quality(report: CompressionReport) -> list[str]:
    """Return what is known of the result's quality."""
    lines = []
    if (forecast := report.method.get(FORECAST)) is not None:
        lines.append(f"forecast, not measured: KL to the fine-tune about {forecast_text(forecast)}")
    if (distilled := report.distilled) is not None:
        after = f"KL from the fine-tune on held-out text {distilled.after:.4f} nats per token"
        if distilled.best_step:
            best = f"step {distilled.best_step} of {distilled.steps} was the best"
            lines.append(f"quality: {after}, before distillation {distilled.before:.4f}; {best}")
        else:
            nothing = f"none of {distilled.steps} steps did better, nothing was changed"
            lines.append(f"quality: {after}; distillation: {nothing}")
        if untrained := len(distilled.untrained):
            encoded = len(report.encoded_tensors)
            lines.append(
                f"distillation trained {encoded - untrained} of {encoded} tensors, not {distilled.untrained[0]}"
            )
    if report.target is not None:
        lines += target_lines(report.target)
    return lines


def _table(parts: Sequence[Part]) -> list[str]:
    """Return the table of where the bytes are."""
    rows = [("where the bytes are", "size", "share", "bits per changed parameter")]
    rows += [
        (part.kind, human_bytes(part.bytes), f"{part.share:.1%}", "" if part.bits is None else f"{part.bits:.2f}")
        for part in parts
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [f"  {line.rstrip()}" for line in aligned]


def _tensors(report: CompressionReport, takes_text: bool) -> list[str]:
    """Return how the changed tensors were stored, and for which inputs they were rounded."""
    encoded, inputs = len(report.encoded_tensors), report.inputs
    stored = [f"{len(report.exact_tensors)} stored exactly"] if report.exact_tensors else []
    if encoded or not stored:
        stored.append(f"{encoded} encoded")
    if inputs["calibrated"]:
        text = "built-in text" if report.method.get("calibration", "").startswith("built-in") else "text"
        stored[-1] += f" ({inputs['calibrated']} of them calibrated on the {text})"
    stored += [f"{count} stored whole ({reason})" for reason, count in report.stored_whole.items()]
    lines = [f"{counted(report.changed_tensors, 'tensor')} changed: {', '.join(stored)}; {report.equal_tensors} equal"]
    calibration = report.method.get("calibration", "")
    if inputs["guessed"]:
        guessed = "inputs of 1 tensor were" if inputs["guessed"] == 1 else f"inputs of {inputs['guessed']} tensors were"
        takes_text = takes_text and calibration.startswith("none")
        better = "; --calibration TEXT, or built-in, would measure them" if takes_text else ""
        lines.append(f"{guessed} guessed from the deltas{better}")
    elif calibration.startswith("none") and encoded:
        better = "; --calibration TEXT, or built-in, would choose them for the layers' inputs" if takes_text else ""
        lines.append(f"no calibration: values were rounded to the nearest level{better}")
    return lines


def _files(report: CompressionReport) -> list[str]:
    """Return which files are beside the delta, and are not counted."""
    files, size = report.sidecar_files, human_bytes(report.sidecar_bytes)
    named = ", ".join(files) if len(files) <= _NAMED else f"{', '.join(files[:_NAMED])} and {len(files) - _NAMED} more"
    larger = ", more than the delta" if report.sidecar_bytes > report.repository_bytes else ""
    copied = f"{named}: {size}{larger}; " if files else ""
    return [f"copied, not counted: {copied}code that reads it: {human_bytes(report.reader_bytes)}"]


def counted(count: int, noun: str) -> str:
    """Return "1 tensor", "2 tensors"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def merge_summary(report: MergeReport, output: str, commands: Sequence[str] = ()) -> str:
    """Return the summary of a merge; `commands` are what the user may do next."""
    models = [model["model"] for model in report.config["models"]]
    lines = [f"{output}: {report.config['merge_method']} of {', '.join(models)}; {report.parameters:,} parameters"]
    if report.added_tokens:
        lines.append(f"{report.added_tokens} more tokens than the base")
    lines += report.notes
    if report.compression is not None:
        lines.append(compression_summary(report.compression, output, takes_text=False, commands=commands))
    return "\n".join(lines)
