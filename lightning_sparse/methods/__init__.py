"""The methods: one callback each."""

from lightning_sparse.methods.acdc import ACDC
from lightning_sparse.methods.base import SparseMethod
from lightning_sparse.methods.card import method
from lightning_sparse.methods.dsr import DSR
from lightning_sparse.methods.dst import DST
from lightning_sparse.methods.east import EAST
from lightning_sparse.methods.feather import Feather
from lightning_sparse.methods.fggp import FGGP
from lightning_sparse.methods.fixed_mask import FixedMask
from lightning_sparse.methods.gmp import GMP
from lightning_sparse.methods.granet import GraNet
from lightning_sparse.methods.grasp import GraSP
from lightning_sparse.methods.growing import GrowingMethod
from lightning_sparse.methods.latent import LatentMethod
from lightning_sparse.methods.mest import MEST
from lightning_sparse.methods.rigl import RigL
from lightning_sparse.methods.scored import ScoredMethod
from lightning_sparse.methods.set import SET
from lightning_sparse.methods.snfs import SNFS
from lightning_sparse.methods.snip import SNIP
from lightning_sparse.methods.srigl import SRigL
from lightning_sparse.methods.srste import SRSTE
from lightning_sparse.methods.str import STR
from lightning_sparse.methods.synflow import SynFlow
from lightning_sparse.methods.topkast import TopKAST

__all__ = [
    "ACDC",
    "DSR",
    "DST",
    "EAST",
    "FGGP",
    "GMP",
    "MEST",
    "SET",
    "SNFS",
    "SNIP",
    "SRSTE",
    "STR",
    "Feather",
    "FixedMask",
    "GraNet",
    "GraSP",
    "GrowingMethod",
    "LatentMethod",
    "RigL",
    "SRigL",
    "ScoredMethod",
    "SparseMethod",
    "SynFlow",
    "TopKAST",
    "method",
]
