"""What a checkpoint says of masks: any Lightning checkpoint or state dict, whatever trained it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.functional.masks import unpack, zero_pruned_
from lightning_sparse.functional.stored import digest, nonzero, obstacle
from lightning_sparse.masks.reading import CheckpointError, load_checkpoint, looks_like_safetensors
from lightning_sparse.masks.wrappers import as_named

__all__ = [
    "STATE_VERSION",
    "CheckpointError",
    "fault_of_seal",
    "load_checkpoint",
    "looks_like_safetensors",
    "masks_by_method",
    "masks_of_zeros",
    "non_zeros",
    "some_of",
    "state_dict_of",
]

STATE_VERSION = 2
"""Of the format of a method's state."""

# Lightning's key, then those that training scripts commonly use
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")


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
            return _without_split_masks(tensors, path)
    raise CheckpointError(
        f"{path} holds no state dict: expected names with tensors, on their own or under one of {STATE_DICT_KEYS}; "
        f"found {_describe(checkpoint)}."
    )


def masks_by_method(checkpoint: Any, path: str | Path, unchecked: Collection[str] = ()) -> dict[str, dict[str, Tensor]]:
    """The masks that methods of this package have saved in a checkpoint: state key → name → mask.

    Args:
        checkpoint: What :func:`load_checkpoint` returned, or what Lightning gives to a callback.
        path: Where it was, for the message of an error.
        unchecked: State keys whose digests are looked at later, when more is known of what may be wrong.

    Returns:
        ``bool`` tensors with the shapes of the weights, on the CPU; empty where no method has saved any.

    Raises:
        CheckpointError: A mask is cut short, or a state with a digest is not what was written.

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
        str(key): _masks_of_state(str(key), state, path, check=key not in unchecked)
        for key, state in states.items()
        if isinstance(state, Mapping) and {"step", "masks", "method"} <= state.keys()
    }


def fault_of_seal(state: Mapping[Any, Any]) -> str:
    """What is wrong with the version and the digest of a state, as the end of a sentence; empty where they are right.

    Example:
        >>> fault_of_seal({"step": 3, "version": STATE_VERSION, "digest": "0"})
        'is damaged: it is not what was written (its digest differs)'
    """
    if not {"version", "digest"} & state.keys():
        return ""  # as the first versions of this package wrote
    if "version" in state and not _is_own(state["version"]):
        return f"has version {str(state['version'])[:40]!r}, and this lightning_sparse reads version {STATE_VERSION}"
    if missing := {"version", "digest"} - state.keys():
        return f"is cut short: it lacks {', '.join(missing)}"
    try:
        written = digest({name: value for name, value in state.items() if name not in ("version", "digest")})
    except ValueError as error:
        return f"is damaged: {error}"
    return "" if state["digest"] == written else "is damaged: its digest does not match its contents"


def _is_own(version: object) -> bool:
    return type(version) is int and version == STATE_VERSION


def masks_of_zeros(
    state: Mapping[str, Tensor], names: Iterable[str] | None = None, path: str | Path = "the state dict"
) -> dict[str, Tensor]:
    """Masks that are active where a weight is not zero.

    Args:
        state: Weights by name; the prefixes of wrappers are left out.
        names: The weights that are asked for; by default every floating-point tensor with two dimensions or more in
            which something, but not everything, is zero.
        path: Where they were, for the message of an error.

    Raises:
        CheckpointError: A weight has no entries of its own.

    Example:
        >>> masks_of_zeros({"eye": torch.eye(2), "dense": torch.ones(2, 2), "bias": torch.zeros(2)})
        {'eye': tensor([[ True, False],
                [False,  True]])}
    """
    asked = None if names is None else list(names)
    tensors = as_named(state, asked)
    if asked is not None:
        return {name: non_zeros(name, tensors[name], path) for name in asked if name in tensors}
    masks = {
        name: non_zeros(name, tensor, path)
        for name, tensor in tensors.items()
        if tensor.ndim > 1 and tensor.is_floating_point()
    }
    return {name: mask for name, mask in masks.items() if mask.any() and not mask.all()}


def non_zeros(name: str, tensor: Tensor, path: str | Path) -> Tensor:
    """``bool``: which entries of a tensor of a file are not zero.

    Raises:
        CheckpointError: It has no entries of its own, so that a small file would ask for much memory.

    Example:
        >>> non_zeros("weight", torch.eye(2), "eye.pt")
        tensor([[ True, False],
                [False,  True]])
    """
    try:
        if fault := obstacle(tensor):
            raise ValueError(fault)
        return nonzero(tensor)
    except ValueError as error:
        raise CheckpointError(f"{name} in {path} {error}.") from error


def some_of(names: Iterable[str], most: int = 4) -> str:
    """The first of the names, and how many more there are.

    Example:
        >>> some_of(["conv.weight", "fc.weight", "head.weight"], most=2)
        'conv.weight, fc.weight and 1 more'
    """
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def _masks_of_state(key: str, state: Mapping[Any, Any], path: str | Path, *, check: bool) -> dict[str, Tensor]:
    if not isinstance(state["masks"], Mapping):
        raise CheckpointError(f"The masks of {key} in {path} are a {type(state['masks']).__name__}, not a mapping.")
    masks = {str(name): _unpacked(str(name), saved, path) for name, saved in state["masks"].items()}
    if check and (fault := fault_of_seal(state)):
        raise CheckpointError(f"The state of {key} in {path} {fault}.")
    return masks


def _unpacked(name: str, saved: Any, path: str | Path) -> Tensor:
    try:
        if not isinstance(saved["shape"], list | tuple):
            raise ValueError("its shape is not a list of sizes.")
        return unpack(saved["bits"], saved["shape"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The mask of {name} in {path} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a message that is for users; of another, what there is instead of a mask."""
    if isinstance(error, ValueError):
        return str(error).strip().splitlines()[0]
    return "its bits or its shape are missing or damaged."


def _describe(checkpoint: Any) -> str:
    if isinstance(checkpoint, Mapping):
        return f"a dictionary with the keys {some_of(sorted(map(str, checkpoint)), most=12) or 'none'}"
    return f"a {type(checkpoint).__name__}"


def _without_split_masks(tensors: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole, mask = name.removesuffix("_orig"), tensors.get(f"{name.removesuffix('_orig')}_mask")
        if name.endswith("_orig") and mask is not None:
            merged[whole] = _product(name, tensor, mask, path)
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in tensors):
            merged[name] = tensor
    return merged


def _product(name: str, tensor: Tensor, mask: Tensor, path: str | Path) -> Tensor:
    kept = non_zeros(f"{name.removesuffix('_orig')}_mask", mask, path)
    non_zeros(name, tensor, path)
    if mask.shape != tensor.shape:
        raise CheckpointError(
            f"{name} in {path} has shape {tuple(tensor.shape)} and its mask {tuple(mask.shape)}. Save both as"
            " torch.nn.utils.prune makes them."
        )
    product = tensor.clone(memory_format=torch.contiguous_format)
    return zero_pruned_(product, kept) if product.is_floating_point() else product * kept
