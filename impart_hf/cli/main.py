"""The command `impart-hf`."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from .. import hub
from ..common.devices import usable_device
from ..common.progress import Progress
from ..modeling.checkpoints import HubOptions
from ..repository.inspection import Inspection
from ..repository.open import open_repository
from ..repository.reconstruct import reconstruct
from ..repository.verify import verify
from .compress import add_compress
from .evaluate import add_evaluate
from .export_lora import add_export_lora
from .merge import add_merge
from .options import add_reading, add_repository, check_private, command
from .prune import add_prune
from .tune import add_tune


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 with one line on standard error."""
    options = build_parser().parse_args(arguments)
    logging.disable_progress_bar()  # transformers' own, for every model that is loaded
    # PEFT imports it, and it complains of kernels that nothing here uses.
    getLogger("bitsandbytes").setLevel(ERROR)
    try:
        check_private(options)
        options.command(options)
    except KeyboardInterrupt:
        rest = "; the same command goes on from here" if options.resumes else ""
        print(f"impart-hf: stopped{rest}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, OSError, ModuleNotFoundError, HfHubHTTPError) as error:
        print(f"impart-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="impart-hf",
        description="Keep fine-tuned language models as small compressed deltas against their base, and prune LLaMA.",
    )
    parser.add_argument("--version", action="version", version=f"impart-hf {version('impart-hf')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_compress(commands)
    add_tune(commands)
    add_merge(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_reconstruct(commands)
    add_export_lora(commands)
    _add_push(commands)
    add_prune(commands)
    add_evaluate(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = command(commands, "inspect", _inspect, "show what a delta repository holds, tensor by tensor")
    add_repository(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw spectra, keep ratios and bytes by layer")


def _inspect(options: argparse.Namespace) -> None:
    inspection = Inspection(options.repo, HubOptions(options.revision))
    if options.plot:
        inspection.plot(options.plot)
    print(json.dumps(inspection.to_dict(), indent=2) if options.json else inspection.table())


def _add_verify(commands: Any) -> None:
    parser = command(commands, "verify", _verify, "check a delta repository against its base, decoding every tensor")
    add_reading(parser)


def _verify(options: argparse.Namespace) -> None:
    repository = open_repository(options.repo, HubOptions(options.revision), options.base_model)
    verify(repository, Progress(not options.quiet))
    print(f"{options.repo}: {len(repository.names())} tensors are sound, the base is {repository.base.source}")


def _add_reconstruct(commands: Any) -> None:
    parser = command(commands, "reconstruct", _reconstruct, "write the dense fine-tuned checkpoint again")
    add_reading(parser)
    parser.add_argument("output", metavar="OUT", help="folder of the dense checkpoint")
    parser.add_argument("--device", default="cpu", help="where tensors are decoded (default: cpu)")
    parser.add_argument("--max-shard-size", default="5GB", help="split larger weight files (default: 5GB)")


def _reconstruct(options: argparse.Namespace) -> None:
    device = usable_device(options.device)
    repository = open_repository(options.repo, HubOptions(options.revision), options.base_model)
    reconstruct(
        repository,
        options.output,
        device=device,
        max_shard_size=options.max_shard_size,
        progress=Progress(not options.quiet),
    )
    print(f"{options.output}: the dense checkpoint of {options.repo}")


def _add_push(commands: Any) -> None:
    parser = command(commands, "push", _push, "upload a delta repository or pruned model to the Hub")
    parser.add_argument("folder", metavar="DIR", help="folder of a delta repository or pruned model")
    parser.add_argument("repo", metavar="REPO", help="Hub repository, created if missing")
    parser.add_argument("--revision", help="branch to push to, created if missing")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--message", help="commit message")


def _push(options: argparse.Namespace) -> None:
    print(
        hub.push(
            options.folder,
            options.repo,
            private=options.private,
            revision=options.revision,
            commit_message=options.message,
        )
    )
