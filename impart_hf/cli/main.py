"""The command `impart-hf`.

`--help`, `--version` and usage errors must not wait for torch and transformers, which take seconds to import. Therefore
a command's module is imported only if that command is run, and consists of three functions:

    add_options(parser)   declares the options
    check(options)        refuses options that cannot be combined
    run(options)          does the work; only this function imports modules that need torch
"""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from logging import ERROR, getLogger
from typing import NamedTuple

from .. import __version__
from ..common.processes import ProcessError, is_distributed, is_first
from ..registration import register_with_transformers


class Group(NamedTuple):
    """A command with subcommands, such as `impart-hf prune layers`."""

    help: str
    commands: Mapping[str, str]


# The help of each command. The command's module has the same name, with underscores instead of hyphens.
COMMANDS: Mapping[str, str | Group] = {
    "compress": "make a delta repository of a fine-tuned model",
    "tune": "search beta, C and seed of impart or impart-qt on a validation text or task",
    "merge": "merge fine-tunes of one base as configured in a YAML file",
    "tune-merge": "search the settings of a merge on a validation text for each task",
    "diff": "show what changed between two models, or a delta repository and its base, and which method fits",
    "inspect": "show the contents of a delta repository, tensor by tensor",
    "verify": "check a delta repository against its base, decoding every tensor",
    "reconstruct": "write the dense fine-tuned checkpoint from a delta repository",
    "flatten": "write a delta of a delta as one exact delta against the first base",
    "export-lora": "write a delta's leading components as a LoRA adapter",
    "push": "upload a delta repository or pruned model to the Hub",
    "prune": Group(
        "prune a model: score its layers, heads and channels, remove the least important, retrain the rest",
        {
            "importance": "score layers, heads and channels by the gradients of the first LoRA steps",
            "layers": "drop the least important layers, merging them into those before",
            "width": "remove the least important heads and channels of every layer",
            "recover": "train a pruned model, with LoRA or in full, and save it merged",
            "run": "do all of it, and compress and push the result, as a recipe in a YAML file says",
        },
    ),
    "evaluate": "measure models: cost, quality on a text or task, and speed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit status: 0, or 1 with one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    resumes = False
    try:
        options = build_parser(arguments).parse_args(arguments)
        options.command.check(options)
        if is_distributed() and not options.shares_work:
            raise ProcessError(f"'{arguments[0]}' runs in one process: start it without accelerate launch or torchrun")
        load_libraries()
        resumes = options.resumes
        options.command.run(options)
    except KeyboardInterrupt:
        rest = "; the same command resumes from here" if resumes else ""
        print(f"impart-hf: stopped{rest}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except argparse.ArgumentError as error:
        print(f"impart-hf: error: two settings or options have one name, rename the setting: {error}", file=sys.stderr)
        return 1
    except ProcessError as error:  # the process that failed prints it, too
        if is_first():
            print(f"impart-hf: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:  # the Hub's errors are OSErrors
        print(f"impart-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def build_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of all commands; only the command that is run has its options declared."""
    parser = argparse.ArgumentParser(
        prog="impart-hf",
        allow_abbrev=False,
        description="Keep fine-tuned language models as small compressed deltas against their base, and prune models.",
    )
    parser.add_argument("--version", action="version", version=f"impart-hf {__version__}")
    _add_commands(parser, COMMANDS, __name__.rpartition(".")[0], arguments)
    return parser


def _add_commands(
    parser: argparse.ArgumentParser, commands: Mapping[str, str | Group], package: str, arguments: Sequence[str]
) -> None:
    """Add commands, whose modules are in `package`."""
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, entry in commands.items():
        subparser = subparsers.add_parser(name, help=help_of(entry), description=help_of(entry), allow_abbrev=False)
        if not arguments or arguments[0] != name:
            continue
        module = f"{package}.{name.replace('-', '_')}"
        if isinstance(entry, Group):
            _add_commands(subparser, entry.commands, module, arguments[1:])
        else:
            command = importlib.import_module(module)
            subparser.set_defaults(command=command, resumes=False, shares_work=False)
            command.add_options(subparser)


def help_of(entry: str | Group) -> str:
    """Return the one-line help of an entry of `COMMANDS`."""
    return entry.help if isinstance(entry, Group) else entry


def load_libraries() -> None:
    """Import transformers, register our classes with it, and turn off progress bars and needless warnings."""
    # OpenMP reads this when torch is loaded. Threads that spin while they wait for work take three times the processor
    # time of a compression.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    register_with_transformers()
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would show one for every model that is loaded
    # It warns that checkpoints of training follow within a second.
    getLogger("transformers.trainer_utils").setLevel(ERROR)
    # PEFT imports bitsandbytes, which warns about kernels that are not used here.
    getLogger("bitsandbytes").setLevel(ERROR)
