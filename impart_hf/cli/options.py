"""What the files of the command line share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import hub
from ..modeling.checkpoints import read_json


def command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], None], help: str
) -> argparse.ArgumentParser:
    """A new command among `commands`; `function` runs it with the parsed options."""
    parser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(command=function, resumes=False)
    return parser


def add_repository(parser: argparse.ArgumentParser) -> None:
    """The options of a command that looks at a delta repository."""
    parser.add_argument("repo", metavar="REPO", help="delta repository: local folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The options of a command that decodes a delta repository."""
    add_repository(parser)
    parser.add_argument("--base-model", help="take the base from this folder or Hub id instead of the recorded one")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_push(parser: argparse.ArgumentParser) -> None:
    """The options of a command whose result can be published."""
    parser.add_argument("--push", metavar="REPO", help="push the result to this Hub repository")
    parser.add_argument("--private", action="store_true", default=None, help="make a new Hub repository private")


def check_private(options: argparse.Namespace) -> None:
    """Raises: ValueError, if what is not published is to be private."""
    if getattr(options, "private", None) and not getattr(options, "push", True):
        raise ValueError("--private is for what is published: add --push REPO, or leave --private out")


def push_if_asked(options: argparse.Namespace) -> None:
    """Publish a command's result, the folder `options.output`, if the user wants it."""
    if options.push:
        url = hub.push(options.output, options.push, private=options.private)
        print(url, file=sys.stderr if options.json else sys.stdout)


def add_training_fields(parser: Any) -> None:
    """The option of a command that trains for what it has no option for."""
    parser.add_argument(
        "--training", metavar="FILE.json", type=Path, help="more of transformers' TrainingArguments, by name"
    )


def training_fields(options: argparse.Namespace) -> dict[str, Any] | None:
    """What stands in that file; None if there is none."""
    return read_json(options.training) if options.training else None


def numbers(kind: type) -> Callable[[str], tuple]:
    """A parser of comma-separated numbers of a kind, for argparse."""

    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = "comma-separated numbers"  # argparse puts it into its message
    return parse
