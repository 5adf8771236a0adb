"""The methods: one callback each."""

from lightning_sparse.methods.base import SparseMethod
from lightning_sparse.methods.card import method
from lightning_sparse.methods.dst import DST
from lightning_sparse.methods.east import EAST
from lightning_sparse.methods.feather import Feather
from lightning_sparse.methods.fggp import FGGP
from lightning_sparse.methods.fixed_mask import FixedMask
from lightning_sparse.methods.gmp import GMP
from lightning_sparse.methods.latent import LatentMethod
from lightning_sparse.methods.rigl import RigL
from lightning_sparse.methods.scored import GrowingMethod, ScoredMethod
from lightning_sparse.methods.set import SET
from lightning_sparse.methods.srste import SRSTE
from lightning_sparse.methods.str import STR
from lightning_sparse.methods.topkast import TopKAST

__all__ = [
    "DST",
    "EAST",
    "FGGP",
    "GMP",
    "SET",
    "SRSTE",
    "STR",
    "Feather",
    "FixedMask",
    "GrowingMethod",
    "LatentMethod",
    "RigL",
    "ScoredMethod",
    "SparseMethod",
    "TopKAST",
    "method",
]
