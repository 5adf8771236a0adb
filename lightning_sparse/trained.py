"""The commands for trained networks: ``lightning-sparse export`` and ``lightning-sparse speed``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from safetensors.torch import save
from torch import Tensor, nn

from lightning_sparse.atomic import write_atomically
from lightning_sparse.execution import save_sparse
from lightning_sparse.masks.checkpoint import CheckpointError, load_checkpoint, looks_like_safetensors
from lightning_sparse.reporting import read_state
from lightning_sparse.zoo import recipe_path

__all__ = [
    "CommandError",
    "add_export_command",
    "add_model_options",
    "add_speed_command",
    "loaded",
    "no_example",
    "trained",
    "trained_module",
]

_MODEL = (
    "what was trained: a recipe, a YAML file such as the config.yaml that fit leaves beside its checkpoints, or a class"
    " by its path, such as mynet.LitCNN"
)
_INPUT = (
    "sizes of one input without the batch, such as 3x32x32, and its type if it is not float32: 128:int64 for a sequence"
    " of tokens; by default those of the model's example_input_array"
)
_SIZES = "Give the sizes of one input with --input, such as 3x32x32, or 128:int64 for a sequence of tokens."


class CommandError(ValueError):
    """What was asked for cannot be done; the message says why, and what to do."""


def add_export_command(parser: argparse.ArgumentParser) -> None:
    """Let a parser take what ``export`` takes."""
    parser.add_argument("checkpoint", help="a Lightning checkpoint, a file with a state dict, or a sparse file")
    parser.add_argument("--to", required=True, choices=[*_EXPORTS], help="what to write")
    parser.add_argument("--out", help="the file; by default the checkpoint's name with another ending")
    parser.add_argument(
        "--values", choices=["same", "float16"], default="same", help="of a sparse file: how its weights are stored"
    )
    add_model_options(parser, purpose="for onnx: ")
    parser.set_defaults(run=_export)


def add_speed_command(parser: argparse.ArgumentParser) -> None:
    """Let a parser take what ``speed`` takes."""
    parser.add_argument("checkpoint", help="a Lightning checkpoint, a file with a state dict, or a sparse file")
    add_model_options(parser, required=True)
    parser.add_argument("--threads", type=int, default=1, help="threads that compute; 1 by default")
    parser.set_defaults(run=_speed)


def add_model_options(parser: argparse.ArgumentParser, *, purpose: str = "", required: bool = False) -> None:
    """Let a parser take a network and its input.

    Args:
        parser: It.
        purpose: Begins what is said of each option.
        required: Whether there must be a network.
    """
    parser.add_argument("--model", required=required, help=f"{purpose}{_MODEL}")
    parser.add_argument("--input", metavar="SIZES", help=f"{purpose}{_INPUT}")
    parser.add_argument("--batch", type=int, default=1, help=f"{purpose}inputs of a batch; 1 by default")


def trained(options: argparse.Namespace, checkpoint: str) -> tuple[nn.Module, Tensor]:
    """The network that options name, with the weights of a checkpoint, and an input that it takes.

    Args:
        options: What :func:`add_model_options` reads.
        checkpoint: See :func:`trained_module`.

    Raises:
        CommandError: There is no such model, the weights are not its own, or it does not take such an input.
        CheckpointError: The checkpoint cannot be read.
    """
    module, inputs = loaded(options, checkpoint)
    if inputs is None:
        raise CommandError(no_example(options.model))
    return module, inputs


def loaded(options: argparse.Namespace, checkpoint: str) -> tuple[nn.Module, Tensor | None]:
    """The network of :func:`trained`, and an input, or ``None`` if neither options nor network say what it takes."""
    module = trained_module(options.model, checkpoint)
    inputs = _example(module, options)
    if inputs is not None:
        _call(module, inputs, options)
    return module, inputs


def no_example(model: str) -> str:
    """The sentence for a network that does not say what it takes."""
    return f"{model} does not say what it takes: it has no tensor example_input_array. {_SIZES}"


def trained_module(model: str, checkpoint: str | Path) -> nn.Module:
    """A module with the weights of a checkpoint.

    Args:
        model: A recipe, a YAML file with a ``model``, or a class by its path; arguments of a class come from the
            hyperparameters in the checkpoint.
        checkpoint: A Lightning checkpoint, a file with a state dict, or a sparse file.

    Raises:
        CommandError: There is no such model, or the weights are not its own.
        CheckpointError: The checkpoint cannot be read.

    Example:
        >>> from lightning_sparse.zoo import LeNet300100
        >>> torch.save(LeNet300100().state_dict(), "lenet.pt")
        >>> type(trained_module("lightning_sparse.zoo.LeNet300100", "lenet.pt")).__name__
        'LeNet300100'
    """
    state = read_state(checkpoint)
    module = _instance(_settings_of(model, checkpoint), model)
    own = module.state_dict()
    for names, problem in ((own.keys() - state.keys(), "lacks"), (state.keys() - own.keys(), "also has")):
        if names:
            raise CommandError(
                f"{checkpoint} does not fit {model}: it {problem} {', '.join(sorted(names)[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. Give the model that was trained."
            )
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CommandError(f"{checkpoint} does not fit {model}: {str(error).splitlines()[-1].strip()}") from error
    return module.eval()


def _export(options: argparse.Namespace) -> None:
    out = Path(options.out or Path(options.checkpoint).with_suffix(f".{options.to}"))
    if out.exists():
        raise CommandError(f"{out} exists already. Remove it, or give another file with --out.")
    nbytes = _EXPORTS[options.to](options, out)
    size = out.stat().st_size
    smaller = f", {nbytes / size:.1f} times smaller" if size and nbytes > 1.05 * size else ""
    print(f"{out}: {size:,} bytes for {nbytes:,} bytes of tensors{smaller}.")


def _export_sparse(options: argparse.Namespace, out: Path) -> int:
    state = read_state(options.checkpoint)
    save_sparse(state, out, values=options.values)
    return _nbytes(state)


def _export_safetensors(options: argparse.Namespace, out: Path) -> int:
    state = read_state(options.checkpoint)
    try:
        write_atomically(out, save({name: tensor.contiguous().clone() for name, tensor in state.items()}))
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise CommandError(f"{options.checkpoint} cannot be written to {out}: {error}") from error
    return _nbytes(state)


def _export_onnx(options: argparse.Namespace, out: Path) -> int:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"To write ONNX, install {' and '.join(missing)}: pip install {' '.join(missing)}")
    if options.model is None:
        raise CommandError(f"ONNX holds the network too, so give it with --model: {_MODEL}.")
    module, inputs = trained(options, options.checkpoint)
    torch.onnx.export(module, (inputs,), out, dynamo=True, verbose=False, external_data=False)
    return _nbytes(module.state_dict())


_EXPORTS = {"sparse": _export_sparse, "onnx": _export_onnx, "safetensors": _export_safetensors}


def _speed(options: argparse.Namespace) -> None:
    module, inputs = trained(options, options.checkpoint)
    accelerate = importlib.import_module("lightning_sparse.execution.accelerate").accelerate
    print(accelerate(module, inputs, threads=options.threads).report)


def _call(module: nn.Module, inputs: Tensor, options: argparse.Namespace) -> None:
    """See that the module takes the inputs, before anything is made of it."""
    try:
        with torch.no_grad():
            module(inputs)
    except Exception as error:  # whatever the code of a module does with a wrong input
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CommandError(
            f"{options.model} does not take an input of shape {tuple(inputs.shape)} and type"
            f" {str(inputs.dtype).removeprefix('torch.')} ({reason}). {_SIZES}"
        ) from error


def _nbytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def _example(module: nn.Module, options: argparse.Namespace) -> Tensor | None:
    if options.batch < 1:
        raise CommandError(f"--batch is {options.batch}; it takes 1 or more.")
    if options.input is not None:
        sizes, _, name = options.input.partition(":")
        dtype = getattr(torch, name or "float32", None)
        if not re.fullmatch(r"[1-9]\d*([x×,][1-9]\d*)*", sizes) or not isinstance(dtype, torch.dtype):
            raise CommandError(
                f"--input is {options.input!r}; it takes sizes without the batch, such as 3x32x32, and a type of torch,"
                " as in 128:int64."
            )
        shape = (options.batch, *map(int, re.split("[x×,]", sizes)))
        # Every vocabulary has the tokens 0 and 1.
        return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(2, shape).to(dtype)
    example = getattr(module, "example_input_array", None)
    if not isinstance(example, Tensor) or not example.ndim:
        return None
    return example[:1].repeat(options.batch, *[1] * (example.ndim - 1))


def _settings_of(model: str, checkpoint: str | Path) -> dict[str, Any]:
    """The class and its arguments, as jsonargparse takes them."""
    path = Path(model)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise CommandError(f"There is no file {model}.")
        return _settings_in(path, model)
    if "." in model:
        return {"class_path": model, "init_args": _hyperparameters(model, checkpoint)}
    try:
        return _settings_in(recipe_path(model), model)
    except ValueError as error:
        raise CommandError(f"{error} Nor is it a YAML file, or a class by its path.") from error


def _settings_in(path: Path, model: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"{model} cannot be read as YAML: {str(error).splitlines()[0]}.") from error
    settings = config.get("model") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or "class_path" not in settings:
        raise CommandError(f"{model} has no model with a class_path, as the config.yaml of a training has.")
    return cast("dict[str, Any]", settings)


def _hyperparameters(model: str, checkpoint: str | Path) -> dict[str, Any]:
    """What Lightning has saved of a class' arguments, as far as they are plain."""
    try:
        saved = {} if looks_like_safetensors(checkpoint) else load_checkpoint(checkpoint)
        module, _, name = model.rpartition(".")
        arguments = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CommandError(f"There is no class {model} ({error}). Is it in this folder, or installed?") from error
    values = saved.get("hyper_parameters", {}) if isinstance(saved, dict) else {}
    return {name: value for name, value in values.items() if name in arguments} if isinstance(values, dict) else {}


def _instance(settings: Mapping[str, Any], model: str) -> nn.Module:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "model", required=True, fail_untyped=False)
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # as older versions call it
    try:
        made: Any = make(parser.parse_object({"model": dict(settings)}))
    except (ArgumentError, TypeError, ValueError) as error:
        raise CommandError(
            f"{model} cannot be built: {' '.join(str(error).split())[:300]} Give the YAML file of its training, with"
            " all of its arguments."
        ) from error
    return cast("nn.Module", made.model)
