"""The command `impart-hf push`."""

import argparse
import os

from .options import add_private, add_revision, given


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("folder", metavar="DIR", help="folder of a delta repository or pruned model")
    parser.add_argument("repo", metavar="REPO", help="Hub repository, created if missing")
    add_revision(parser, "branch to push to, created if missing")
    add_private(parser)
    parser.add_argument("--message", help="commit message")


def check(options: argparse.Namespace) -> None:
    """Check that the folder exists."""
    if not os.path.isdir(options.folder):
        raise ValueError(f"'{options.folder}' is not a folder; give that of a delta repository or pruned model")


def run(options: argparse.Namespace) -> None:
    """Upload the folder, and print the commit's URL."""
    from .. import hub

    print(
        hub.push(options.folder, options.repo, commit_message=options.message, **given(options, "private", "revision"))
    )
