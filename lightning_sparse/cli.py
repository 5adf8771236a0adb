"""The command ``lightning-sparse``: train from a recipe or any YAML file, and inspect checkpoints and their masks."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
import traceback
import warnings
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from jsonargparse import ActionConfigFile  # pyright: ignore[reportPrivateImportUsage]  # listed in its __all__
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typing_extensions import override

# Importing the package makes its methods, the monitor and the zoo known by their bare class names.
import lightning_sparse
from lightning_sparse.consolidate import consolidate
from lightning_sparse.masks import CheckpointError, read_masks, save_masks
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.reporting import compare_masks, overlap_table, report, sparsity_table, width_of
from lightning_sparse.trained import (
    CommandError,
    add_export_command,
    add_model_options,
    add_speed_command,
    loaded,
    no_example,
)
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

# Whose errors may be about what was given, and what lies between them and here.
REFUSING = {"lightning_sparse", "lightning", "jsonargparse"}
LIBRARIES = REFUSING | {"contextlib", "lightning_utilities", "torch"}


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
        >>> cli = SparseCLI(["--config", "fggp-digits", "--trainer.callbacks.sparsity", "0.9"], run=False)
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
        if options.command not in TRAINER_COMMANDS:
            if others:
                parser.error(f"{options.command} does not know {' '.join(others)}.")
            _look_for_classes_here()
            options.run(options)
        else:
            _look_for_classes_here()
            with warnings.catch_warnings():
                # the zoo's data modules have no workers on purpose
                warnings.filterwarnings("ignore", ".*does not have many workers.*")
                SparseCLI(arguments)
    except (CheckpointError, CommandError, MissingDataError) as error:
        return _refuse(error)
    except (FileNotFoundError, MisconfigurationException, ValueError) as error:
        cause = _innermost(error)
        if not _is_a_refusal(cause):
            raise
        return _refuse(cause)
    return 0


def _refuse(error: BaseException) -> int:
    lines = map(printable, f"lightning-sparse: error: {error}".split("\n"))
    print("\n".join(lines), file=sys.stderr)
    return 2


def _innermost(error: BaseException) -> BaseException:
    """What was raised, out of what the parser of the command line has wrapped around it."""
    if not _is_the_parsers(error):
        return error
    found = [_innermost(cause) for cause in (error.__cause__, *_tried(error)) if cause is not None]
    return next((cause for cause in found if not _is_the_parsers(cause)), found[0] if found else error)


def _is_the_parsers(error: BaseException) -> bool:
    return _modules(error)[-1:] == ["jsonargparse"]


def _tried(error: BaseException) -> Sequence[BaseException]:
    """Why each type of a union was refused; older parsers have the first as cause, which may be that of ``None``."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_locals.get("exceptions", ())


def _is_a_refusal(error: BaseException) -> bool:
    """Whether a library refuses what it was given; what comes through code of the user's needs its traceback."""
    modules = _modules(error)
    on_purpose = any(
        (frame.line or "").startswith("raise ") for frame in traceback.extract_tb(error.__traceback__)[-1:]
    )
    return on_purpose and modules[-1] in REFUSING and LIBRARIES.issuperset(modules)


def _modules(error: BaseException) -> list[str]:
    """The packages through which an error came; the last one raised it."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]


def _look_for_classes_here() -> None:
    """Let ``--model mynet.LitCNN`` find ``mynet.py`` in this folder, as ``python -m`` does and a script does not."""
    here = str(Path.cwd())
    if not getattr(sys.flags, "safe_path", False) and not {here, ""} & {*sys.path}:
        sys.path.insert(0, here)


def _report(options: argparse.Namespace) -> None:
    remarks: set[str] = set()
    for checkpoint in options.checkpoints:
        if options.model is None:
            result = report(checkpoint, all_tensors=options.all)
        else:
            module, example = loaded(options, checkpoint)
            if example is None:
                print(printable(f"For dead units and FLOPs too: {no_example(options.model)}"))
            result = report(module, example, all_tensors=options.all)
        _print_table(sparsity_table(result.layers, title=checkpoint))
        if result.gains is not None:
            _print_table(result.gains.table())
            print(*result.gains.sentences(), sep="\n")
        remarks.add(result.remark)
    for remark in filter(None, remarks):
        print(remark)


def _consolidate(options: argparse.Namespace) -> None:
    _refuse_to_overwrite(options.file)
    try:
        consolidate(options.folder, options.file)
    except OSError as error:
        raise CommandError(f"{options.file} cannot be written: {error.strerror or error}.") from error
    print(printable(f"{options.file}: the checkpoint of {options.folder}, for any strategy."))


def _extract_masks(options: argparse.Namespace) -> None:
    masks = read_masks(options.checkpoint)
    _refuse_to_overwrite(options.file)
    try:
        save_masks(options.file, masks)
    except OSError as error:
        raise CommandError(str(error)) from error
    print(printable(f"{options.file}: the masks of {len(masks)} weights, {enumerated(masks)}."))


def _compare_masks(options: argparse.Namespace) -> None:
    first, second = read_masks(options.a), read_masks(options.b)
    try:
        overlaps = compare_masks(first, second)
    except ValueError as error:
        raise CommandError(f"A is {options.a} and B is {options.b}. {error}") from error
    _print_table(overlap_table(overlaps, title=f"A: {options.a}  B: {options.b}"))


def _print_table(table: Table) -> None:
    """Print on the terminal, or, into a file or a pipe, as wide as the table is."""
    console = Console()
    Console(width=None if console.is_terminal else width_of(table)).print(table)


def _list_recipes(options: argparse.Namespace) -> None:
    del options
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for name in list_recipes():
        table.add_row(name, escape(_summary(name)))
    Console().print(table)


def _show_recipe(options: argparse.Namespace) -> None:
    print(_recipe(options.name).read_text(encoding="utf-8"), end="")


def _copy_recipe(options: argparse.Namespace) -> None:
    source = _recipe(options.name)
    target = options.file or f"{options.name}.yaml"
    _refuse_to_overwrite(target)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise CommandError(f"{target} cannot be written: {error.strerror}.") from error
    print(f"{target}: train with `lightning-sparse fit --config {target}`.")


def _recipe(name: str) -> Path:
    try:
        return recipe_path(name)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _summary(name: str) -> str:
    """The first sentence of the comment with which a recipe begins."""
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("# "), lines))
    return comment.partition(". ")[0].removesuffix(".") + "."


def _refuse_to_overwrite(file: str) -> None:
    if Path(file).exists():
        raise CommandError(f"{file} exists already. Remove it, or give another file.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-sparse", description="Sparse training for any LightningModule.")
    parser.add_argument("--version", action="version", version=f"lightning-sparse {lightning_sparse.__version__}")
    # a name must not be broken at its hyphens, which argparse would do
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = textwrap.fill(f"recipes: {', '.join(list_recipes())}", width=100, break_on_hyphens=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)  # LightningCLI parses the rest
    checkpoint = commands.add_parser("report", help="print the sparsity of each layer of a checkpoint")
    checkpoint.add_argument(
        "checkpoints",
        nargs="+",
        metavar="checkpoint",
        help="any Lightning checkpoint, or a file with a state dict",
    )
    checkpoint.add_argument("--all", action="store_true", help="biases, normalisation and integer tensors too")
    add_model_options(checkpoint, purpose="for dead units and FLOPs: ")
    checkpoint.set_defaults(run=_report)
    add_export_command(commands.add_parser("export", help="write a checkpoint's network to another kind of file"))
    add_speed_command(commands.add_parser("speed", help="print how much faster zeros make a trained network"))
    folder = commands.add_parser("consolidate", help="write a checkpoint of a sharded training, a folder, as one file")
    folder.add_argument("folder", help="what ModelParallelStrategy saved")
    folder.add_argument("file", help="where to write the checkpoint, which every strategy loads")
    folder.set_defaults(run=_consolidate)
    _add_masks_commands(commands.add_parser("masks", help="take the masks out of a checkpoint, or compare two"))
    _add_recipes_commands(commands.add_parser("recipes", help="list the recipes; show one, or copy it to change it"))
    return parser


def _add_masks_commands(parser: argparse.ArgumentParser) -> None:
    source = "a checkpoint of any method, one with zeros in its weights, or a file of masks"
    commands = parser.add_subparsers(dest="masks_command", metavar="COMMAND", required=True)
    extract = commands.add_parser("extract", help="write the masks of a checkpoint to a file, one bit a weight")
    extract.add_argument("checkpoint", help=source)
    extract.add_argument("file", help="where to write them, for FixedMask(masks=FILE) or load_masks")
    extract.set_defaults(run=_extract_masks)
    compare = commands.add_parser("compare", help="print how alike the masks of two files are, for each layer")
    compare.add_argument("a", metavar="A", help=source)
    compare.add_argument("b", metavar="B", help="another")
    compare.set_defaults(run=_compare_masks)


def _add_recipes_commands(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_list_recipes)
    commands = parser.add_subparsers(dest="recipes_command", metavar="COMMAND")
    show = commands.add_parser("show", help="print a recipe")
    show.add_argument("name", help="one of the recipes")
    show.set_defaults(run=_show_recipe)
    copy = commands.add_parser("copy", help="copy a recipe, to change it and give it to --config")
    copy.add_argument("name", help="one of the recipes")
    copy.add_argument("file", nargs="?", help="where to; NAME.yaml in this folder if left out")
    copy.set_defaults(run=_copy_recipe)
