"""Finds writes to weights right before a forward pass, where Lightning calls no hook in between.

A callback cannot act between a hook of the module itself, or the beginning of ``training_step``, and the forward pass.
After the first write there, the module and its parts check the weights whenever they are called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final
from weakref import ref

import torch
from torch import nn

from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.methods import holding
from lightning_sparse.methods.guard import count_awake
from lightning_sparse.methods.interface import Method

__all__ = ["notice_within"]


def notice_within(method: Method) -> None:
    """After a forward pass: find writes to weights since the last check; if there were any, check from now on."""
    run = method.last_run
    if run is None or not run.active or run.watched:
        return
    written = [weight for guard in run.guards.values() for weight in guard.written_weights()]
    if not written:
        return
    module = run.module()
    awake = [weight for weight, count in zip(written, count_awake(written), strict=True) if count]
    if awake and module is not None:
        method.warn_once(
            f"pruned weights of {enumerated(weight.name for weight in awake)} were written right before a forward pass,"
            " where no callback runs (in training_step or in a hook of the module). From now on, they are set to zero"
            " before each forward pass"
        )
        look = _Look(method)
        run.watched += [part.register_forward_pre_hook(look, prepend=True) for part in _parts(module)]


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The module and what it may call: its children, and the modules in its lists."""
    yield module
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from child.children()
        else:
            yield child


@final
class _Look:
    """A hook before a forward pass. In copies of a module and in files, it has no effect."""

    def __init__(self, method: Method | None = None) -> None:
        self._method = _nobody if method is None else ref(method)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():  # a compiled forward is the same with it as without
            return
        method = self._method()
        if method is not None:
            holding.repair_written(method)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Look:
        return _Look()

    def __reduce__(self) -> tuple[type[_Look], tuple[()]]:
        return _Look, ()


def _nobody() -> None:
    """A reference to no method."""
    return
