"""Counts the zeros in the weights of a module or in the tensors of a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_sparse.execution.examples import arguments_of, unfit
from lightning_sparse.execution.files import SparseFileError, is_sparse_file, load_sparse
from lightning_sparse.execution.shrink import Shrinkage, dead_units
from lightning_sparse.functional.masks import count_true
from lightning_sparse.functional.stored import obstacle
from lightning_sparse.functional.topology import count_dead
from lightning_sparse.masks.checkpoint import (
    CheckpointError,
    load_checkpoint,
    looks_like_safetensors,
    masks_by_method,
    non_zeros,
    state_dict_of,
)
from lightning_sparse.masks.inheritance import looks_pruned
from lightning_sparse.masks.layers import kind_of
from lightning_sparse.masks.layout import count_of_whole, is_sharded, layout_of, local_part
from lightning_sparse.masks.plan import Candidate, Plan, canonical_name, judge_parameters
from lightning_sparse.masks.registry import MaskRegistry
from lightning_sparse.masks.wrappers import unwrapped
from lightning_sparse.metrics.flops import ForwardFLOPs
from lightning_sparse.reporting.gains import Gains, Layer
from lightning_sparse.reporting.layers import LayerSparsity, SparsityReport

__all__ = ["checkpoint_sparsity", "read_state", "report"]

_OF_A_FILE = (
    "All floating-point tensors with at least two dimensions are counted, embeddings too: a file does not say what its"
    " tensors are. report(module), or --model on the command line, counts what a method would mask."
)


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
        source: A module or the path of a checkpoint. In a module, these weights are counted: those that a method would
            mask, including frozen ones, and those that have a mask or many zeros after sparse training. In a
            checkpoint, which does not say what layers its tensors are of, all that :func:`checkpoint_sparsity` counts
            are, embeddings too; the report's ``remark`` says so.
        example: An input of the module, for counting FLOPs: one tensor, a tuple or list of arguments, or a mapping of
            arguments by name. The module runs on it once, in evaluation mode.
        include: Patterns of the weights to count, as for a method.
        exclude: Patterns of the weights to leave out.
        all_tensors: Count biases, normalisation and all other parameters too.

    Returns:
        One entry per layer, and what the zeros gain: the size of a sparse file, and the share of groups that satisfy
        2:4. With an example input, it also has FLOPs, dead units, and the FLOPs that uniform and ERK allocations would
        need; for the dead units, the module is copied once. ``print`` shows tables, ``to_dict`` gives plain data.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, unsafe to load, or holds no such tensors.
        TypeError: The source is neither a module nor a path, but for example a callback or a Trainer.
        ValueError: The module has no weight to count, or does not take the example; the module is sharded and there is
            an example; or an example or patterns were given for a checkpoint.
        MisconfigurationException: A pattern matches nothing.

    Example:
        >>> from lightning_sparse import report
        >>> module = nn.Linear(3, 2, bias=False)
        >>> _ = module.weight.data.copy_(torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 1.0]]))
        >>> print(report(module, torch.ones(5, 3)))
        ┏━━━━━━━━┳━━━━━━━┳━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━━━━┳...
        ┃ layer  ┃ shape ┃ weights ┃ active ┃ sparsity ┃ dead rows ┃ dead columns ┃ FLOPs ┃ 2:4 groups ┃...
        ┡━━━━━━━━╇━━━━━━━╇━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━━━━╇...
        │ weight │ 2 × 3 │       6 │      2 │   66.67% │         1 │            1 │    20 │    100.00% │...
        ├────────┼───────┼─────────┼────────┼──────────┼───────────┼──────────────┼───────┼────────────┼...
        │ total  │       │       6 │      2 │   66.67% │         1 │            1 │    20 │            │...
        └────────┴───────┴─────────┴────────┴──────────┴───────────┴──────────────┴───────┴────────────┴...
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
    tensors, masked = _read(source)
    layers = _count(tensors, masked, source, all_tensors=all_tensors)
    counted = {layer.name for layer in layers}
    weights = {name: Layer(tensor, tensor) for name, tensor in tensors.items() if name in counted and tensor.ndim > 1}
    others = [tensor for name, tensor in tensors.items() if name not in weights]
    remark = "" if all_tensors or all(layer.masked for layer in layers) else _OF_A_FILE
    return SparsityReport(tuple(layers), gains=Gains.of(weights, others), remark=remark)


def checkpoint_sparsity(path: str | Path, *, all_tensors: bool = False) -> list[LayerSparsity]:
    """Count the zeros in the tensors of a checkpoint.

    A checkpoint is a Lightning checkpoint, a dictionary that holds a state dict under "state_dict", "model_state_dict"
    or "model", or a bare state dict; or a sparse file, or another safetensors file of weights. Code in the file is
    never run. Tensors that :mod:`torch.nn.utils.prune` split into ``<name>_orig`` and ``<name>_mask`` are reported as
    their product.

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
    return _count(*_read(path), path, all_tensors=all_tensors)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, of a sparse file, or of weights in the safetensors format.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe to load, or holds no tensors.

    Example:
        >>> torch.save({"state_dict": {"fc.weight": torch.eye(2)}, "epoch": 3}, "eye.ckpt")
        >>> read_state("eye.ckpt")
        {'fc.weight': tensor([[1., 0.],
                [0., 1.]])}
    """
    return _read(path)[0]


def _read(path: str | Path) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of a file, and the names of those for which a method has saved a mask there."""
    try:
        if is_sparse_file(path):
            return load_sparse(path), set()
    except SparseFileError as error:
        raise CheckpointError(str(error)) from error
    if looks_like_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                is_of_masks = (file.metadata() or {}).get("format") == "lightning_sparse.masks"
            if not is_of_masks:
                return load_file(path), set()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: safetensors cannot read it ({error}).") from error
    checkpoint = load_checkpoint(path)
    state = state_dict_of(checkpoint, path)
    for name, tensor in state.items():
        if fault := obstacle(tensor):
            raise CheckpointError(f"{name} in {path} {fault}.")
    return state, {name for masks in masks_by_method(checkpoint, path).values() for name in masks}


def _count(
    tensors: Mapping[str, Tensor], masked: set[str], path: str | Path, *, all_tensors: bool
) -> list[LayerSparsity]:
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


def _report_of_module(
    module: nn.Module, example: Any, plan: Plan, *, everything: bool, narrowed: bool
) -> SparsityReport:
    if any(kind_of(item.reason) == "sharded" for item in plan):
        raise ValueError(plan.refusal)
    sharded = any(is_sharded(item.parameter) for item in plan)
    if sharded and example is not None:
        raise ValueError(
            f"{type(module).__name__} is sharded, and report would run and copy it for its example input. Report it"
            " without one, or report the module of a checkpoint, on one device."
        )
    counter = None if example is None else _count_flops(module, example)
    masked = {*MaskRegistry.left_in(module), *(MaskRegistry.find(module) or ())}
    out = {"no shape yet", "excluded", *(["not included"] if narrowed else [])}

    def is_counted(item: Candidate) -> bool:
        kind = kind_of(item.reason)
        if kind in out or item.reason.startswith("tied: to"):
            return False
        if everything or kind in ("", "frozen", "shared memory") or item.name in masked:
            return True
        if not item.is_matrix:
            return False
        zeros = count_of_whole(item.parameter, local_part(item.parameter) == 0)
        return zeros < item.numel and looks_pruned(zeros, item.numel)

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
    if sharded:
        return SparsityReport(layers)
    gains = _gains(module, counted, example, by_name if counter else None)
    if counter is None:
        return SparsityReport(layers, gains=gains)
    saved = sum(by_name.get(layer.name, 0) - (layer.flops or 0) for layer in layers)
    return SparsityReport(layers, counter.total - saved, counter.total, gains)


def _gains(
    module: nn.Module, counted: Sequence[Candidate], example: Any, dense_flops: Mapping[str, int] | None
) -> Gains:
    weights = {
        item.name: Layer(value, item.rows(value), None if dense_flops is None else dense_flops.get(item.name, 0))
        for item in counted
        if (value := item.parameter.detach()).ndim > 1
    }
    own = {id(item.parameter) for item in counted if item.name in weights}
    held = [tensor for tensor in (*module.parameters(), *module.buffers()) if not nn.parameter.is_lazy(tensor)]
    others = [tensor.detach() for tensor in held if id(tensor) not in own]
    return Gains.of(weights, others, None if example is None else _dead_units(module, example))


def _dead_units(module: nn.Module, example: Any) -> Shrinkage | None:
    """What shrinking would remove; ``None`` for a module that cannot be copied."""
    try:
        return dead_units(module, example)
    except ValueError:
        return None


def _layer(candidate: Candidate, dense_flops: int | None) -> LayerSparsity:
    value = layout_of(candidate.parameter).whole(local_part(candidate.parameter))
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
    arguments, named = arguments_of(example)
    parameters = {canonical_name(name): parameter for name, parameter in module.named_parameters()}
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        # With gradients: without them, operations on copies would be taken for those of compiled code.
        with torch.enable_grad(), ForwardFLOPs(parameters) as counter:
            module(*arguments, **named)
    except Exception as error:
        raise unfit(module, example, error) from error
    finally:
        for part, mode in modes.items():
            part.training = mode
    return counter
