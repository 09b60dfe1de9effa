"""The command `impart-hf inspect`."""

import argparse
import json
import os
from pathlib import Path

from .options import add_card_plot_option, add_json, add_repository, check_revision


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_repository(parser)
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw spectra, keep ratios and bytes by layer")
    add_card_plot_option(parser)
    add_json(parser, "print JSON instead of a table")


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined."""
    check_revision(options, options.repo)
    if options.card_plot and not os.path.isdir(options.repo):
        raise ValueError(f"--card-plot: '{options.repo}' is not a folder; download the repository and push it again")


def run(options: argparse.Namespace) -> None:
    """Print the contents of the repository."""
    from ..modeling.model_files import HubOptions
    from ..repository.card_plot import add_card_plot
    from ..repository.inspection import Inspection

    inspection = Inspection(options.repo, HubOptions(options.revision))
    if options.plot:
        inspection.plot(options.plot)
    if options.card_plot:
        add_card_plot(options.repo)
    print(json.dumps(inspection.to_dict(), indent=2) if options.json else inspection.table())
