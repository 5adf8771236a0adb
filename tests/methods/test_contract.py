"""What always holds, over every method: the contract that :mod:`lightning_sparse.testing` offers to everybody."""

from __future__ import annotations

import runpy
import sys
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch

import lightning_sparse.testing
from lightning_sparse import GMP, RigL
from lightning_sparse.testing import MaskWatch, MethodContract, ToyModel, fit, fit_two_processes, make_trainer
from tests.methods.cases import CASES

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_sparse.methods import SparseMethod

pytest_plugins = ["pytester"]


@pytest.mark.filterwarnings("ignore:DST. .* has collapsed to sparsity")  # sixteen steps are steered roughly
@pytest.mark.filterwarnings("ignore:DST. training ended at sparsity")  # nor does that always arrive
# A second training of eight steps ends before their last update, in a dense phase or above the budget.
@pytest.mark.filterwarnings("ignore:(ACDC|MEST). training ended at step 24")
class TestContract(MethodContract):
    cases = CASES


# What a few methods have to do with each other.


class _CorruptOneRank(L.Callback):
    """Turns a mask around on rank 1, as a bug would."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Flip the last layer's mask at step 3, before the first update."""
        if trainer.global_rank == 1 and trainer.global_step == 3:
            weight = self.method.registry["network.4.weight"]
            weight.mask.logical_not_()


def test_ranks_that_disagree_are_an_error_that_names_the_layer(tmp_path: Path) -> None:
    method = CASES[0].make(start=4, stop=7)
    with pytest.raises(Exception, match=r"masks of network\.4\.weight differ between the processes"):
        fit_two_processes(ToyModel(), tmp_path, [method, _CorruptOneRank(method)], max_epochs=2)


@pytest.mark.parametrize("rigl_is_first", [True, False])
def test_a_step_that_one_method_leaves_out_starves_no_other(rigl_is_first: bool, tmp_path: Path) -> None:
    rigl = RigL(0.5, update_every=2, stop=11, include=["network.0.*"])
    gmp = GMP(0.9, update_every=1, stop=11, exclude=["network.0.*"])
    watch = MaskWatch(gmp)
    callbacks = [rigl, gmp] if rigl_is_first else [gmp, rigl]
    make_trainer(tmp_path, callbacks=[*callbacks, watch]).fit(ToyModel())
    assert [seen["step"] for seen in watch.history][:10] == list(range(10))


def test_rigl_leaves_out_no_step_where_nothing_changes(tmp_path: Path) -> None:
    method = RigL(0.5, update_every=4, stop=8)
    model = ToyModel()
    biases = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            biases.append(model.get_parameter("network.0.bias").detach().clone())

    fit(method, tmp_path, Watch(), model=model)
    still = [step for step in range(1, 16) if torch.equal(biases[step], biases[step - 1])]
    assert still == [4]  # at step 8, f(t) = 0


# The suite in the hands of somebody who writes a method.

MINE = """
from typing import ClassVar
import torch
from lightning_sparse import FixedMask
from lightning_sparse.methods.card import method
from lightning_sparse.methods.scored import ScoredMethod
from lightning_sparse.testing import Case, MethodContract, ToyModel, random_masks

@method
class Mine(ScoredMethod):
    grows: ClassVar[bool] = False
    begins_dense: ClassVar[bool] = True

    def dropped(self, pool, among, n):
        return {prune}

class TestMine(MethodContract):
    cases = {cases}
"""
ONE_CASE = '[Case("mine", Mine, {"sparsity": 0.8, "allocation": "uniform", "update_every": 2, "start": 1, "stop": 11})]'


def run_contract(pytester: pytest.Pytester, prune: str, *, only: str, cases: str = ONE_CASE) -> pytest.RunResult:
    """Run the contract over a method that prunes so, in a folder without any configuration of pytest."""
    pytester.makepyfile(MINE.replace("{prune}", prune).replace("{cases}", cases))
    return pytester.runpytest_inprocess("-k", only, "-W", "default", "-p", "no:cacheprovider")


def test_a_method_of_somebody_else_passes(pytester: pytest.Pytester) -> None:
    result = run_contract(
        pytester,
        "pool.smallest(self.ranked(pool, lambda weight: -weight.grad.abs()), n, among)",
        only="two_processes or layer",
    )
    assert set(result.parseoutcomes()) <= {"passed", "deselected", "warnings"}
    assert result.parseoutcomes()["passed"] >= 5


def test_a_method_that_prunes_too_few_fails_with_both_numbers(pytester: pytest.Pytester) -> None:
    result = run_contract(
        pytester,
        "pool.smallest(self.ranked(pool, lambda weight: weight.grad), n // 2, among, key=torch.abs)",
        only="each_layer_holds",
    )
    result.assert_outcomes(failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.re_match_lines([r".*has \d+ active weights after an update, but its budget is \d+"])


def test_a_method_that_draws_its_masks_unseeded_fails(pytester: pytest.Pytester) -> None:
    result = run_contract(
        pytester,
        "pool.smallest(self.ranked(pool, lambda weight: torch.rand_like(weight.value)), n, among)",
        only="global_generator",
    )
    assert result.parseoutcomes()["failed"] == 2


def test_a_property_that_a_method_cannot_have_is_skipped(pytester: pytest.Pytester) -> None:
    cases = '[Case("still", FixedMask, {"masks": random_masks(ToyModel())}, moves=False)]'
    result = run_contract(pytester, "among", only="min_active_forbids", cases=cases)
    result.assert_outcomes(skipped=1, deselected=result.parseoutcomes()["deselected"])


def test_a_contract_without_cases_says_how_to_give_some(pytester: pytest.Pytester) -> None:
    result = run_contract(pytester, "among", only="Mine", cases="[]")
    assert result.ret != 0
    assert "TestMine has no cases. Give it some: cases = [Case(...)]." in result.stdout.str() + result.stderr.str()


def test_without_pytest_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-sparse\[testing\]'"):
        runpy.run_path(lightning_sparse.testing.__file__)
