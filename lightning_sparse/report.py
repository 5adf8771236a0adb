"""How sparse is a checkpoint: any Lightning checkpoint or state dict, whatever trained it."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CheckpointError", "LayerSparsity", "checkpoint_sparsity", "sparsity_table"]

# Lightning's key, then those that training scripts commonly use
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")


class CheckpointError(ValueError):
    """A file cannot be read as a checkpoint; the message says why, and what to do."""


@final
@dataclass(frozen=True)
class LayerSparsity:
    """How many weights of one tensor are zero.

    Args:
        name: Key of the tensor in the state dict.
        shape: Shape of the tensor.
        num_active: Weights that are not zero.

    Example:
        >>> from lightning_sparse.report import LayerSparsity
        >>> LayerSparsity("fc.weight", (10, 20), num_active=50).sparsity
        0.75
    """

    name: str
    shape: tuple[int, ...]
    num_active: int

    @property
    def numel(self) -> int:
        """All weights, zero or not."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero; 0 for an empty tensor."""
        return 1 - self.num_active / self.numel if self.numel else 0.0


def checkpoint_sparsity(path: str | Path, *, all_tensors: bool = False) -> list[LayerSparsity]:
    """Count the zeros in the tensors of a checkpoint.

    A checkpoint is a Lightning checkpoint, a dictionary that holds a state dict under "state_dict", "model_state_dict"
    or "model", or a bare state dict. Code in the file is never run. Tensors that :mod:`torch.nn.utils.prune` split into
    ``<name>_orig`` and ``<name>_mask`` are reported as their product.

    Args:
        path: The file.
        all_tensors: Count biases, normalisation and integer tensors too, and not only floating-point tensors with at
            least two dimensions.

    Returns:
        One entry per tensor, in the order of the file.

    Raises:
        CheckpointError: If the file is missing, damaged, unsafe to load, or holds no such tensors.

    Example:
        >>> import torch
        >>> from lightning_sparse.report import checkpoint_sparsity
        >>> torch.save({"fc.weight": torch.eye(4), "fc.bias": torch.zeros(4)}, "eye.pt")
        >>> checkpoint_sparsity("eye.pt")
        [LayerSparsity(name='fc.weight', shape=(4, 4), num_active=4)]
    """
    tensors = _without_split_masks(_state_dict(_load(Path(path)), path))
    layers = [
        LayerSparsity(name, tuple(tensor.shape), int(tensor.count_nonzero()))
        for name, tensor in tensors.items()
        if all_tensors or (tensor.ndim >= 2 and tensor.is_floating_point())
    ]
    if not layers:
        raise CheckpointError(
            f"{path} has {len(tensors)} tensors, none of them floating point with two dimensions or more; "
            "ask for all tensors (--all) to see them."
        )
    return layers


def sparsity_table(layers: Iterable[LayerSparsity], title: str | None = None) -> Table:
    """Lay out layers and their total for a terminal.

    Args:
        layers: What :func:`checkpoint_sparsity` returned.
        title: Printed above the table.

    Example:
        >>> from lightning_sparse.report import LayerSparsity, sparsity_table
        >>> sparsity_table([LayerSparsity("fc.weight", (10, 20), num_active=50)]).row_count
        2
    """
    layers = list(layers)
    table = Table(title=None if title is None else escape(title))
    table.add_column("layer", overflow="fold")
    for header in ("shape", "weights", "active", "sparsity"):
        table.add_column(header, justify="right")
    for layer in layers:
        shape = " × ".join(map(str, layer.shape)) or "scalar"
        table.add_row(escape(layer.name), shape, f"{layer.numel:,}", f"{layer.num_active:,}", f"{layer.sparsity:.2%}")
    total = LayerSparsity("total", (sum(layer.numel for layer in layers),), sum(layer.num_active for layer in layers))
    table.add_section()
    table.add_row("total", "", f"{total.numel:,}", f"{total.num_active:,}", f"{total.sparsity:.2%}", style="bold")
    return table


def _load(path: Path) -> Any:
    if not path.exists():
        raise CheckpointError(f"There is no file {path}.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the file itself (sharded checkpoints cannot be read).")
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
            f"{path} is damaged or is not a checkpoint: torch cannot read it ({_first_line(error)}). "
            "If it should be one, copy or download it again."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _state_dict(checkpoint: Any, path: str | Path) -> dict[str, Tensor]:
    if isinstance(checkpoint, Mapping):
        nested = (checkpoint[key] for key in STATE_DICT_KEYS if isinstance(checkpoint.get(key), Mapping))
        state = next(nested, checkpoint)
        tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise CheckpointError(
        f"{path} holds no state dict: expected names with tensors, on their own or under one of {STATE_DICT_KEYS}; "
        f"found {_describe(checkpoint)}."
    )


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
