"""The shapes of a checkpoint's weights, told before one of them is loaded."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_sparse.masks.plan import canonical_name

__all__ = ["shapes_in"]

_WEIGHTS = "state_dict."


def shapes_in(path: Path) -> dict[str, Size]:
    """The shape of each weight in a checkpoint, a folder or a file, by its name; empty where it does not tell.

    Of a file nothing but the list of its tensors is read. Torch describes a folder in a pickle, as it will read it to
    load the weights: take folders that you trust.
    """
    try:
        if path.is_dir():
            entries = FileSystemReader(path).read_metadata().state_dict_metadata.items()
            return {
                canonical_name(name.removeprefix(_WEIGHTS)): entry.size
                for name, entry in entries
                if name.startswith(_WEIGHTS) and isinstance(entry, TensorStorageMetadata)
            }
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        return {canonical_name(name): value.shape for name, value in weights.items() if isinstance(value, Tensor)}
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError):
        return {}  # who loads it says what is wrong with it
