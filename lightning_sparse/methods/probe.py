"""Synaptic flow through a module from an input of ones, computed without side effects."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_sparse.execution.examples import arguments_of
from lightning_sparse.masks.derivatives import first_gradients, total
from lightning_sparse.masks.layout import local_part
from lightning_sparse.masks.weight import MaskedWeight

__all__ = ["evaluating", "inputs_of", "synaptic_flow", "untouched"]


def inputs_of(module: pl.LightningModule, batch: Any) -> Any:
    """What the forward of ``module`` takes: its ``example_input_array``, or else what comes first in a batch."""
    example = module.example_input_array
    if example is not None:
        return example
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    return (first,) if isinstance(first, list) else first  # such as images of several sizes, which are one argument


def synaptic_flow(module: pl.LightningModule, inputs: Any, weights: Sequence[MaskedWeight]) -> dict[str, Tensor]:
    r"""Compute :math:`|w| \odot \partial R / \partial |w|`, R being the sum of the outputs for an input of ones.

    Args:
        module: The module, which is left unchanged, to the bit.
        inputs: A tensor, or a tuple, list or mapping of arguments. Floating-point tensors are replaced by ones.
        weights: The weights to score; pruned entries count as zero.

    Returns:
        The scores by name, none of them negative, shaped like the weights.

    Raises:
        MisconfigurationException: The module cannot compute on such inputs.
    """
    numbers = next(module.parameters())
    args, kwargs = arguments_of(tree_map(lambda part: _ones(part, numbers), inputs))
    parameters = [weight.parameter for weight in weights]
    with untouched(module), _without_gradients(module):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.detach().abs_()
        for weight in weights:
            weight.value.mul_(weight.mask)
        try:
            with torch.enable_grad(), torch.autocast(numbers.device.type, enabled=False):
                outputs = module(*args, **kwargs)
                sums = [total(out) for out in tree_flatten(outputs)[0] if _is_number(out)]
                flows = first_gradients(torch.stack(sums).sum(), parameters)
        except Exception as error:  # whatever a user's code may raise
            raise MisconfigurationException(
                f"SynFlow computes {type(module).__name__}.forward on ones, which raised {error!r}. Set"
                " self.example_input_array in its __init__ to what forward takes, a batch of two or so, and let it"
                " return tensors."
            ) from error
        return {
            weight.name: torch.zeros_like(weight.value) if flow is None else (weight.value * local_part(flow)).abs_()
            for weight, flow in zip(weights, flows, strict=True)
        }


@contextmanager
def untouched(module: nn.Module) -> Generator[None]:
    """A module in evaluation mode, which in the end is as before: parameters, buffers, modes and random generators."""
    tensors = [*module.parameters(), *module.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    with evaluating(module):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)


@contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """A module in evaluation mode and not compiled, whose modes and random generators are as before in the end."""
    modes = {child: child.training for child in module.modules()}
    try:
        with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            module.eval()
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


@contextmanager
def _without_gradients(module: nn.Module) -> Generator[None]:
    """A module whose gradients are set aside, and are those of before in the end."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _ones(part: Any, numbers: Tensor) -> Any:
    if not isinstance(part, Tensor):
        return part
    return (
        torch.ones_like(part, dtype=numbers.dtype, device=numbers.device)
        if _is_number(part)
        else part.to(numbers.device)
    )


def _is_number(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()
