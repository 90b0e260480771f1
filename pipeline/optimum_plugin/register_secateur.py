"""Commands of optimum-cli: installed as optimum/commands/register/register_secateur.py.

optimum-cli imports every file of that folder when it starts, so that nothing heavy is imported
here. https://github.com/huggingface/optimum/blob/main/optimum/commands/optimum_cli.py
"""

from argparse import ArgumentParser
from typing import Final

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class CompressCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """`optimum-cli compress RECIPE`: what `secateur run` does."""

    COMMAND = CommandInfo(
        name="compress",
        help="Prune, quantize and export a model as a recipe says, measured and judged (secateur).",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments of `secateur run`."""
        from pipeline.cli import run_arguments

        run_arguments(parser)

    def run(self) -> None:
        """Do what `secateur run` does, and exit with its code."""
        from pipeline.cli import run

        run(self.args)


REGISTER_COMMANDS: Final = [CompressCommand]
