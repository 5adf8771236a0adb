"""Masks given to a module: as if a training with them had just ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.masks.files import read_masks
from lightning_sparse.masks.given import check_bool, wrong_shapes
from lightning_sparse.masks.layout import layout_of, local_part
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.plan import Plan, judge_parameters, names_near
from lightning_sparse.masks.registry import MaskRegistry
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.masks.wrappers import as_named, unwrapped

__all__ = ["apply_masks"]


@torch.no_grad()
def apply_masks(module: nn.Module, masks: str | Path | Mapping[str, Tensor] | Mapping[str, MaskedWeight]) -> None:
    """Zero the pruned weights of a module, and let its next training start from these masks.

    The next method behaves as if another method had just trained the module: it takes over the masks, and begins its
    own schedule with a new optimizer. To resume a run with its optimizer, give ``ckpt_path`` to ``fit`` instead; a
    checkpoint's masks take precedence over these.

    Args:
        module: The module that you will give to ``fit``, with its weights loaded. If each process runs the script, as
            in DDP, call this in every process. A sharded module works too; give the same whole masks in each process.
        masks: A path or a mapping. A path leads to a file that :func:`~lightning_sparse.masks.save_masks` wrote, a
            method's checkpoint, or a file of weights with zeros (safetensors too). A mapping has ``bool`` tensors with
            the weights' shapes by parameter name, ``True`` = active. Weights without a mask do not change.

    Raises:
        ValueError: There is no mask, one is not ``bool``, names or shapes are not those of the module, or the module is
            in training. In these cases nothing has changed.
        CheckpointError: The file is missing, damaged, or holds no masks.

    Example:
        >>> from torch import nn
        >>> from lightning_sparse import apply_masks, save_masks
        >>> save_masks("eye.masks", {"weight": torch.eye(2, dtype=torch.bool)})
        >>> module = nn.Linear(2, 2)
        >>> apply_masks(module, "eye.masks")
        >>> module.weight != 0
        tensor([[ True, False],
                [False,  True]])
    """
    module = unwrapped(module)  # fit, too, trains what torch.compile has wrapped
    if MaskRegistry.find(module):
        raise ValueError(
            f"{type(module).__name__} is in training, and its method holds its masks. Call apply_masks before fit."
        )
    plan = judge_parameters(module)
    given, source = _read(masks, plan)
    _check_names(given, source, plan)
    if wrong := wrong_shapes(given, plan, source):
        raise ValueError(wrong)
    by_name = _by_first_name(given, source, plan)
    layouts = {candidate.name: layout_of(candidate.parameter) for candidate in plan}
    # Of weights that were pruned before, and have no mask here.
    left = {name: layouts[name].whole(mask) for name, mask in MaskRegistry.left_in(module).items()}
    for candidate in plan:
        if candidate.name in by_name:
            mask = layouts[candidate.name].take(by_name[candidate.name]).to(candidate.parameter.device)
            local_part(candidate.parameter).masked_fill_(~mask, 0.0)
    MaskRegistry.leave(module, left | by_name, given=True)


def _read(masks: Any, plan: Plan) -> tuple[dict[str, Tensor], str]:
    """The masks by name, and whence they come."""
    if isinstance(masks, str | Path):
        return read_masks(masks, names=[candidate.name for candidate in plan.weights]), printable(str(masks))
    if not isinstance(masks, Mapping):
        raise ValueError(
            f"masks is a {type(masks).__name__}; give a path, or a mapping of parameter names to bool tensors, such as"
            " the registry of a method."
        )
    if not masks:
        raise ValueError(
            "masks is empty; give a bool tensor for at least one parameter. The registry of a method is empty before"
            " its training."
        )
    tensors = {
        name: value.layout.whole(value.mask) if isinstance(value, MaskedWeight) else value
        for name, value in masks.items()
    }
    check_bool(tensors)
    return as_named(tensors, [candidate.name for candidate in plan]), "The mapping masks="


def _check_names(masks: Mapping[str, Tensor], source: str, plan: Plan) -> None:
    known = [candidate.name for candidate in plan]
    unknown = [name for name in masks if name not in known]
    if unknown:
        shown, near = ", ".join(map(printable, unknown)), names_near(unknown, known)
        raise ValueError(
            f"{source} has masks of {shown}, which the module does not have. Its parameters near them: {near}. Give the"
            " module that the masks belong to, which is the one given to fit, or masks of this module."
        )


def _by_first_name(masks: Mapping[str, Tensor], source: str, plan: Plan) -> dict[str, Tensor]:
    """The masks by the name under which a method knows a weight that has several."""
    names: dict[int, str] = {}
    for candidate in plan:
        names.setdefault(id(candidate.parameter), candidate.name)
    found: dict[str, Tensor] = {}
    for candidate in plan:
        if candidate.name in masks:
            first = names[id(candidate.parameter)]
            mask = found.setdefault(first, masks[candidate.name])
            if not torch.equal(mask.cpu(), masks[candidate.name].cpu()):
                raise ValueError(
                    f"{source} has different masks for {first} and {candidate.name}, which are one weight. Give one of"
                    " them."
                )
    return found
