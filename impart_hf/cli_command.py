"""What the files of the command line share."""

import argparse
from collections.abc import Callable
from typing import Any


def command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], None], help: str
) -> argparse.ArgumentParser:
    """A new command among `commands`; `function` runs it with the parsed options."""
    parser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(command=function)
    return parser
