r"""Floating-point operations of a sparse network, relative to those of the same network dense.

A layer of sparsity :math:`s` needs :math:`1 - s` of its dense operations, and a backward pass costs two forward passes.
These are the operations of an ideal kernel. The masked dense kernels that run here save none.

References:
    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, §4 and appendix H,
    https://arxiv.org/abs/1911.11134
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["inference_flops", "sparse_flops", "training_flops"]


def sparse_flops(dense: Sequence[float], sparsity: Sequence[float], rest: float = 0.0) -> float:
    r"""Forward operations of a network: :math:`f_S = f_{rest} + \sum_l (1 - s_l) f_l`.

    Args:
        dense: The dense operations :math:`f_l` of each layer.
        sparsity: The sparsity :math:`s_l` of each layer, in [0, 1].
        rest: The operations of all layers without a mask.

    Raises:
        ValueError: The numbers of sparsities and layers differ.

    Example:
        >>> sparse_flops([100.0, 40.0], [0.75, 0.5], rest=5.0)
        50.0
    """
    if len(dense) != len(sparsity):
        raise ValueError(f"There are {len(dense)} layers and {len(sparsity)} sparsities; give one for each layer.")
    return rest + sum(flops * (1.0 - zeros) for flops, zeros in zip(dense, sparsity, strict=True))


def inference_flops(dense: Sequence[float], sparsity: Sequence[float], rest: float = 0.0) -> float:
    r"""FLOPs of a forward pass relative to the dense network's, :math:`f_S / f_D`, in [0, 1].

    Takes the arguments of :func:`sparse_flops`.

    Raises:
        ValueError: There are not as many sparsities as layers, or there is no operation at all.

    Example:
        >>> inference_flops([100.0], [0.9], rest=100.0)
        0.55
    """
    return _ratio(sparse_flops(dense, sparsity, rest), sum(dense) + rest)


def training_flops(sparse: float, dense: float, dense_gradients: float = 0.0) -> float:
    r"""FLOPs of a training step relative to a dense one: :math:`(3 f_S + g) / 3 f_D`.

    The forward pass takes :math:`f_S`, the backward pass :math:`2 f_S`. If a step also needs the gradients of pruned
    weights, as RigL does to grow, it computes them densely, which adds :math:`g = f_D - f_S`. The mean over
    :math:`\Delta T` steps without and one step with dense gradients is RigL's
    :math:`(3 f_S \Delta T + 2 f_S + f_D) / (\Delta T + 1)`.

    Args:
        sparse: Forward operations :math:`f_S` of the sparse network.
        dense: Forward operations :math:`f_D` of the dense network.
        dense_gradients: FLOPs that dense gradients add at this step: :math:`f_D - f_S` of the layers that need them.

    Raises:
        ValueError: There is no operation at all.

    Example:
        >>> training_flops(20.0, 100.0), training_flops(10.0, 100.0, dense_gradients=90.0)
        (0.2, 0.4)
    """
    return _ratio(3.0 * sparse + dense_gradients, 3.0 * dense)


def _ratio(sparse: float, dense: float) -> float:
    if dense <= 0:
        raise ValueError(f"The dense network has {dense:g} operations, so there is nothing to compare with.")
    return sparse / dense
