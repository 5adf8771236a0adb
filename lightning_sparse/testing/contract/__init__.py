"""The contract: what holds for every method, as tests that run over any."""

from __future__ import annotations

from lightning_sparse.testing.contract.budgets import BudgetContract
from lightning_sparse.testing.contract.checkpoints import CheckpointContract
from lightning_sparse.testing.contract.determinism import DeterminismContract
from lightning_sparse.testing.contract.processes import ProcessContract
from lightning_sparse.testing.contract.refusals import RefusalContract
from lightning_sparse.testing.contract.resuming import ResumeContract
from lightning_sparse.testing.contract.steps import StepContract
from lightning_sparse.testing.contract.zeros import ZeroContract

__all__ = ["MethodContract"]


class MethodContract(
    BudgetContract,
    ZeroContract,
    ProcessContract,
    ResumeContract,
    CheckpointContract,
    StepContract,
    DeterminismContract,
    RefusalContract,
):
    """The whole contract. A test class of yours inherits it and says what is tested.

    It trains toys of 344 weights for sixteen steps, on the CPU, a few of them in two forked processes, which Windows
    cannot do. About seventy tests a case take half a minute.

    Example:
        A file ``test_mine.py``, for ``pytest test_mine.py``::

            from lightning_sparse.testing import Case, MethodContract
            from mine import Mine

            class TestMine(MethodContract):
                cases = [Case("mine", Mine, {"sparsity": 0.8, "update_every": 2, "start": 1, "stop": 11})]
    """
