"""Who takes part: every method of the package with its defaults, and simple baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import lightning as L
from torch import nn

from lightning_sparse import (
    ACDC,
    DSR,
    DST,
    EAST,
    FGGP,
    GMP,
    MEST,
    SET,
    SNFS,
    SNIP,
    SRSTE,
    STR,
    Feather,
    GraNet,
    GraSP,
    RigL,
    SRigL,
    SynFlow,
    TopKAST,
)

__all__ = ["BASELINES", "METHODS", "ONLY_ON", "STR_DECAY", "STR_INITIAL", "VARIANTS", "n_of_m"]

Make = Callable[[float, nn.Module, str], list[L.Callback]]
"""Makes the callbacks of a method from a sparsity, the network, and the network's name."""

BASELINES = ("dense", "equal-weights", "static", "one-shot")
"""Dense; a narrower dense network with as many weights; random masks (ERK) from start to end; half of training dense,
one-shot magnitude pruning of all layers together, and the other half with these masks (:class:`FixedMask`)."""

STR_INITIAL = -5.0

STR_DECAY: Mapping[tuple[str, float], float] = {
    ("lenet300", 0.9): 0.0182,
    ("lenet300", 0.95): 0.0282,
    ("lenet300", 0.98): 0.0453,
    ("lenet300", 0.99): 0.0602,
    ("cnn-bn", 0.9): 0.003668,
    ("cnn-bn", 0.95): 0.006727,
    ("cnn-bn", 0.98): 0.016,
    ("cnn-bn", 0.99): 0.02934,
    ("cnn", 0.9): 0.005187,
    ("cnn", 0.95): 0.008724,
    ("cnn", 0.98): 0.01499,
    ("cnn", 0.99): 0.01987,
}
"""STR has no target sparsity. These are the weight decays of s that ended nearest to each sparsity, as found by
``benchmarks.evidence.calibrate``."""


def _with(kind: Callable[..., L.Callback], **settings: object) -> Make:
    return lambda sparsity, network, name: [kind(sparsity, **settings)]


def _str(sparsity: float, network: nn.Module, name: str) -> list[L.Callback]:
    return [STR(STR_INITIAL, decay=STR_DECAY[name, sparsity])]


def n_of_m(inputs: int, sparsity: float) -> str:
    """The N of M with the nearest sparsity, where M divides the inputs; among equals, the one with the smallest M.

    Example:
        >>> n_of_m(784, 0.9), n_of_m(300, 0.99), n_of_m(16, 0.98)
        ('39:392', '1:100', '1:16')
    """
    pairs = [(n, m) for m in range(2, inputs + 1) if inputs % m == 0 for n in range(1, m)]
    n, m = min(pairs, key=lambda pair: (abs(1.0 - pair[0] / pair[1] - sparsity), pair[1]))
    return f"{n}:{m}"


def _srste(sparsity: float, network: nn.Module, name: str) -> list[L.Callback]:
    """One callback for each layer, since numbers of inputs differ. A layer with one input stays dense."""
    layers = {
        layer: int(module.weight.shape[1])
        for layer, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[1] > 1
    }
    return [SRSTE(n_of_m(inputs, sparsity), include=[f"network.{layer}.*"]) for layer, inputs in layers.items()]


METHODS: Mapping[str, Make] = {
    "ACDC": _with(ACDC),
    "DSR": _with(DSR),
    "DST": lambda sparsity, network, name: [DST(sparsity=sparsity)],
    "EAST": _with(EAST),
    "FGGP": _with(FGGP),
    "Feather": _with(Feather),
    "GMP": _with(GMP),
    "GraNet": _with(GraNet),
    "GraSP": _with(GraSP),
    "MEST": _with(MEST),
    "RigL": _with(RigL),
    "SET": _with(SET),
    "SNFS": _with(SNFS),
    "SNIP": _with(SNIP),
    "SRSTE": _srste,
    "SRigL": _with(SRigL),
    "STR": _str,
    "SynFlow": _with(SynFlow),
    "TopKAST": _with(TopKAST),
}

VARIANTS: Mapping[str, Make] = {
    "DSR(erk)": _with(DSR, allocation="erk"),
    "GMP(erk)": _with(GMP, allocation="erk"),
    "GMP(global)": _with(GMP, allocation="global"),
    "MEST(soft,erk)": _with(MEST, soft=True, allocation="erk"),
    "RigL(density)": _with(RigL, initial_scale="density"),
    "RigL(uniform)": _with(RigL, allocation="uniform"),
    "SET(density)": _with(SET, initial_scale="density"),
    "SET(uniform)": _with(SET, allocation="uniform"),
    "SRSTE(last dense)": lambda sparsity, network, name: _srste(sparsity, network, name)[:-1],
    "TopKAST(erk)": _with(TopKAST, allocation="erk"),
}
"""Other settings: how layers share the budget, or kept weights that are scaled by 1/√density as training begins."""

ONLY_ON: Mapping[str, tuple[str, ...]] = {
    "DSR(erk)": ("lenet300",),
    "MEST(soft,erk)": ("lenet300",),
    "RigL(density)": ("cnn",),
    "RigL(uniform)": ("lenet300",),
    "SET(density)": ("cnn",),
    "SET(uniform)": ("lenet300",),
    "SRSTE(last dense)": ("lenet300",),
    "TopKAST(erk)": ("lenet300",),
}
"""The networks of variants that do not run on all of them. With BatchNorm, the scale makes no difference."""
