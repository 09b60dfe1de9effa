"""The command `impart-hf export-lora`."""

import argparse
import json
from typing import Any

from ..common.progress import Progress
from ..modeling.checkpoints import HubOptions
from ..repository.lora_export import LoraReport, export_lora
from ..repository.open import open_repository
from ..repository.report import human_bytes
from .options import add_reading, command


def add_export_lora(commands: Any) -> None:
    """Add the command `export-lora`."""
    parser = command(commands, "export-lora", _export_lora, "write a delta's leading components as a LoRA adapter")
    add_reading(parser)
    parser.add_argument("output", metavar="OUT", help="folder of the adapter")
    parser.add_argument("--rank", type=int, default=256, help="components of every matrix (default: 256)")
    parser.add_argument("--device", default="cpu", help="where matrices are decomposed (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _export_lora(options: argparse.Namespace) -> None:
    repository = open_repository(options.repo, HubOptions(options.revision), options.base_model)
    report = export_lora(
        repository,
        options.output,
        options.rank,
        device=options.device,
        progress=Progress(not options.quiet),
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else _summary(report, options.output))


def _summary(report: LoraReport, output: str) -> str:
    worst = max(report.matrices, key=lambda matrix: matrix.relative_error)
    lines = [
        f"{output}: rank {report.rank}, {len(report.matrices)} matrices, {human_bytes(report.adapter_bytes)}",
        f"lost beyond the rank: relative error {report.relative_error:.3f} of the matrices' deltas, at most "
        f"{worst.relative_error:.3f} ({worst.name})",
    ]
    if report.left_out:
        largest = max(report.left_out, key=lambda name: report.left_out[name])
        lines.append(
            f"not in the adapter: {len(report.left_out)} changed tensors (embeddings, output projection, norms, "
            f"biases, experts), {report.left_out_share:.1%} of the delta's squared norm, the largest {largest}"
        )
    return "\n".join(lines)
