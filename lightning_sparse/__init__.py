"""lightning_sparse: sparse training for PyTorch Lightning, one callback per method."""

from lightning_sparse import functional, schedules
from lightning_sparse._version import __version__
from lightning_sparse.masks import MaskedWeight, MaskRegistry
from lightning_sparse.methods import DST, FGGP, GMP, SparseMethod

__all__ = ["DST", "FGGP", "GMP", "MaskRegistry", "MaskedWeight", "SparseMethod", "__version__", "functional", "schedules"]
