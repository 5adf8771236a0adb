"""What all latent methods share: averages and evaluation change no training, and any host's step and gradients work."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import SRSTE, STR, Feather
from lightning_sparse.methods.latent import LatentMethod
from lightning_sparse.testing import masks_of
from lightning_sparse.testing.toys import OPTIMIZERS
from tests.helpers import ToyModel, make_trainer
from tests.methods.cases import CASES, Case

if TYPE_CHECKING:
    from pathlib import Path

LATENT = [case for case in CASES if issubclass(case.method, LatentMethod)]
latent_methods = pytest.mark.parametrize("case", LATENT, ids=lambda case: case.name)

pytestmark = [
    pytest.mark.filterwarnings("ignore:DST. .* has collapsed to sparsity"),
    pytest.mark.filterwarnings("ignore:DST. training ended at sparsity"),
]

# 1. How often one validates or saves changes nothing.


class _OwnAverage(L.Callback):
    """An average as people write it: made as training starts or at the first batch, and swapped in to validate."""

    def __init__(self, *, late: bool, past_counters: bool) -> None:
        self.late = late
        self.past_counters = past_counters
        self.average: nn.Module | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self.late:
            self.average = copy.deepcopy(pl_module.network)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.average is None:
            self.average = copy.deepcopy(pl_module.network)
        average: Any = self.average
        for mean, value in zip(average.parameters(), pl_module.network.parameters(), strict=True):
            mean.lerp_(value, 0.2)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: Any) -> None:
        if self.average is not None:
            for mean, value in zip(self.average.parameters(), pl_module.network.parameters(), strict=True):
                one, other = (mean.data, value.data) if self.past_counters else (mean, value)
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)


AVERAGES: dict[str, Any] = {
    "lightning": partial(EMAWeightAveraging, decay=0.8),
    "own": partial(_OwnAverage, late=False, past_counters=False),
    "own, late": partial(_OwnAverage, late=True, past_counters=False),
    "own, late, .data": partial(_OwnAverage, late=True, past_counters=True),
}


def _outcome(case: Case, average: Any, root: Path, *others: L.Callback, first: bool, **trainer: Any) -> Any:
    """Weights, averages, dense weights and masks at the end of a training."""
    method, averaging, model = case.make(), average(), ToyModel(OPTIMIZERS["adamw"])
    callbacks = [averaging, method] if first else [method, averaging]
    ends: dict[str, Any] = {}

    class End(L.Callback):
        def on_train_end(self, *_: Any) -> None:  # Lightning's average becomes the module after this
            means: Any = averaging._average_model if isinstance(averaging, EMAWeightAveraging) else averaging.average
            ends["average"] = {name: value.detach().clone() for name, value in means.named_parameters()}
            ends["weights"] = {name: value.detach().clone() for name, value in model.named_parameters()}

    make_trainer(root, callbacks=[End(), *callbacks, *others], **trainer).fit(model)
    assert isinstance(method, LatentMethod)
    ends["masks"] = masks_of(method)
    ends["dense"] = {weight.name: method.latent(weight).clone() for weight in method.weights}
    return ends


def _assert_equal(ends: Any, expected: Any) -> None:
    for what, values in expected.items():
        for name, value in values.items():
            assert torch.equal(ends[what][name], value), (what, name)


@pytest.mark.filterwarnings("ignore:.*pruned weights of .* they are zero again")  # of averages that are swapped in
@pytest.mark.parametrize(
    ("average", "first"),
    [("lightning", False), ("lightning", True), ("own", True), ("own, late", False), ("own, late, .data", True)],
)
@latent_methods
def test_validating_or_saving_at_every_step_changes_no_training(
    case: Case, average: str, first: bool, tmp_path: Path
) -> None:
    make = AVERAGES[average]
    never = _outcome(case, make, tmp_path, first=first, limit_val_batches=0)
    validated = _outcome(case, make, tmp_path, first=first, val_check_interval=1, num_sanity_val_steps=2)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    saved = _outcome(case, make, tmp_path, saving, first=first, limit_val_batches=0, enable_checkpointing=True)
    _assert_equal(validated, never)
    _assert_equal(saved, never)


@pytest.mark.filterwarnings("ignore:.*pruned weights of .* they are zero again")
@latent_methods
def test_what_is_written_in_a_validation_and_stays_is_followed(case: Case, tmp_path: Path) -> None:
    method = case.make()
    seen: list[tuple[Tensor, Tensor]] = []

    class RollBack(L.Callback):
        """Halves the weights where validation ends, as one that goes back to better ones writes them."""

        @torch.no_grad()
        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1 and not trainer.sanity_checking:
                pl_module.network[0].weight.mul_(0.5)
                self.wrote = pl_module.network[0].weight.clone()

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2 and batch_idx == 0:
                seen.append((pl_module.network[0].weight.detach().clone(), self.wrote))

    make_trainer(tmp_path, callbacks=[method, RollBack()], max_epochs=3).fit(ToyModel())
    ((found, wrote),) = seen
    torch.testing.assert_close(found, wrote, rtol=1e-4, atol=1e-6)


# 2. Compiled steps, graphs of gradients, sparse gradients.


class _Manual(ToyModel):
    """Manual optimization, with a backward that one can differentiate again."""

    create_graph = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]), create_graph=self.create_graph)
        optimizer.step()


def _dense_weights(case: Case, model: Any, root: Path) -> dict[str, Tensor]:
    method = case.make()
    make_trainer(root, callbacks=[method]).fit(model)
    assert isinstance(method, LatentMethod)
    return {weight.name: method.latent(weight).clone() for weight in method.weights} | masks_of(method)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@latent_methods
def test_gradients_with_a_graph_are_rewritten_too(case: Case, tmp_path: Path) -> None:
    class Graph(_Manual):
        create_graph = True

    expected = _dense_weights(case, _Manual(optimizer=OPTIMIZERS["adamw"]), tmp_path)
    found = _dense_weights(case, Graph(optimizer=OPTIMIZERS["adamw"]), tmp_path)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_compiled_optimizer_step_is_the_plain_one(tmp_path: Path) -> None:
    class Compiled(ToyModel):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
            return optimizer

    torch.compiler.reset()
    (case,) = (case for case in LATENT if case.name == "dst-alpha")  # Dynamo takes ten seconds for each
    expected = _dense_weights(case, ToyModel(), tmp_path)
    found = _dense_weights(case, Compiled(), tmp_path)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


class _Table(nn.Embedding):
    """An embedding whose gradients are sparse without its saying so, which the plan cannot know."""

    def __init__(self, sparse: bool) -> None:
        super().__init__(8, 12)
        self.gives_sparse = sparse

    def forward(self, inputs: Tensor) -> Tensor:
        return F.embedding(inputs, self.weight, sparse=self.gives_sparse)


class _Embedded(ToyModel):
    """An embedding with sparse or dense gradients, before the toy's network."""

    def __init__(self, sparse: bool) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embedding = _Table(sparse)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(self.embedding(inputs[:, 0].abs().long().clamp(max=7)))


@latent_methods
def test_sparse_gradients_are_taken_as_dense_ones(case: Case, tmp_path: Path) -> None:
    case = replace(case, arguments={**case.arguments, "include": ["embedding.weight", "network.*"]})
    expected = _dense_weights(case, _Embedded(sparse=False), tmp_path)
    found = _dense_weights(case, _Embedded(sparse=True), tmp_path)
    assert "embedding.weight" in found
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_sparse_gradients_under_sparse_adam_are_refused_in_words(tmp_path: Path) -> None:
    class Two(_Embedded):
        def __init__(self) -> None:
            super().__init__(sparse=True)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            rest = torch.optim.SGD(self.network.parameters(), lr=0.1)
            return [rest, torch.optim.SparseAdam(self.embedding.parameters(), lr=0.1)]

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizers: Any = self.optimizers()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in optimizers:
                optimizer.step()

    method = SRSTE(include=["embedding.weight", "network.*"])
    with pytest.raises(MisconfigurationException, match=r"embedding\.weight has sparse gradients.*exclude="):
        make_trainer(tmp_path, callbacks=[method]).fit(Two())


# 3. What an error leaves.


@latent_methods
def test_an_error_before_the_step_leaves_the_weights_of_the_last_forward(case: Case, tmp_path: Path) -> None:
    """The dense values lie in the module then, in the place of those that it computes with."""

    class Stops(ToyModel):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.global_step == 6:
                raise RuntimeError("stopped here")

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            seen.update({name: value.clone() for name, value in self.state_dict().items()})
            return super().training_step(batch, batch_idx)

    seen: dict[str, Tensor] = {}
    model = Stops()
    with pytest.raises(RuntimeError, match="stopped here"):
        make_trainer(tmp_path, callbacks=[case.make()]).fit(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[name]), name


# What every method tells, tells this family too.


@pytest.mark.parametrize("method", [Feather(0.9), STR(1.0, decay=0.0)], ids=["Feather", "STR"])
@pytest.mark.filterwarnings(r"ignore:.*network\.2\.weight has no active weight left")
def test_a_layer_without_active_weights_is_named(method: LatentMethod, tmp_path: Path) -> None:
    model = ToyModel()
    with torch.no_grad():
        model.get_parameter("network.4.weight").mul_(1e-6)
    with pytest.warns(UserWarning, match=r"network\.4\.weight.* no active weight left.* with exclude=\.$"):
        make_trainer(tmp_path, callbacks=[method]).fit(model)
