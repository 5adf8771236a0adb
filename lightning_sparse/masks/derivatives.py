"""Derivatives by weights that may be sharded, where a method differentiates by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_sparse.masks.layout import Block, is_sharded, laid_like, layout_of

__all__ = ["by_fsdp", "differentiates_twice", "first_gradients", "inner_product", "total"]


def first_gradients(of: Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """Gradients with respect to parameters whose ``grad`` is None; None where one plays no part.

    A collective where they are sharded, and then left in ``grad`` too.
    """
    if not any(map(is_sharded, parameters)):
        return torch.autograd.grad(of, parameters, allow_unused=True)  # which DDP does not see
    of.backward()  # FSDP2 brings gradients to parameters, and gives them in no other way
    return [None if (grad := its.grad) is None else laid_like(grad, its) for its in parameters]


def total(tensor: Tensor) -> Tensor:
    """The sum of all entries of the whole, differentiable; a collective where a tensor is sharded."""
    its = tensor.sum()
    return its.full_tensor() if isinstance(its, DTensor) else its


def inner_product(local: Tensor, tensor: Tensor, parameter: Tensor) -> Tensor:
    """The sum of products of two tensors that lie as a parameter does, differentiable in the second.

    A collective where the parameter is sharded.

    Args:
        local: What this process holds of one.
        tensor: The other, such as a gradient of the parameter.
        parameter: Tells how they lie.
    """
    layout = layout_of(parameter)
    one = layout.as_dtensor(local) if isinstance(layout, Block) else local
    return total(one * laid_like(tensor, parameter))


def differentiates_twice(parameter: Tensor) -> bool:
    """Whether autograd has second derivatives by a parameter; a collective where it is sharded.

    Older releases of torch, 2.9 among them, cut the graph in silence where the gradient of a DTensor is sent.
    """
    if not isinstance(parameter, DTensor):
        return True
    mesh = parameter.device_mesh
    ones = torch.ones(mesh.size(), device=parameter.device)
    copied = DTensor.from_local(ones, mesh, [Replicate()] * mesh.ndim, run_check=False)
    copied.requires_grad_()
    divided = copied.redistribute(mesh, [Shard(0)] * mesh.ndim)
    (slope,) = torch.autograd.grad(divided.square().sum(), copied, create_graph=True)
    return slope.grad_fn is not None


def by_fsdp(module: nn.Module) -> set[nn.Parameter]:
    """The parameters that FSDP2 shards, in a module and what is in it."""
    wrapped = [child for child in module.modules() if isinstance(child, FSDPModule)]
    return {parameter for child in wrapped for parameter in child.parameters() if is_sharded(parameter)}
