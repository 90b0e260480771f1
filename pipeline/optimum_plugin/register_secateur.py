"""Commands of optimum-cli: installed as optimum/commands/register/register_secateur.py.

optimum-cli imports every file of that folder when it starts, so that nothing heavy is imported
here. https://github.com/huggingface/optimum/blob/main/optimum/commands/optimum_cli.py
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any, Final

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class CompressCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """`optimum-cli compress RECIPE`: what `secateur run` does."""

    COMMAND = CommandInfo(
        name="compress",
        help="Prune, quantize and export a model as a recipe says, measured and judged (secateur).",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments of `secateur run`."""
        from pipeline.arguments import run_arguments

        run_arguments(parser)

    def run(self) -> None:
        """Do what `secateur run` does, and exit with its code."""
        from pipeline.cli import run

        run(self.args)


class EngineCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """`optimum-cli export tensorrt MODEL FOLDER`: an engine, without a recipe."""

    COMMAND = CommandInfo(
        name="tensorrt",
        help="Build the TensorRT engine of an encoder, cut or not; nothing is measured (secateur).",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare model, folder, and what the engine is for."""
        sizes: dict[str, Any] = {"type": int, "nargs": 3, "metavar": ("MIN", "OPT", "MAX")}
        parser.add_argument("model", help="folder or hub id")
        parser.add_argument("folder", type=Path, help="a new one")
        parser.add_argument("--batch", default=[1, 8, 32], **sizes)
        parser.add_argument("--sequence", default=[1, 128, 512], **sizes)
        parser.add_argument(
            "--compute-capabilities",
            type=float,
            nargs="+",
            default=[],
            help="GPUs that TensorRT for RTX builds for, such as 8.6 8.9",
        )

    def run(self) -> None:
        """Build it, and exit with a code of `secateur`."""
        from pipeline.cli import convert

        convert(self.args)


REGISTER_COMMANDS: Final = [CompressCommand, (EngineCommand, ExportCommand)]
