"""Masks as files of their own, in the safetensors format: one bit per weight, and no code that could run.

A file holds one ``uint8`` tensor for each weight, under its name, packed by :func:`~lightning_sparse.functional.pack`.
The metadata are ``format`` (``lightning_sparse.masks``), ``version`` (``2``), ``shapes`` (the shape of each mask, as
JSON) and ``digest`` (of names, shapes and bits). Files of version ``1`` have no digest; they can be read too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_sparse.atomic import write_atomically
from lightning_sparse.functional.masks import pack, unpack
from lightning_sparse.functional.stored import digest, obstacle
from lightning_sparse.masks.checkpoint import (
    CheckpointError,
    load_checkpoint,
    looks_like_safetensors,
    masks_by_method,
    masks_of_zeros,
    some_of,
    state_dict_of,
)
from lightning_sparse.masks.layout import is_sharded, layout_of, local_part
from lightning_sparse.masks.places import canonical_name, printable
from lightning_sparse.masks.plan import judge_parameters
from lightning_sparse.masks.reading import as_path, is_archive, metadata_of
from lightning_sparse.masks.registry import ELSEWHERE, MaskRegistry
from lightning_sparse.masks.sums import rank
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.masks.wrappers import as_named, unwrapped

__all__ = ["load_masks", "read_masks", "save_masks"]

_FORMAT, _VERSION, _WITHOUT_DIGEST = "lightning_sparse.masks", "2", "1"

_HOW_TO_SAVE = (
    'save_masks takes the file and then what has the masks, as in save_masks("sparse.masks", method): a method such as'
    " FGGP, its registry, a module, or a mapping from names to bool tensors"
)


class _HasRegistry(Protocol):
    """A method of sparse training, seen from below."""

    @property
    def registry(self) -> MaskRegistry: ...


def save_masks(
    path: str | Path, masks: Mapping[str, Tensor] | Mapping[str, MaskedWeight] | _HasRegistry | nn.Module
) -> None:
    """Write masks to a file: one bit per weight, in the safetensors format.

    If training runs on several processes, all hold the same masks, so let one process write. If weights are sharded,
    call this in all processes: each has a part of the masks, and process 0 writes. The file is written completely or
    not at all.

    Args:
        path: The file. An existing file is replaced; its permissions are kept, and links to it still work.
        masks: One of these. A mapping from names to ``bool`` tensors, ``True`` = active. A registry. A callback, which
            gives the masks of all methods of its module. A module, which gives its registry during training, and
            otherwise the zeros of the weights that a method would mask. Wrappers (``torch.compile``, Fabric, DDP,
            DataParallel, AveragedModel) do not change the names.

    Raises:
        TypeError: The path is not a path, for example because arguments are swapped, or the masks have a wrong type.
        ValueError: There is no mask, or one is not ``bool``, or its name cannot be written.
        OSError: The file cannot be written; the message says why, for example that the disk is full.

    Example:
        >>> from lightning_sparse import load_masks, save_masks
        >>> module = nn.Linear(2, 2)
        >>> _ = module.weight.data.copy_(torch.eye(2))
        >>> save_masks("eye.masks", module)
        >>> load_masks("eye.masks")
        {'weight': tensor([[ True, False],
                [False,  True]])}
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{_HOW_TO_SAVE}; the path is a {type(path).__name__}.")
    tensors, is_spread = _tensors(masks)
    if not tensors:
        raise ValueError(
            f"There is no mask to write to {path}. A callback has masks from the start of its training on; to save"
            f" those of a checkpoint, use `lightning-sparse masks extract`. {ELSEWHERE}."
        )
    for name, mask in tensors.items():
        _check_mask(name, mask)
    shapes = {name: list(mask.shape) for name, mask in tensors.items()}
    packed = {name: pack(mask) for name, mask in tensors.items()}
    metadata = {"format": _FORMAT, "version": _VERSION, "shapes": json.dumps(shapes)}
    metadata["digest"] = _digest(shapes, packed)
    if is_spread and rank() != 0:
        return
    try:
        content = save(packed, metadata)
    except (SafetensorError, UnicodeEncodeError) as error:
        raise ValueError(f"The masks cannot be written to {path}: {printable(str(error))}.") from error
    write_atomically(path, content)


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Read the masks that :func:`save_masks` wrote.

    Returns:
        ``bool`` tensors with the shapes of the weights, on the CPU, by name in alphabetical order.

    Raises:
        CheckpointError: The file is missing, damaged (its digest does not match), or holds no masks.

    Example:
        >>> from lightning_sparse import load_masks, save_masks
        >>> save_masks("fc.masks", {"fc.weight": torch.tensor([[True, False]])})
        >>> load_masks("fc.masks")
        {'fc.weight': tensor([[ True, False]])}
    """
    path = as_path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is a folder; give the file itself." if path.is_dir() else f"There is no file {path}."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            packed = {name: cast("Tensor", file.get_tensor(name)) for name in sorted(file.keys())}
    except (SafetensorError, OSError, AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or is not a file of masks: safetensors cannot read it ({error}). Files of masks are"
            " written by save_masks and by `lightning-sparse masks extract`."
        ) from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} holds tensors in the safetensors format, but no masks. Files of masks are written by save_masks"
            " and by `lightning-sparse masks extract`."
        )
    if metadata.get("version") not in (_VERSION, _WITHOUT_DIGEST):
        raise CheckpointError(
            f"{path} was written in version {metadata.get('version', '')[:40]} of the format of masks, and this"
            f" lightning_sparse reads version {_VERSION}. Upgrade lightning-sparse."
        )
    return _unpacked(packed, metadata, path)


def read_masks(path: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read masks from a file of masks, a checkpoint of a method, or weights with zeros.

    Args:
        path: A file that :func:`save_masks` wrote, a Lightning checkpoint, or a state dict, saved by ``torch.save`` or
            in the safetensors format. If a checkpoint holds a method's masks, these are used, not the zeros.
        names: The names of the module's weights; they serve to recognise prefixes of wrappers in the file. If masks are
            made from zeros, only these weights are read, if the file has them; by default all weights with zeros.

    Returns:
        ``bool`` tensors with the shapes of the weights, on the CPU, by name.

    Raises:
        CheckpointError: The file is missing, damaged, or none of these, or has none of the ``names``.

    Example:
        >>> from lightning_sparse.masks import read_masks
        >>> torch.save({"fc.weight": torch.eye(2)}, "eye.pt")
        >>> read_masks("eye.pt")
        {'fc.weight': tensor([[ True, False],
                [False,  True]])}
    """
    asked = None if names is None else list(names)
    metadata = metadata_of(path) if looks_like_safetensors(path) else {}
    if metadata is None or metadata.get("format") == _FORMAT:
        return as_named(load_masks(path), asked)
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        if not Path(path).is_file() or is_archive(path):  # a zip archive is a checkpoint, if a bad one
            raise
        raise CheckpointError(f"{error} It is not a file of masks either.") from error
    methods = masks_by_method(checkpoint, path)
    if methods:
        return as_named({name: mask for masks in methods.values() for name, mask in masks.items()}, asked)
    state = state_dict_of(checkpoint, path)
    masks = masks_of_zeros(state, asked, path)
    if asked and not masks:
        raise CheckpointError(
            f"{path} has none of the weights that are asked for, which are {some_of(asked)}; it has {some_of(state)}."
            " Give a file with the weights of this module, under the names that they have in it."
        )
    if all(mask.all() for mask in masks.values()):
        raise CheckpointError(
            f"{path} is dense: no method has saved masks in it, and there is no weight in it with zeros. Give the"
            " checkpoint of a sparse training, or a file that save_masks wrote."
        )
    return masks


def _tensors(masks: Any) -> tuple[dict[str, Tensor], bool]:
    """The masks by name, whole, and whether processes hold parts of them."""
    if isinstance(masks, nn.Module):
        masks = unwrapped(masks)
        registry = MaskRegistry.find(masks)
        if registry is None:
            weights = judge_parameters(masks).weights
            sharded = any(is_sharded(weight.parameter) for weight in weights)
            return {w.name: layout_of(w.parameter).whole(local_part(w.parameter) != 0) for w in weights}, sharded
        masks = registry
    elif not isinstance(masks, Mapping):
        masks = getattr(masks, "registry", masks)
    if not isinstance(masks, Mapping):
        raise TypeError(f"{_HOW_TO_SAVE}; what is to be written is a {type(masks).__name__}.")
    if unnamed := [name for name in masks if not isinstance(name, str) or name == "__metadata__"]:
        raise ValueError(f"Masks have the names of weights, and {unnamed[0]!r} is not a name.")
    spread = any(isinstance(value, MaskedWeight) and not value.layout.is_whole for value in masks.values())
    tensors = {
        canonical_name(name): value.layout.whole(value.mask) if isinstance(value, MaskedWeight) else value
        for name, value in masks.items()
    }
    return tensors, spread


def _check_mask(name: str, mask: Any) -> None:
    name = printable(name)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        if fault := obstacle(mask):
            raise ValueError(f"The mask of {name} {fault}.")
        return
    found, remedy = str(getattr(mask, "dtype", "")), "as in `weight != 0`"
    if not isinstance(mask, Tensor):
        is_array = hasattr(mask, "__array__")
        found = f"no tensor but of type {type(mask).__name__}"
        remedy = "as in `torch.as_tensor(mask) != 0`" if is_array else f"of the weight's shape, {remedy}"
    raise ValueError(f"The mask of {name} is {found}; give a tensor of torch.bool, True = active, {remedy}.")


def _digest(shapes: Mapping[str, list[int]], packed: Mapping[str, Tensor]) -> str:
    return digest({name: [shapes[name], bits] for name, bits in packed.items()})


def _unpacked(packed: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    try:
        shapes: dict[str, list[int]] = json.loads(metadata["shapes"])
        if shapes.keys() != packed.keys():
            raise ValueError(f"there are shapes of {some_of(sorted(shapes))} and masks of {some_of(sorted(packed))}.")
        if not packed:
            raise CheckpointError(f"{path} holds no masks: the file is empty. Write it again.")
        if metadata["version"] != _WITHOUT_DIGEST and metadata.get("digest") != _digest(shapes, packed):
            raise CheckpointError(f"{path} is damaged: its digest does not match its contents. Copy or write it again.")
        if not all(isinstance(shape, list) for shape in shapes.values()):
            raise ValueError("a shape is a list of sizes.")
        return {name: unpack(bits, shapes[name]) for name, bits in packed.items()}
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: its masks do not fit their shapes ({error}) Write it again."
        ) from error
