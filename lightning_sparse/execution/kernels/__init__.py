"""Sparse kernels: one interface, behind which torch computes, or code that LLVM compiles at first use.

``torch_csr`` is always available and multiplies compressed sparse rows with torch. ``llvm`` comes with the extra
``fast``, which installs llvmlite. Its kernels are faster, compute convolutions of any window, and fuse what follows a
layer.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_sparse.execution.kernels.steps import LinearStep, PlaneStep

__all__ = ["Chain", "KernelsUnavailableError", "Planes", "available_kernels", "chain", "default_kernels", "planes"]


class KernelsUnavailableError(ValueError):
    """The requested kernels are not installed, or cannot compute what was requested."""


class Chain(Protocol):
    """Linear layers in a row."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs (rows, outputs) of the rows (rows, inputs)."""
        ...


class Planes(Protocol):
    """A network of convolutions."""

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return the outputs for contiguous images (N, C, H, W)."""
        ...


def available_kernels() -> tuple[str, ...]:
    """Return the names of the kernels on this machine, the fastest first.

    Example:
        >>> from lightning_sparse.execution.kernels import available_kernels
        >>> "torch_csr" in available_kernels()
        True
    """
    return ("llvm", "torch_csr") if importlib.util.find_spec("llvmlite") else ("torch_csr",)


_TOLD: set[str] = set()


def default_kernels() -> str:
    """Return the name of the fastest kernels. If llvmlite is missing, warn once in each process."""
    name = available_kernels()[0]
    if name != "llvm" and not _TOLD:
        _TOLD.add(name)
        warnings.warn(
            "llvmlite is not installed, so torch computes the sparse layers: linear layers and 1 x 1 convolutions. All"
            " other convolutions stay dense, and gains are about half of what they could be: pip install"
            " 'lightning-sparse[fast]'.",
            stacklevel=3,
        )
    return name


def chain(steps: Sequence[LinearStep], *, kernels: str, threads: int) -> Chain:
    """Return a callable that computes a chain of linear layers.

    Args:
        steps: The layers, at least one, of one type; the outputs of each are the inputs of the next.
        kernels: One of :func:`available_kernels`.
        threads: How many threads compute, if the kernels divide the work themselves. torch uses its own number.

    Raises:
        KernelsUnavailableError: The kernels are not installed, or do not support the weights' type.
    """
    _check(kernels, steps[0].weight.values.dtype.name)
    if kernels == "llvm":
        from lightning_sparse.execution.kernels.llvm.compiler import library
        from lightning_sparse.execution.kernels.llvm.rows import RowChain

        return RowChain(library(_dtype(steps[0])), list(steps), threads)
    from lightning_sparse.execution.kernels.torch_csr import CSRChain

    return CSRChain(steps)


def planes(
    steps: Sequence[PlaneStep], inputs: Sequence[str], outputs: Sequence[str], *, dtype: torch.dtype, threads: int
) -> Planes:
    """Return a callable that computes a network of convolutions with the kernels ``llvm``.

    Raises:
        KernelsUnavailableError: llvmlite is not installed, or its kernels do not support the type.
    """
    _check("llvm", str(dtype).removeprefix("torch."))
    from lightning_sparse.execution.kernels.llvm.compiler import library
    from lightning_sparse.execution.kernels.llvm.planes import PlaneNetwork

    return PlaneNetwork(library(dtype), steps, inputs, outputs, threads)


def _check(kernels: str, dtype: str) -> None:
    if kernels not in available_kernels():
        raise KernelsUnavailableError(
            f"The kernels {kernels!r} are not available; these are: {', '.join(available_kernels())}. The kernels"
            " 'llvm' come with pip install 'lightning-sparse[fast]'."
        )
    if dtype not in ("float32", "float64"):
        raise KernelsUnavailableError(
            f"The weights are {dtype}; sparse kernels compute in float32 and float64. Convert the module with .float(),"
            " or leave it dense."
        )


def _dtype(step: LinearStep) -> torch.dtype:
    return torch.float64 if step.weight.values.itemsize == 8 else torch.float32
