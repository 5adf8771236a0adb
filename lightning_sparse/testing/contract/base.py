"""What the parts of the contract share: their cases, and a few comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import lightning as L
import pytest
import torch

from lightning_sparse.methods import SparseMethod
from lightning_sparse.testing.case import Case
from lightning_sparse.testing.spies import masks_of

__all__ = [
    "Contract",
    "FirstLook",
    "Only",
    "assert_same_masks",
    "assert_same_states",
    "cut",
    "gradual_only",
    "hard_only",
    "lasting_modules_only",
    "moving_only",
]

Test = TypeVar("Test", bound=Callable[..., None])


class Only:
    """Decorates a test that holds for some cases alone.

    Args:
        what: The methods for which it holds, as a reason to skip it for others.
        applies: Whether it holds for a case.
    """

    def __init__(self, what: str, applies: Callable[[Case], bool]) -> None:
        self.what = what
        self.applies = applies

    def __call__(self, test: Test) -> Test:
        """Mark ``test``, and return it."""
        setattr(test, _ONLY, self)
        return test


_ONLY = "_lightning_sparse_only"
_EVERY = Only("every method", lambda case: True)

gradual_only = Only("methods of gradual pruning", lambda case: case.is_gradual)
hard_only = Only("methods that move masks and lose what they prune", lambda case: case.is_hard)
lasting_modules_only = Only("methods that leave modules as they are", lambda case: not case.changes_modules)
moving_only = Only("methods that move masks", lambda case: case.moves)


# The toys have no workers and stop where they like; Lightning has something to say to that.
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
class Contract:
    """Tests that run once for each of ``cases``; a part of the suite, or all of it, inherits from here.

    Attributes:
        cases: What is tested.
    """

    cases: ClassVar[Sequence[Case]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test the cases to which it applies; one without any is skipped, with the reason."""
        if not self.cases:
            raise pytest.UsageError(f"{type(self).__name__} has no cases. Give it some: cases = [Case(...)].")
        if "case" not in metafunc.fixturenames:
            return
        only: Only = getattr(metafunc.function, _ONLY, _EVERY)
        cases = [pytest.param(case, id=case.name) for case in self.cases if only.applies(case)]
        reason = f"It is for {only.what}, and no case is of one."
        metafunc.parametrize("case", cases or [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))])

    @pytest.fixture(autouse=True)
    def _fit_to_fork(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """One thread per process: OpenMP hangs in a forked child whose parent has used more."""
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which Lightning takes as a wish not to set the number itself
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # torch.compile pretends that there is a GPU. If the first backward of the process comes after that, autograd
        # starts a thread for it, and forked children refuse to go on.
        torch.ones((), requires_grad=True).backward()
        yield
        torch.set_num_threads(threads)


class FirstLook(L.Callback):
    """Copies the masks before the first step."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.masks: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look."""
        self.masks = masks_of(self.method)


def assert_same_masks(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Fail at the first mask that differs, naming it."""
    assert first.keys() == second.keys()
    for name, mask in first.items():
        assert torch.equal(mask, second[name]), name


def assert_same_states(first: Any, second: Any) -> None:
    """Fail where two nested states differ, tensors by any bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_states(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_states(one, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def cut(state: dict[str, Any]) -> None:
    """Damage the state of a method: the first of its masks loses its last byte."""
    mask = next(iter(state["masks"].values()))
    mask["bits"] = mask["bits"][:-1]
