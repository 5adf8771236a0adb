"""The same seed gives the same masks; what is compiled stays compiled."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._dynamo import config as dynamo_config  # the switch has no public name

from lightning_sparse.testing.case import Case
from lightning_sparse.testing.contract.base import Contract, assert_same_masks, lasting_modules_only
from lightning_sparse.testing.spies import masks_of
from lightning_sparse.testing.toys import ToyModel
from lightning_sparse.testing.training import fit, make_trainer

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["DeterminismContract"]


class DeterminismContract(Contract):
    """The same seed gives the same masks; what is compiled stays compiled."""

    def test_masks_do_not_depend_on_the_global_generator(self, case: Case, tmp_path: Path) -> None:
        """Randomness comes from generators of the method's own."""
        first, second = case.make(), case.make()
        torch.manual_seed(1)
        fit(first, tmp_path)
        torch.manual_seed(2)
        fit(second, tmp_path)
        assert_same_masks(masks_of(first), masks_of(second))

    def test_the_global_generator_does_not_notice_the_callback(self, case: Case, tmp_path: Path) -> None:
        """Nor does the method disturb anybody else's."""
        torch.manual_seed(7)
        make_trainer(tmp_path).fit(ToyModel())
        expected = torch.random.get_rng_state()
        torch.manual_seed(7)
        fit(case.make(), tmp_path)
        assert torch.equal(torch.random.get_rng_state(), expected)

    def test_a_method_can_go_to_another_process_before_and_after_training(self, case: Case, tmp_path: Path) -> None:
        """It can be pickled, with its masks."""
        method = case.make()
        assert type(pickle.loads(pickle.dumps(method))) is case.method
        fit(method, tmp_path)
        copy = pickle.loads(pickle.dumps(method))
        assert_same_masks(masks_of(copy), masks_of(method))

    @lasting_modules_only
    def test_a_compiled_module_is_not_compiled_again_when_masks_change(self, case: Case, tmp_path: Path) -> None:
        """Masks are written in place: one graph, and the same result."""
        torch.compiler.reset()
        method, model, graphs = case.make(), ToyModel(), []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        model.network = cast("Any", torch.compile(model.network, backend=backend, fullgraph=True))
        eager = case.make()
        with dynamo_config.patch(error_on_recompile=True):
            fit(method, tmp_path, model=model, limit_val_batches=0)
        expected = fit(eager, tmp_path, limit_val_batches=0)
        assert len(graphs) == 1
        assert_same_masks(masks_of(method), masks_of(eager))
        for value, wanted in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
            assert torch.equal(value, wanted)
