"""What a method puts into a network, and the callbacks that put it there and take it out again."""

from lightning_sparse.modules.dyrelu import DyReLU, PhasedReLU
from lightning_sparse.modules.dyrelu_phasing import DyReLUPhasing
from lightning_sparse.modules.weight_sharing import SharedConvolution, WeightSharing, share_weights, unshare_weights

__all__ = [
    "DyReLU",
    "DyReLUPhasing",
    "PhasedReLU",
    "SharedConvolution",
    "WeightSharing",
    "share_weights",
    "unshare_weights",
]
