"""The command `impart-hf diff`."""

import argparse
import json
import os
from pathlib import Path

from .options import (
    add_base_model,
    add_device,
    add_flag,
    add_json,
    add_quiet,
    add_revision,
    check_revision,
    given,
    refuse,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("base", metavar="A", help="dense model or delta repository: local folder or Hub id")
    parser.add_argument(
        "finetuned",
        metavar="B",
        nargs="?",
        help="what is compared with it: dense model, delta repository, or adapter in PEFT's format on A (default: A is "
        "a delta repository, and is compared with its own base)",
    )
    add_revision(parser, "branch, tag or commit of B, or of A alone")
    parser.add_argument("--base-revision", help="branch, tag or commit of A beside B")
    add_base_model(parser)
    parser.add_argument("--token", help="token for the Hub (default: the one of `hf auth login`)")
    parser.add_argument("--cache-dir", metavar="DIR", help="folder for files from the Hub (default: the Hub's cache)")
    add_flag(parser, "--no-spectra", "leave out singular values, which take most of the time, and the ratio to choose")
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="draw changed shares and bits by layer and kind, and spectra"
    )
    add_device(parser, "tensors are compared")
    add_json(parser, "print JSON instead of tables")
    add_quiet(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    if options.finetuned is None:
        check_revision(options, options.base)
        refuse(options, ["base_revision"], "is of A beside B; give B, or --revision for A alone")
    else:
        check_revision(options, options.finetuned)
        if os.path.isdir(options.base):
            refuse(options, ["base_revision"], f"{options.base}: a local folder has no revisions; give a Hub id")
    if _is_all_local(options):
        refuse(options, ["token", "cache_dir"], "is for the Hub, and all models are local; give a Hub id")


def _is_all_local(options: argparse.Namespace) -> bool:
    """Return whether nothing can come from the Hub: a delta repository may name its base there."""
    sources = [source for source in (options.base, options.finetuned, options.base_model) if source is not None]
    if not all(os.path.isdir(source) for source in sources):
        return False
    return options.base_model is not None or not any(next(Path(s).glob("delta_model*"), None) for s in sources)


def run(options: argparse.Namespace) -> None:
    """Compare, and print what differs."""
    from ..differences.diff import diff

    if options.plot:
        from ..repository.plot import check_plot

        check_plot(options.plot)
    report = diff(
        options.base,
        options.finetuned,
        spectra=not options.no_spectra,
        finetuned_revision=options.revision,
        progress=not options.quiet,
        **given(options, "base_revision", "base_model", "token", "cache_dir", "device"),
    )
    if options.plot:
        report.plot(options.plot)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.table())
