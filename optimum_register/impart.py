"""`optimum-cli impart …`: the same commands as `impart-hf …`, found by optimum in its register namespace.

optimum imports this file at every start, so nothing heavy is imported before the command is run.
"""

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class ImpartCommand(BaseOptimumCLICommand):
    """Hands its arguments to `impart-hf`."""

    COMMAND = CommandInfo(name="impart", help="keep fine-tuned models as small compressed deltas against their base")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `optimum-cli impart help`")

    def run(self) -> None:
        from impart_hf.cli.main import main

        arguments = self.args.arguments
        raise SystemExit(main(["--help"] if arguments in ([], ["help"]) else arguments))


REGISTER_COMMANDS = [ImpartCommand]
