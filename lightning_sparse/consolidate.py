"""Checkpoints of sharded trainings, each a folder to which every process wrote its part, as one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import (
    _load_distributed_checkpoint,  # pyright: ignore[reportPrivateUsage]  # Lightning's script calls it, and then fails
)
from torch.distributed.checkpoint.api import CheckpointException

from lightning_sparse.masks import CheckpointError
from lightning_sparse.masks.places import printable

__all__ = ["consolidate"]

_PARTS, _REST = ".metadata", "meta.pt"


def consolidate(folder: str | Path, file: str | Path) -> None:
    """Write a checkpoint that ``ModelParallelStrategy`` saved as a folder into one file, which every strategy loads.

    The file holds weights, optimizers and the states of callbacks, masks among them: a training goes on from it on one
    device, under DDP, or sharded over other processes. All of it must fit into memory once; no process group is needed.

    Torch describes the parts in a pickle, ``.metadata``, which can run code when it is read: take folders that you
    trust.

    Args:
        folder: What the Trainer saved.
        file: Where to write; nothing may be there.

    Raises:
        CheckpointError: The folder is no such checkpoint, or damaged.
        FileExistsError: There is something at ``file``.
    """
    folder, file = Path(folder), Path(file)
    if file.exists():
        raise FileExistsError(f"{file} is there already. Remove it, or name another file.")
    missing = [part for part in (_PARTS, _REST) if not (folder / part).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is no checkpoint of a sharded training: it has no {' and no '.join(missing)}. Give the folder"
            " that the Trainer's ModelParallelStrategy saved; a checkpoint that is a file needs nothing done to it."
        )
    try:
        checkpoint = _load_distributed_checkpoint(folder)
    except (Exception, CheckpointException) as error:  # whatever reading a damaged file raises
        raise CheckpointError(f"{folder} cannot be read: {printable(str(error)).splitlines()[0]}") from error
    torch.save(_as_of_one_device(checkpoint), file)


def _as_of_one_device(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same with the optimizers in a list, as all other strategies save them."""
    names = [name for name in checkpoint if re.fullmatch(r"optimizer_\d+", name)]
    states = [checkpoint.pop(name) for name in sorted(names, key=lambda name: int(name.rpartition("_")[2]))]
    return checkpoint | {"optimizer_states": states}
