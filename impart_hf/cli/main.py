"""The command `impart-hf`.

`--help`, `--version` and usage errors must not wait for torch and transformers, which take seconds to import. So the
module of a command is imported only if that command was asked for, and a command's module has three parts:

    add_options(parser)   declares the options
    check(options)        refuses options that do not go together
    run(options)          does the work, and alone imports what needs torch
"""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from logging import ERROR, getLogger
from typing import NamedTuple

from .. import __version__
from ..registration import register_with_transformers


class Group(NamedTuple):
    """Commands below a command: `impart-hf prune layers`."""

    help: str
    commands: Mapping[str, str]


# What each command does. Its module has its name, with an underscore for the hyphen.
COMMANDS: Mapping[str, str | Group] = {
    "compress": "make a delta repository of a fine-tuned model",
    "tune": "search beta, C and seed of impart or impart-qt on a text or task",
    "merge": "merge fine-tunes of one base, as a YAML file says",
    "tune-merge": "search the settings of a merge on a text for each task",
    "inspect": "show what a delta repository holds, tensor by tensor",
    "verify": "check a delta repository against its base, decoding every tensor",
    "reconstruct": "write the dense fine-tuned checkpoint again",
    "export-lora": "write a delta's leading components as a LoRA adapter",
    "push": "upload a delta repository or pruned model to the Hub",
    "prune": Group(
        "prune a LLaMA: score its layers, heads and channels, remove the least important, train the rest",
        {
            "importance": "score layers, heads and channels by the gradients of the first LoRA steps",
            "layers": "drop the least important layers, merging them into those before",
            "width": "remove the least important heads and channels of every layer",
            "recover": "train a pruned model, with LoRA or in full, and save it merged",
        },
    ),
    "evaluate": "what models cost, and how well and fast they do on a text or task",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 with one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = build_parser(arguments).parse_args(arguments)
    try:
        options.command.check(options)
        load_libraries()
        options.command.run(options)
    except KeyboardInterrupt:
        rest = "; the same command resumes from here" if options.resumes else ""
        print(f"impart-hf: stopped{rest}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as error:  # the Hub's errors are OSErrors
        print(f"impart-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def build_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of the one that the arguments begin with."""
    parser = argparse.ArgumentParser(
        prog="impart-hf",
        description="Keep fine-tuned language models as small compressed deltas against their base, and prune LLaMA.",
    )
    parser.add_argument("--version", action="version", version=f"impart-hf {__version__}")
    _add_commands(parser, COMMANDS, __name__.rpartition(".")[0], arguments)
    return parser


def _add_commands(
    parser: argparse.ArgumentParser, commands: Mapping[str, str | Group], package: str, arguments: Sequence[str]
) -> None:
    """Add commands, whose modules lie in a package."""
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, entry in commands.items():
        subparser = subparsers.add_parser(name, help=help_of(entry), description=help_of(entry))
        if not arguments or arguments[0] != name:
            continue
        place = f"{package}.{name.replace('-', '_')}"
        if isinstance(entry, Group):
            _add_commands(subparser, entry.commands, place, arguments[1:])
        else:
            command = importlib.import_module(place)
            subparser.set_defaults(command=command, resumes=False)
            command.add_options(subparser)


def help_of(entry: str | Group) -> str:
    """The one-line help of an entry of `COMMANDS`."""
    return entry.help if isinstance(entry, Group) else entry


def load_libraries() -> None:
    """Import transformers and prepare it: our classes, and no output of its own."""
    register_with_transformers()
    from transformers.utils import logging

    logging.disable_progress_bar()  # for every model that is loaded
    # PEFT imports it, and it complains of kernels that nothing here uses.
    getLogger("bitsandbytes").setLevel(ERROR)
