"""The command `impart-hf export-lora`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .options import add_base_model, add_device, add_json, add_quiet, add_repository, check_revision, given

if TYPE_CHECKING:
    from ..repository.lora_export import LoraReport


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_repository(parser)
    parser.add_argument("output", metavar="OUT", help="folder to write the adapter to")
    add_base_model(parser)
    parser.add_argument(
        "--rank", type=int, default=256, help="rank of the adapter: components kept of every matrix (default: 256)"
    )
    add_device(parser, "matrices are decomposed")
    add_json(parser)
    add_quiet(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_revision(options, options.repo)


def run(options: argparse.Namespace) -> None:
    """Write the adapter, and print the report."""
    from ..common.progress import Progress
    from ..modeling.model_files import HubOptions
    from ..repository.lora_export import export_lora
    from ..repository.open import open_repository

    repository = open_repository(options.repo, HubOptions(options.revision), options.base_model)
    report = export_lora(
        repository,
        options.output,
        options.rank,
        progress=Progress(not options.quiet),
        **given(options, "device"),
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else _summary(report, options.output))


def _summary(report: LoraReport, output: str) -> str:
    from ..repository.report import human_bytes

    worst = max(report.matrices, key=lambda matrix: matrix.relative_error)
    lines = [
        f"{output}: rank {report.rank}, {len(report.matrices)} matrices, {human_bytes(report.adapter_bytes)}",
        f"lost by cutting off at this rank: relative error {report.relative_error:.3f} of all matrices' deltas, at "
        f"most {worst.relative_error:.3f} ({worst.name})",
    ]
    if report.left_out:
        largest = max(report.left_out, key=lambda name: report.left_out[name])
        lines.append(
            f"not in the adapter: {len(report.left_out)} changed tensors (embeddings, output projection, norms, "
            f"biases, experts), {report.left_out_share:.1%} of the delta's squared norm, the largest {largest}"
        )
    return "\n".join(lines)
