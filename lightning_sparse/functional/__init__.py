"""Pure tensor maths of sparse training: tensors in, tensors out. Imports only torch and numpy."""

from lightning_sparse.functional.allocation import erdos_renyi, erdos_renyi_kernel, num_active, uniform
from lightning_sparse.functional.masks import multiplier, pack, unpack, zero_pruned_
from lightning_sparse.functional.selection import kth_smallest, largest, smallest

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
