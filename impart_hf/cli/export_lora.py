"""The command `impart-hf export-lora`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .options import (
    add_base_model,
    add_device,
    add_json,
    add_quiet,
    add_repository,
    add_text_field,
    add_text_size,
    check_revision,
    check_text_field,
    given,
    given_texts,
    listed,
    refuse,
)

if TYPE_CHECKING:
    from ..lora.report import LoraReport

_PARTS = ("linear", "embeddings", "experts")  # as lora.places.PARTS, whose import takes a second


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_repository(parser)
    parser.add_argument("output", metavar="OUT", help="folder to write the adapter to")
    add_base_model(parser)
    parser.add_argument(
        "--rank", type=int, default=256, help="rank of the adapter: the most components of a matrix (default: 256)"
    )
    parser.add_argument(
        "--max-bytes",
        metavar="SIZE",
        help="size of the adapter, such as 200MB: each matrix has the rank that it is worth, at most --rank",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=_PARTS,
        metavar="PART",
        help=f"what may be in the adapter: {listed(_PARTS)} (default: all; not every engine takes all)",
    )
    parser.add_argument(
        "--validation", metavar="TEXT", help="measure KL(delta || adapter) on this text: file, folder or data set"
    )
    add_text_size(parser, "the validation text")
    add_text_field(parser)
    add_device(parser, "matrices are decomposed")
    add_json(parser)
    add_quiet(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_revision(options, options.repo)
    check_text_field(options, options.validation)
    if options.validation is None:
        refuse(options, ["samples", "length", "batch_size"], "needs a text; add --validation TEXT")


def run(options: argparse.Namespace) -> None:
    """Write the adapter, and print the report."""
    from ..common.progress import Progress
    from ..lora.export import export_lora
    from ..modeling.model_files import HubOptions
    from ..repository.open import open_repository

    repository = open_repository(options.repo, HubOptions(options.revision), options.base_model)
    report = export_lora(
        repository,
        options.output,
        options.rank,
        progress=Progress(not options.quiet),
        **given_texts(options, "validation"),
        **given(options, "max_bytes", "parts", "samples", "length", "batch_size", "device"),
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else _summary(report, options.output))


def _summary(report: LoraReport, output: str) -> str:
    from ..repository.report import human_bytes

    worst = max(report.matrices, key=lambda matrix: matrix.relative_error)
    lines = [
        f"{output}: rank {report.ranks}, {len(report.matrices)} matrices, {human_bytes(report.adapter_bytes)}",
        f"lost by cutting off at this rank: relative error {report.relative_error:.3f} of all matrices' deltas, at "
        f"most {worst.relative_error:.3f} ({worst.name})",
    ]
    if report.left_out:
        largest = max(report.left_out, key=lambda name: report.left_out[name])
        lines.append(
            f"not in the adapter: {len(report.left_out)} changed tensors, {report.left_out_share:.1%} of the delta's "
            f"squared norm, the largest {largest}"
        )
    if (found := report.validation) is not None:
        lines.append(
            f"on {found.tokens:,} tokens: KL from the delta {found.kl:.3g} nats/token, of the base without the adapter "
            f"{found.base_kl:.3g}"
        )
    return "\n".join(lines)
