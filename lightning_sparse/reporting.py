"""How sparse is it: a module, or any Lightning checkpoint or state dict, whatever trained it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from torch import nn

from lightning_sparse.functional.masks import count_true
from lightning_sparse.functional.topology import count_dead
from lightning_sparse.masks.checkpoint import (
    CheckpointError,
    load_checkpoint,
    masks_by_method,
    non_zeros,
    state_dict_of,
)
from lightning_sparse.masks.inheritance import looks_pruned
from lightning_sparse.masks.layers import kind_of
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.plan import Candidate, Plan, canonical_name, judge_parameters
from lightning_sparse.masks.registry import MaskRegistry
from lightning_sparse.masks.wrappers import unwrapped
from lightning_sparse.metrics.flops import ForwardFLOPs
from lightning_sparse.overlap import MaskOverlap, compare_masks, overlap_table

__all__ = [
    "CheckpointError",
    "LayerSparsity",
    "MaskOverlap",
    "SparsityReport",
    "checkpoint_sparsity",
    "compare_masks",
    "overlap_table",
    "report",
    "sparsity_table",
    "width_of",
]


@final
@dataclass(frozen=True)
class LayerSparsity:
    """How many weights of one tensor are zero.

    Args:
        name: Key of the tensor in the state dict.
        shape: Shape of the tensor.
        num_active: Weights that are not zero.
        dead_rows: Output neurons, filters or gate rows all of whose weights are zero; ``None`` where the type of the
            layer is not known, as in a checkpoint.
        dead_columns: Input neurons or channels all of whose weights are zero, in this layer; ``None`` as above.
        flops: Operations of the layer in a forward pass, two for a multiplication and an addition, those with a zero
            left out; ``None`` without an example input.
        masked: Whether a method has a mask of it; ``None`` where that is not known, as of weights that were loaded.

    Example:
        >>> from lightning_sparse.reporting import LayerSparsity
        >>> LayerSparsity("fc.weight", (10, 20), num_active=50).sparsity
        0.75
    """

    name: str
    shape: tuple[int, ...]
    num_active: int
    dead_rows: int | None = None
    dead_columns: int | None = None
    flops: int | None = None
    masked: bool | None = None

    @property
    def numel(self) -> int:
        """All weights, zero or not."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero; 0 for an empty tensor."""
        return 1 - self.num_active / self.numel if self.numel else 0.0


@final
@dataclass(frozen=True)
class SparsityReport:
    """The sparsity of each layer, and of all of them together; what is printed is a table.

    Args:
        layers: The layers that are counted, in the order of the module.
        flops: Operations of a forward pass, those with a zero weight left out; ``None`` without an example input.
        dense_flops: Those of the same network dense.
    """

    layers: tuple[LayerSparsity, ...]
    flops: int | None = None
    dense_flops: int | None = None

    @property
    def numel(self) -> int:
        """All weights of the layers, zero or not."""
        return sum(layer.numel for layer in self.layers)

    @property
    def num_active(self) -> int:
        """Weights of the layers that are not zero."""
        return sum(layer.num_active for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the layers' weights that are zero."""
        return 1 - self.num_active / self.numel if self.numel else 0.0

    @property
    def masked(self) -> SparsityReport:
        """The layers alone that are known to be masked: a sparsity that a method was asked for is that of these."""
        return SparsityReport(tuple(layer for layer in self.layers if layer.masked))

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists and numbers, for JSON or a data frame."""
        layers = [{**asdict(layer), "shape": list(layer.shape), "sparsity": layer.sparsity} for layer in self.layers]
        return {
            "sparsity": self.sparsity,
            "numel": self.numel,
            "num_active": self.num_active,
            "flops": self.flops,
            "dense_flops": self.dense_flops,
            "layers": layers,
        }

    def __rich__(self) -> Table:
        table = sparsity_table(self.layers)
        if self.flops is not None and self.dense_flops is not None:
            rest = self.flops - sum(layer.flops or 0 for layer in self.layers)
            table.caption = (
                f"{self.flops:,} of {self.dense_flops:,} dense FLOPs, {rest:,} of them in what is not listed;"
                " theoretical: dense kernels carry out all"
            )
        return table

    def __str__(self) -> str:
        table = self.__rich__()
        console = Console(
            width=width_of(table), no_color=True, force_terminal=False, force_jupyter=False, highlight=False
        )
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


def report(
    source: nn.Module | str | Path,
    example: Any = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    all_tensors: bool = False,
) -> SparsityReport:
    """Count the zeros of a module, or of a checkpoint.

    Args:
        source: A module, of which the weights are counted that a method would mask, frozen ones too, and those that
            have a mask or hold zeros as after a sparse training; or the path of a checkpoint, see
            :func:`checkpoint_sparsity`.
        example: An input of the module, for its operations: one tensor, a tuple of arguments, or a dictionary of them
            by name. The module runs on it once, in evaluation mode.
        include: Patterns of what is counted of a module, as a method takes them.
        exclude: Patterns of what is not.
        all_tensors: Count biases, normalisation and all other parameters too.

    Returns:
        One entry per layer; ``print`` shows a table, ``to_dict`` gives plain data.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, unsafe to load, or holds no such tensors.
        TypeError: The source is neither, for example a callback or a Trainer.
        ValueError: The module has no weight to count, is sharded, or an example input or patterns were given for a
            checkpoint.
        MisconfigurationException: A pattern matches nothing.

    Example:
        >>> from lightning_sparse import report
        >>> module = nn.Linear(3, 2, bias=False)
        >>> _ = module.weight.data.copy_(torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 1.0]]))
        >>> print(report(module, torch.ones(5, 3)))
        ┏━━━━━━━━┳━━━━━━━┳━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━┓
        ┃ layer  ┃ shape ┃ weights ┃ active ┃ sparsity ┃ dead rows ┃ dead columns ┃ FLOPs ┃
        ┡━━━━━━━━╇━━━━━━━╇━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━┩
        │ weight │ 2 × 3 │       6 │      2 │   66.67% │         1 │            1 │    20 │
        ├────────┼───────┼─────────┼────────┼──────────┼───────────┼──────────────┼───────┤
        │ total  │       │       6 │      2 │   66.67% │         1 │            1 │    20 │
        └────────┴───────┴─────────┴────────┴──────────┴───────────┴──────────────┴───────┘
        ...
        >>> report(module).to_dict()["layers"][0]["dead_rows"]
        1
    """
    if isinstance(source, nn.Module):
        source = unwrapped(source)
        plan = judge_parameters(source, include=include, exclude=exclude)
        return _report_of_module(source, example, plan, everything=all_tensors, narrowed=include is not None)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"report takes a module or the path of a checkpoint, and this is a {type(source).__name__}. For a callback"
            " or a Trainer, report the module that is trained: report(trainer.model)."
        )
    if example is not None:
        raise ValueError(f"{source} is a checkpoint, which takes no example input; load it and report the module.")
    if include is not None or exclude is not None:
        raise ValueError(f"{source} is a checkpoint, which takes no patterns; load it and report the module.")
    return SparsityReport(tuple(checkpoint_sparsity(source, all_tensors=all_tensors)))


def checkpoint_sparsity(path: str | Path, *, all_tensors: bool = False) -> list[LayerSparsity]:
    """Count the zeros in the tensors of a checkpoint.

    A checkpoint is a Lightning checkpoint, a dictionary that holds a state dict under "state_dict", "model_state_dict"
    or "model", a bare state dict, or a safetensors file of weights.
    Code in the file is never run. Tensors that :mod:`torch.nn.utils.prune` split into
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
        >>> from lightning_sparse.reporting import checkpoint_sparsity
        >>> torch.save({"fc.weight": torch.eye(4), "fc.bias": torch.zeros(4)}, "eye.pt")
        >>> [(layer.name, layer.num_active) for layer in checkpoint_sparsity("eye.pt")]
        [('fc.weight', 4)]
    """
    checkpoint = load_checkpoint(path)
    tensors = state_dict_of(checkpoint, path)
    masked = {name for masks in masks_by_method(checkpoint, path).values() for name in masks}
    layers = [
        LayerSparsity(
            name,
            tuple(tensor.shape),
            count_true(non_zeros(name, tensor, path)),
            masked=canonical_name(name) in masked if masked else None,
        )
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
        layers: What :func:`checkpoint_sparsity` returned, or the layers of a report.
        title: Printed above the table.

    Example:
        >>> from lightning_sparse.reporting import LayerSparsity, sparsity_table
        >>> sparsity_table([LayerSparsity("fc.weight", (10, 20), num_active=50)]).row_count
        2
    """
    layers = list(layers)
    table = Table(title=None if title is None else escape(printable(title)))
    table.add_column("layer", overflow="fold")
    known = [
        (header, key)
        for header, key in (("dead rows", "dead_rows"), ("dead columns", "dead_columns"), ("FLOPs", "flops"))
        if any(getattr(layer, key) is not None for layer in layers)
    ]
    for header in ("shape", "weights", "active", "sparsity", *(header for header, _ in known)):
        table.add_column(header, justify="right")
    for layer in layers:
        shape = " × ".join(map(str, layer.shape)) or "scalar"
        counts = (getattr(layer, key) for _, key in known)
        table.add_row(
            escape(printable(layer.name)),
            shape,
            f"{layer.numel:,}",
            f"{layer.num_active:,}",
            f"{layer.sparsity:.2%}",
            *("" if count is None else f"{count:,}" for count in counts),
        )
    table.add_section()
    total = SparsityReport(tuple(layers))
    if 0 < len(total.masked.layers) < len(layers):
        _add_sum(table, "masked", total.masked, [key for _, key in known])
    _add_sum(table, "total", total, [key for _, key in known])
    return table


def _add_sum(table: Table, title: str, of: SparsityReport, counts: Sequence[str]) -> None:
    sums = (sum(getattr(layer, key) or 0 for layer in of.layers) for key in counts)
    cells = (f"{of.numel:,}", f"{of.num_active:,}", f"{of.sparsity:.2%}", *(f"{count:,}" for count in sums))
    table.add_row(title, "", *cells, style="bold")


def width_of(table: Table) -> int:
    """The columns that a table takes if nothing in it is broken into lines, 120 at least for what is below it.

    Example:
        >>> from lightning_sparse.reporting import LayerSparsity, sparsity_table, width_of
        >>> width_of(sparsity_table([LayerSparsity("encoder." * 20 + "weight", (10, 20), num_active=50)]))
        210
    """
    console = Console(width=10_000)
    return max(120, Measurement.get(console, console.options, table).maximum)


def _report_of_module(
    module: nn.Module, example: Any, plan: Plan, *, everything: bool, narrowed: bool
) -> SparsityReport:
    if any(kind_of(item.reason) == "sharded" for item in plan):
        raise ValueError(plan.refusal)
    counter = None if example is None else _count_flops(module, example)
    masked = {*MaskRegistry.left_in(module), *(MaskRegistry.find(module) or ())}

    out = {"no shape yet", "excluded", *(["not included"] if narrowed else [])}

    def is_counted(item: Candidate) -> bool:
        kind = kind_of(item.reason)
        if kind in out or item.reason.startswith("tied: to"):
            return False
        if everything or kind in ("", "frozen", "shared memory") or item.name in masked:
            return True
        return item.is_matrix and bool(item.parameter.any()) and looks_pruned(item.parameter == 0)

    counted = [item for item in plan if is_counted(item)]
    if not counted:
        raise ValueError(
            f"{type(module).__name__} has no weight to count. Its parameters and the reasons:\n{plan}\n"
            "Ask for all_tensors=True to count them all."
        )
    by_name = counter.by_parameter if counter else {}
    layers = tuple(
        replace(_layer(item, by_name.get(item.name)), masked=item.name in masked if masked else None)
        for item in counted
    )
    if counter is None:
        return SparsityReport(layers)
    saved = sum(by_name.get(layer.name, 0) - (layer.flops or 0) for layer in layers)
    return SparsityReport(layers, counter.total - saved, counter.total)


def _layer(candidate: Candidate, dense_flops: int | None) -> LayerSparsity:
    value = candidate.parameter.detach()
    num_active = count_true(value != 0)  # of eight-bit floats too
    flops = None if dense_flops is None else round(dense_flops * num_active / max(1, value.numel()))
    if candidate.reason not in ("", "frozen"):
        return LayerSparsity(candidate.name, tuple(value.shape), num_active, flops=flops)
    rows = candidate.rows(value != 0)
    return LayerSparsity(
        candidate.name,
        tuple(value.shape),
        num_active,
        dead_rows=count_dead([rows])[0],
        dead_columns=count_dead([candidate.columns(value != 0)])[0],
        flops=flops,
    )


def _count_flops(module: nn.Module, example: Any) -> ForwardFLOPs:
    arguments = example if isinstance(example, tuple) else () if isinstance(example, Mapping) else (example,)
    named = dict(example) if isinstance(example, Mapping) else {}
    parameters = {canonical_name(name): parameter for name, parameter in module.named_parameters()}
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        # With gradients: without them, operations on copies would be taken for those of compiled code.
        with torch.enable_grad(), ForwardFLOPs(parameters) as counter:
            module(*arguments, **named)
    finally:
        for part, mode in modes.items():
            part.training = mode
    return counter
