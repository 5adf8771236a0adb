"""Pure tensor maths of sparse training: tensors in, tensors out. Imports torch and numpy alone."""

from lightning_sparse.functional.allocation import erdos_renyi, erdos_renyi_kernel, num_active, uniform
from lightning_sparse.functional.masks import kth_smallest, largest, multiplier, pack, smallest, unpack, zero_pruned_

__all__ = [
    "erdos_renyi",
    "erdos_renyi_kernel",
    "kth_smallest",
    "largest",
    "multiplier",
    "num_active",
    "pack",
    "smallest",
    "uniform",
    "unpack",
    "zero_pruned_",
]
