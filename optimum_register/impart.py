"""`optimum-cli impart …`: the commands of `impart-hf …`, which optimum finds in its register namespace.

optimum imports this file at every start, so heavy modules are imported only when a command is run.
"""

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class ImpartCommand(BaseOptimumCLICommand):
    """The command that passes its arguments to `impart-hf`."""

    COMMAND = CommandInfo(name="impart", help="keep fine-tuned models as small compressed deltas against their base")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        from impart_hf.cli.main import COMMANDS, help_of

        width = max(map(len, COMMANDS))
        commands = "\n".join(f"  {name:{width}}  {help_of(entry)}" for name, entry in COMMANDS.items())
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = f"commands:\n{commands}"
        parser.add_argument(
            "arguments",
            metavar="COMMAND",
            nargs=argparse.REMAINDER,
            help="a command with its arguments; `optimum-cli impart COMMAND --help` lists them",
        )

    def run(self) -> None:
        from impart_hf.cli.main import main

        arguments = self.args.arguments
        raise SystemExit(main(["--help"] if arguments in ([], ["help"]) else arguments))


REGISTER_COMMANDS = [ImpartCommand]
