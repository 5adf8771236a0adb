"""The command ``lightning-sparse``: train from a recipe or any YAML file, and report how sparse a checkpoint is."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from jsonargparse import ActionConfigFile  # pyright: ignore[reportPrivateImportUsage]  # listed in its __all__
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from rich.console import Console
from typing_extensions import override

# Importing the package makes its methods, the monitor and the zoo known by their bare class names.
import lightning_sparse
from lightning_sparse.report import CheckpointError, checkpoint_sparsity, sparsity_table
from lightning_sparse.zoo import MissingDataError, list_recipes, recipe_path

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SparseCLI", "main"]

TRAINER_COMMANDS = {
    "fit": "train; takes --config RECIPE_OR_FILE and any option of LightningCLI (see fit --help)",
    "validate": "validate a checkpoint: --config RECIPE_OR_FILE --ckpt_path CHECKPOINT",
    "test": "test a checkpoint, likewise",
    "predict": "predict with a checkpoint, likewise",
}


@final
class RecipeOrFile(ActionConfigFile):
    """A ``--config`` that also takes the name of a recipe; a file of that name goes first."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the recipe, the file, or the YAML text."""
        if re.fullmatch(r"[\w-]+", values) and not Path(values).exists():
            try:
                values = str(recipe_path(values))
            except ValueError as error:
                # not parser.error, which would bury this under fifty lines of usage
                parser.exit(2, f"lightning-sparse: error: {error} Nor is there a file {values}.\n")
        super().__call__(parser, cfg, values, option_string)


@final
class SparseCLI(LightningCLI):
    """LightningCLI for any LightningModule, data module and callback, with recipes as configuration files.

    Args:
        args: Options as on a command line; what the process was started with if None.
        run: Run the subcommand that comes first in ``args``; otherwise parse options without a subcommand and make
            the trainer, the model and the data, and no more.

    Example:
        >>> from lightning_sparse.cli import SparseCLI
        >>> cli = SparseCLI(["--config", "digits-fggp", "--trainer.callbacks.sparsity", "0.9"], run=False)
        >>> type(cli.model).__name__
        'Classifier'
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(args=None if args is None else list(args), run=run)

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose ``--config`` knows the recipes."""
        kwargs.setdefault("prog", "lightning-sparse")
        parser = LightningArgumentParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=RecipeOrFile, help=f"A YAML file, or a recipe: {', '.join(list_recipes())}."
        )
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what was given, without a warning if this process was started with arguments of its own."""
        self.config = parser.parse_args(cast("Sequence[str] | None", args))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lightning-sparse``.

    Args:
        arguments: What follows the command's name; what the process was started with if None.

    Returns:
        The exit code: 0, or 2 if what was asked for cannot be done, with the reason on stderr.
    """
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    try:
        if options.command == "report":
            if others:
                parser.error(f"report does not know {' '.join(others)}.")
            report(options.checkpoint, all_tensors=options.all)
        else:
            with warnings.catch_warnings():
                # the zoo's data modules have no workers on purpose
                warnings.filterwarnings("ignore", ".*does not have many workers.*")
                SparseCLI(arguments)
    except (CheckpointError, MissingDataError) as error:
        print(f"lightning-sparse: error: {error}", file=sys.stderr)
        return 2
    return 0


def report(checkpoint: str, *, all_tensors: bool) -> None:
    """Print the sparsity of each layer of a checkpoint, and of all of them together."""
    Console().print(sparsity_table(checkpoint_sparsity(checkpoint, all_tensors=all_tensors), title=checkpoint))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-sparse", description="Sparse training for any LightningModule.")
    parser.add_argument("--version", action="version", version=f"lightning-sparse {lightning_sparse.__version__}")
    parser.epilog = f"recipes: {', '.join(list_recipes())}"
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)  # LightningCLI parses the rest
    checkpoint = commands.add_parser("report", help="print the sparsity of each layer of a checkpoint")
    checkpoint.add_argument("checkpoint", help="a Lightning checkpoint, of ours or not, or a file with a state dict")
    checkpoint.add_argument("--all", action="store_true", help="biases, normalisation and integer tensors too")
    return parser
