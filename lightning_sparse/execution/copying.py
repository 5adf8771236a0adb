"""Copies of modules, so that those of the user stay as they are."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_sparse.execution.tracing import has_hooks

__all__ = ["copied", "frozen_copy", "is_conv1d", "with_linear_layers"]

M = TypeVar("M", bound=nn.Module)


def copied(module: M) -> M:
    """Return a deep copy.

    Raises:
        ValueError: The module is sharded, a wrapper, compiled by TorchScript, or holds what cannot be copied.

    Example:
        >>> copied(nn.DataParallel(nn.Linear(2, 2)))
        Traceback (most recent call last):
        ValueError: DataParallel is a wrapper; give the module inside, as in model.module.
    """
    _refuse_others(module)
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever a module's own parts raise
        raise ValueError(
            f"{type(module).__name__} cannot be copied ({str(error).strip().splitlines()[0]}), and the module itself"
            " must stay as it is. Give a module that copy.deepcopy takes; where torch.nn.utils.prune has pruned it,"
            " make the zeros permanent with prune.remove before."
        ) from error


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose parameters take no gradient.

    Raises:
        ValueError: The module cannot be copied; see :func:`copied`.

    Example:
        >>> from torch import nn
        >>> frozen_copy(nn.Linear(2, 2)).training
        False
    """
    return copied(module).eval().requires_grad_(False)


def _refuse_others(module: nn.Module) -> None:
    """Raise where a module is a wrapper, code of TorchScript, or one process's part of what several hold."""
    name = type(module).__name__
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"{name} is a wrapper; give the module inside, as in model.module.")
    if name == "OptimizedModule":
        raise ValueError("The module comes from torch.compile; give the one that was compiled.")
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise ValueError(f"{name} is code of TorchScript, wholly or in part; give the module that it was made of.")
    kinds = {kind.__name__ for part in module.modules() for kind in type(part).__mro__}
    kinds |= {kind.__name__ for parameter in module.parameters() for kind in type(parameter).__mro__}
    if kinds & {"FSDPModule", "FullyShardedDataParallel", "DTensor", "ShardedTensor"}:
        raise ValueError(
            f"{name} is sharded: each process holds a part of its weights. Gather them, as"
            " torch.distributed.checkpoint.state_dict.get_model_state_dict does with full_state_dict=True, and load"
            " them into a module on one device."
        )


def is_conv1d(layer: nn.Module) -> bool:
    """Say whether a layer is Hugging Face's ``Conv1D``, of GPT-2: a linear one whose weight is (inputs, outputs).

    Example:
        >>> is_conv1d(nn.Conv1d(2, 2, 1))
        False
    """
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def with_linear_layers(module: nn.Module) -> nn.Module:
    """Put torch's linear layers in the place of Hugging Face's ``Conv1D``, in the same memory. Returns the module."""
    places = list(module.named_modules(remove_duplicate=False))
    linears = {
        layer: _as_linear(layer)
        for _, layer in places
        if is_conv1d(layer) and not has_hooks(layer) and not hasattr(layer, "parametrizations")
    }
    for name, layer in places:
        if name and layer in linears:
            module.set_submodule(name, linears[layer])
    return linears.get(module, module)


def _as_linear(conv: Any) -> nn.Linear:
    inputs, outputs = conv.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t(), requires_grad=False)
    linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear.train(conv.training)
