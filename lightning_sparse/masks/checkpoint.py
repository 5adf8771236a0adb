"""What a checkpoint says of masks: any Lightning checkpoint or state dict, whatever trained it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.functional.masks import unpack
from lightning_sparse.masks.plan import canonical_name

__all__ = [
    "CheckpointError",
    "load_checkpoint",
    "looks_like_safetensors",
    "masks_by_method",
    "masks_of_zeros",
    "some_of",
    "state_dict_of",
]

# Lightning's key, then those that training scripts commonly use
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")


class CheckpointError(ValueError):
    """A file cannot be read as a checkpoint or as masks; the message says why, and what to do."""


def load_checkpoint(path: str | Path) -> Any:
    """What :func:`torch.save` wrote, on the CPU; code in the file is never run.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, or unsafe to load.

    Example:
        >>> torch.save({"weight": torch.eye(2)}, "eye.pt")
        >>> load_checkpoint("eye.pt")
        {'weight': tensor([[1., 0.],
                [0., 1.]])}
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"There is no file {path}.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the file itself (sharded checkpoints cannot be read).")
    if looks_like_safetensors(path):
        raise CheckpointError(
            f"{path} is in the safetensors format, as files of masks are, and is no checkpoint. Of a file of masks,"
            " load_masks gives the masks, and `lightning-sparse masks compare A B` says how alike those of two files"
            " are; it takes a checkpoint as well."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint lead torch to any exception
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} holds Python objects besides tensors and plain values. They are not loaded, because they "
                "could run code. If you trust the file, save its tensors on their own: "
                "torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')."
            ) from error
        raise CheckpointError(
            f"{path} is damaged or is not a checkpoint: torch cannot read it{_reason(error)}. "
            "If it should be one, copy or download it again."
        ) from error


def looks_like_safetensors(path: str | Path) -> bool:
    """Whether a JSON header follows eight bytes of its length; zip archives and pickles begin otherwise.

    Example:
        >>> torch.save({"weight": torch.eye(2)}, "eye.pt")
        >>> looks_like_safetensors("eye.pt")
        False
    """
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def state_dict_of(checkpoint: Any, path: str | Path) -> dict[str, Tensor]:
    """The tensors by name, those that :mod:`torch.nn.utils.prune` split into two as their product.

    Args:
        checkpoint: What :func:`load_checkpoint` returned.
        path: Where it was, for the message of an error.

    Raises:
        CheckpointError: There is no state dict in it.

    Example:
        >>> state_dict_of({"state_dict": {"weight": torch.eye(2)}, "epoch": 3}, "eye.pt").keys()
        dict_keys(['weight'])
    """
    if isinstance(checkpoint, Mapping):
        nested = (checkpoint[key] for key in STATE_DICT_KEYS if isinstance(checkpoint.get(key), Mapping))
        state = next(nested, checkpoint)
        tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
        if tensors:
            return _without_split_masks(tensors)
    raise CheckpointError(
        f"{path} holds no state dict: expected names with tensors, on their own or under one of {STATE_DICT_KEYS}; "
        f"found {_describe(checkpoint)}."
    )


def masks_by_method(checkpoint: Any, path: str | Path) -> dict[str, dict[str, Tensor]]:
    """The masks that methods of this package have saved in a checkpoint: state key → name → mask.

    Args:
        checkpoint: What :func:`load_checkpoint` returned, or what Lightning gives to a callback.
        path: Where it was, for the message of an error.

    Returns:
        ``bool`` tensors with the shapes of the weights, on the CPU; empty where no method has saved any.

    Raises:
        CheckpointError: A mask is cut short.

    Example:
        >>> saved = {"shape": [1, 3], "bits": torch.tensor([5], dtype=torch.uint8), "budget": 2, "updated_at": 7}
        >>> state = {"step": 8, "masks": {"weight": saved}, "method": {}}
        >>> masks_by_method({"callbacks": {"GMP": state}}, "gmp.ckpt")
        {'GMP': {'weight': tensor([[ True, False,  True]])}}
    """
    states = checkpoint.get("callbacks") if isinstance(checkpoint, Mapping) else None
    if not isinstance(states, Mapping):
        return {}
    return {
        str(key): {name: _unpacked(name, saved, path) for name, saved in state["masks"].items()}
        for key, state in states.items()
        if isinstance(state, Mapping) and {"step", "masks", "method"} <= state.keys()
    }


def masks_of_zeros(state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Masks that are active where a weight is not zero.

    Args:
        state: Weights by name; the prefixes of wrappers are left out.
        names: The weights that are asked for; by default every floating-point tensor with two dimensions or more in
            which something, but not everything, is zero.

    Example:
        >>> masks_of_zeros({"eye": torch.eye(2), "dense": torch.ones(2, 2), "bias": torch.zeros(2)})
        {'eye': tensor([[ True, False],
                [False,  True]])}
    """
    tensors = {canonical_name(name): tensor for name, tensor in state.items()}
    if names is not None:
        return {name: tensors[name] != 0 for name in names if name in tensors}
    masks = {name: tensor != 0 for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.is_floating_point()}
    return {name: mask for name, mask in masks.items() if mask.any() and not mask.all()}


def some_of(names: Iterable[str], most: int = 4) -> str:
    """The first of the names, and how many more there are.

    Example:
        >>> some_of(["conv.weight", "fc.weight", "head.weight"], most=2)
        'conv.weight, fc.weight and 1 more'
    """
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def _unpacked(name: str, saved: Any, path: str | Path) -> Tensor:
    try:
        return unpack(saved["bits"], tuple(saved["shape"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"The mask of {name} in {path} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason(error: Exception) -> str:
    """What torch says in brackets, but for its advice to load with ``weights_only=False``, which may run code."""
    line = _first_line(error)
    return "" if "weights_only" in line else f" ({line})"


def _describe(checkpoint: Any) -> str:
    if isinstance(checkpoint, Mapping):
        return f"a dictionary with the keys {sorted(map(str, checkpoint))}"
    return f"a {type(checkpoint).__name__}"


def _without_split_masks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole, mask = name.removesuffix("_orig"), tensors.get(f"{name.removesuffix('_orig')}_mask")
        if name.endswith("_orig") and mask is not None:
            merged[whole] = tensor * mask
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in tensors):
            merged[name] = tensor
    return merged
