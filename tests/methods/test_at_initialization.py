"""SNIP, GraSP and SynFlow: on weights that can be worked by hand, against slow references, and in real trainings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from lightning_sparse import GMP, SNIP, GraSP, SynFlow
from lightning_sparse.masks import MaskRegistry, select_weights
from lightning_sparse.methods.probe import inputs_of, synaptic_flow
from lightning_sparse.schedules import Linear
from tests.helpers import ConvToy, ToyModel, fit_two_processes, make_trainer, within_training
from tests.methods.hand import Row, layers, prepared, updated
from tests.methods.test_gmp import layers_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning_sparse.methods.at_initialization import AtInitialization

ALL: list[Callable[..., AtInitialization]] = [SNIP, GraSP, SynFlow]


# SNIP. Eight weights in two layers:
#   |w|      .9  .6  .5  .7 | .3  .1  .4 .05
#   |g|       0   1   2   1 |  9   9   1   1
#   |w · g|   0  .6   1  .7 | 2.7 .9  .4 .05
A, B = [0.9, -0.6, 0.5, -0.7], [0.3, 0.1, -0.4, 0.05]
GRADS = [[0.0, 1.0, -2.0, 1.0], [9.0, -9.0, 1.0, 1.0]]


def test_snip_prunes_where_weight_times_gradient_is_smallest() -> None:
    snip, group = SNIP(0.5), layers([A, B], grads=GRADS)
    prepared(snip, group, step=0)
    assert updated(snip, group) == [[0, 0, 1, 1], [1, 1, 0, 0]]


@given(*[st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0]), min_size=8, max_size=8)] * 2)
def test_snip_does_what_sorting_would(weights: Row, grads: Row) -> None:
    snip, group = SNIP(0.5), layers([weights[:3], weights[3:]], grads=[grads[:3], grads[3:]])
    prepared(snip, group, step=0)
    gone = sorted(range(8), key=lambda i: (abs(weights[i] * grads[i]), i))[:4]
    assert [m for mask in updated(snip, group) for m in mask] == [int(i not in gone) for i in range(8)]


def reference_gradient(model: L.LightningModule, batches: int = 1) -> list[Tensor]:
    """Gradients of the masked weights, added up over the first batches."""
    loader: Any = model.train_dataloader()  # type: ignore[no-untyped-call]
    parameters = [candidate.parameter for candidate in select_weights(model).masked]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for _, batch in zip(range(batches), loader, strict=False):
        loss = nn.functional.cross_entropy(model(batch[0].to(model.dtype)), batch[1])
        total = [a + b for a, b in zip(total, torch.autograd.grad(loss, parameters), strict=True)]
    return total


class Begun(L.Callback):
    """The masks and the weights as they are before and after the first few steps."""

    def __init__(self, method: AtInitialization) -> None:
        self.method = method
        self.counts: list[int] = []
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.counts.append(self.method.registry.num_active)
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})


@pytest.mark.parametrize("batches", [1, 3])
def test_snip_sees_the_first_batches_of_the_loader_and_takes_no_step_on_them(batches: int, tmp_path: Path) -> None:
    model, plain = ToyModel(), ToyModel()
    snip = SNIP(0.75, batches=batches)
    begun = Begun(snip)
    make_trainer(tmp_path, callbacks=[snip, begun]).fit(model)
    assert begun.counts == [344] * (batches - 1) + [86] * (17 - batches)
    weights = [candidate.parameter for candidate in select_weights(plain).masked]
    sensitivity = [(w * g).abs() for w, g in zip(weights, reference_gradient(plain, batches), strict=True)]
    least = torch.cat([s.flatten() for s in sensitivity]).topk(86).values.min()
    for weight, wanted in zip(snip.weights, sensitivity, strict=True):
        assert torch.equal(weight.mask, wanted >= least)
    initial = plain.state_dict()
    for name, weight in snip.registry.items():  # nothing has moved; what is pruned is zero
        assert torch.equal(begun.states[batches - 1][name], initial[name].detach() * weight.mask)
        assert not torch.equal(begun.states[batches][name], begun.states[batches - 1][name])
    assert torch.equal(begun.states[batches - 1]["network.0.bias"], initial["network.0.bias"])


# GraSP. L = ½ Σ h w² has the Hessian diag(h) and g = h w, so that w ⊙ (H g) = h² w².


class Quadratic(L.LightningModule):
    """Half of the weighted squares of eight weights."""

    def __init__(self, weights: Row, curvature: Row) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1, bias=False)
        self.layer.weight = nn.Parameter(torch.tensor([weights]))
        self.curvature = torch.tensor([curvature])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * (self.curvature * self.layer.weight**2).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(4, 1))  # pyright: ignore[reportArgumentType]


def test_grasp_prunes_the_highest_scores_with_their_signs(tmp_path: Path) -> None:
    # S = −h² w² is −.81, −.36, −1, −.49, −.09, −4, −.16, −.25: the four highest are −.09, −.16, −.25, −.36.
    model = Quadratic([0.9, -0.6, 0.5, -0.7, 0.3, 1.0, -0.4, 0.5], [1.0, 1.0, 2.0, -1.0, 1.0, -2.0, 1.0, 1.0])
    grasp = GraSP(0.5)
    make_trainer(tmp_path, callbacks=[grasp], max_epochs=1).fit(model)
    assert grasp.weights[0].mask.int().tolist() == [[1, 0, 1, 1, 0, 1, 0, 0]]


@torch.no_grad()
def test_grasp_prunes_with_signs_under_a_pattern_too() -> None:
    # w ⊙ (H g) is −3, 1, 2, −1 | .5, −2, 4, 3: of each four the two largest stay.
    group = layers_of([[1.0] * 8])
    grasp = within_training(GraSP(0.5, allocation="uniform", pattern="2:4"), [group])
    grasp.prepare()
    grasp.memory(group[0], "product").copy_(torch.tensor([[-3.0, 1.0, 2.0, -1.0, 0.5, -2.0, 4.0, 3.0]]))
    grasp.update_masks(group)
    assert group[0].mask.int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]


def test_grasp_computes_the_hessians_product_with_the_gradient(tmp_path: Path) -> None:
    """Against the whole Hessian: g of the first batch, H of the second."""
    model, plain = ToyModel().double(), ToyModel().double()
    seen: dict[str, Tensor] = {}

    class Look(L.Callback):
        def on_before_zero_grad(self, *_: Any) -> None:
            seen.update({name: its.clone() for name, its in grasp.run.memory.get("product", {}).items()})

    grasp = GraSP(0.75)
    make_trainer(tmp_path, callbacks=[grasp, Look()], precision="64-true", max_epochs=1).fit(model)
    names = [candidate.name for candidate in select_weights(plain).masked]
    first = torch.cat([g.flatten() for g in reference_gradient(plain)])
    second = list(plain.train_dataloader())[1]
    shapes = [plain.get_parameter(name).shape for name in names]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        logits = torch.func.functional_call(plain, values, (second[0].double(),))
        return nn.functional.cross_entropy(logits, second[1])

    flat = torch.cat([plain.get_parameter(name).detach().flatten() for name in names])
    hessian = torch.autograd.functional.hessian(loss, flat)
    scores = flat * (hessian @ first)  # type: ignore[operator]
    least = scores.topk(86).values.min()
    mask = torch.cat([weight.mask.flatten() for weight in grasp.weights])
    assert torch.equal(mask, scores >= least)


class Halves(Quadratic):
    """In float16, under a loss scaled by 1024, H g is 2^20 h^2 w and overflows; g is at most 2^15."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = self.layer.weight.half()
        return 0.5 * (16.0 * self.curvature.half() * weight**2).float().sum()

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(16, 1))  # pyright: ignore[reportArgumentType]


def test_grasp_scales_down_a_product_that_overflows_where_gradients_do_not(tmp_path: Path) -> None:
    model = Halves([0.9, -0.6, 0.5, -0.7, 0.3, 1.0, -0.4, 0.5], [1.0, 1.0, 2.0, -1.0, 1.0, -2.0, 1.0, 1.0])
    grasp = GraSP(0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    make_trainer(tmp_path, plugins=[precision], callbacks=[grasp], max_epochs=1).fit(model)
    assert scaler.get_scale() == 2.0**10
    assert grasp.weights[0].mask.int().tolist() == [[1, 0, 1, 1, 0, 1, 0, 0]]  # as in float32, above


class Kinked(ToyModel):
    """Of the second batch, the gradients are finite, and the second derivative is NaN; on rank 1 if there are two."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step != 1 or self.global_rank != self.trainer.world_size - 1:
            return loss
        weight = cast("Tensor", self.network[0].weight)
        return loss + (weight - weight.detach()).abs().pow(1.5).sum()


def test_grasp_waits_for_a_product_that_is_finite_and_counts_no_other(tmp_path: Path) -> None:
    grasp = GraSP(0.75, batches=2)
    begun = Begun(grasp)
    make_trainer(tmp_path, callbacks=[grasp, begun]).fit(Kinked())
    # Steps 0 and 1 are for the gradient, which is finite in both.
    assert begun.counts[:5] == [344, 344, 344, 86, 86]
    grasp = GraSP(0.75)
    begun = Begun(grasp)
    make_trainer(tmp_path, callbacks=[grasp, begun]).fit(Kinked())
    assert begun.counts[:5] == [344, 344, 86, 86, 86]
    assert all(value.isfinite().all() for state in begun.states for value in state.values())


def test_all_processes_wait_where_the_product_of_one_is_not_finite(tmp_path: Path) -> None:
    first, second = fit_two_processes(Kinked(), tmp_path, [GraSP(0.75)], max_epochs=1)
    for name, value in first["weights"].items():
        assert value.isfinite().all()
        assert torch.equal(value, second["weights"][name])
    weights = [value for value in first["weights"].values() if value.dim() > 1]
    assert sum(int(weight.count_nonzero()) for weight in weights) == 86


def test_a_product_that_is_never_finite_is_an_error(tmp_path: Path) -> None:
    class Always(Kinked):
        @property
        def global_step(self) -> int:
            return 1

    with pytest.raises(
        RuntimeError, match=r"what GraSP computes from gradients, were inf or NaN at 100 steps in a row"
    ):
        make_trainer(tmp_path, callbacks=[GraSP(0.75)], max_epochs=20).fit(Always())


def test_a_loss_without_a_second_derivative_is_refused_with_a_way_out(tmp_path: Path) -> None:
    class Attention(ToyModel):
        def forward(self, inputs: Tensor) -> Tensor:
            first, *others = self.network.children()
            words = first(inputs).view(-1, 1, 4, 4)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                mixed = nn.functional.scaled_dot_product_attention(words, words, words)
            return nn.Sequential(*others)(mixed.flatten(1))  # type: ignore[no-any-return]

    with pytest.raises(MisconfigurationException, match=r"GraSP needs the second derivative.*use SNIP or SynFlow"):
        make_trainer(tmp_path, callbacks=[GraSP(0.5)]).fit(Attention())


class TwoPlayers(ToyModel):
    """Two networks with losses and optimizers of their own, of which one sees what the other makes."""

    toggles = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.judge = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        made, optimizers = self(batch[0]), cast("list[Any]", self.optimizers())
        losses = nn.functional.softplus(self.judge(made.detach())).mean(), made.square().mean()
        for loss, optimizer in zip(losses, optimizers[::-1], strict=True):
            if self.toggles:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.network, self.judge)]


@pytest.mark.parametrize("toggles", [False, True])
@pytest.mark.parametrize("include", [None, ["network.*"], ["judge.*"]])
def test_a_loss_without_the_masked_weights_says_nothing_of_them(
    include: list[str] | None, toggles: bool, tmp_path: Path
) -> None:
    grasp, model = GraSP(0.5, include=include), TwoPlayers()
    model.toggles = toggles
    make_trainer(tmp_path, callbacks=[grasp]).fit(model)
    assert grasp.registry.sparsity == pytest.approx(0.5, abs=0.02)


class OneLoss(TwoPlayers):
    """Both optimizers step on one loss."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(self.judge(self(batch[0])).square().mean())
        for optimizer in cast("list[Any]", self.optimizers()):
            optimizer.step()
            optimizer.zero_grad()


class Critic(TwoPlayers):
    """One optimizer steps three times before the other does."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, second = cast("list[Any]", self.optimizers())
        for optimizer in (second, second, second, first):
            optimizer.zero_grad()
            self.manual_backward(self.judge(self(batch[0])).square().mean())
            optimizer.step()


@pytest.mark.parametrize("kind", [OneLoss, Critic])
@pytest.mark.parametrize("batches", [1, 2])
def test_two_optimizers_may_step_as_they_will_under_grasp(kind: type[TwoPlayers], batches: int, tmp_path: Path) -> None:
    grasp, model = GraSP(0.5, batches=batches), kind()
    before = {name: value.clone() for name, value in model.named_parameters()}
    make_trainer(tmp_path, callbacks=[grasp], max_epochs=1).fit(model)
    assert [weight.num_active for weight in grasp.weights] != [weight.numel for weight in grasp.weights]
    assert grasp.registry.sparsity == pytest.approx(0.5, abs=0.02)
    assert all(bool((model.get_parameter(name) != value).any()) for name, value in before.items())


# SynFlow


def chain(*matrices: list[list[float]]) -> L.LightningModule:
    """Linear layers one after another, without biases."""

    class Chain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            parts = [nn.Linear(len(rows[0]), len(rows), bias=False) for rows in matrices]
            for part, rows in zip(parts, matrices, strict=True):
                part.weight = nn.Parameter(torch.tensor(rows))
            self.parts = nn.Sequential(*parts)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.parts(inputs)  # type: ignore[no-any-return]

    return Chain()


def test_the_flow_of_a_weight_is_what_goes_through_it() -> None:
    # Two inputs, two hidden, two outputs: eight weights. |W1| = [[1, 2], [3, 0]], |W2| = [[1, 1], [0, 2]].
    # Into the hidden neurons flow 3 and 3; out of them, by the column sums of |W2|, times 1 and 3.
    module = chain([[1.0, -2.0], [-3.0, 0.0]], [[1.0, -1.0], [0.0, 2.0]])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (group,) = MaskRegistry().claim("method", select_weights(module).masked, [optimizer])
    flows = synaptic_flow(module, torch.zeros(1, 2), list(group))
    assert flows["parts.0.weight"].tolist() == [[1.0, 2.0], [9.0, 0.0]]
    assert flows["parts.1.weight"].tolist() == [[3.0, 3.0], [0.0, 6.0]]
    # Masked, the flow through the second neuron is gone.
    group[0].mask[1] = False
    flows = synaptic_flow(module, torch.zeros(1, 2), list(group))
    assert flows["parts.1.weight"].tolist() == [[3.0, 0.0], [0.0, 0.0]]
    assert module.get_parameter("parts.0.weight").tolist() == [[1.0, -2.0], [-3.0, 0.0]]


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_synflow_is_the_loop_of_the_paper(iterations: int, tmp_path: Path) -> None:
    model, plain = ToyModel(), ToyModel()
    synflow = SynFlow(0.5, iterations=iterations)
    begun = Begun(synflow)
    make_trainer(tmp_path, callbacks=[synflow, begun], max_epochs=1).fit(model)
    assert set(begun.counts) == {172}
    names = [candidate.name for candidate in select_weights(plain).masked]
    magnitudes = {name: value.detach().abs() for name, value in plain.state_dict().items()}
    masks = {name: torch.ones_like(magnitudes[name]) for name in names}
    for k in range(1, iterations + 1):
        live = {name: (magnitudes[name] * masks[name]).requires_grad_() for name in names}
        total = torch.func.functional_call(plain, magnitudes | live, (torch.ones(1, 12),)).sum()
        flows = torch.autograd.grad(total, list(live.values()))
        scores = {name: (live[name].detach() * flow).abs() for name, flow in zip(names, flows, strict=True)}
        left = max(172, math.floor(344 * 0.5 ** (k / iterations) + 1e-9))
        flat = torch.cat([scores[name][masks[name].bool()] for name in names])
        least = flat.topk(left).values.min()
        masks = {name: masks[name] * (scores[name] >= least) for name in names}
    for name, weight in synflow.registry.items():
        assert torch.equal(weight.mask, masks[name].bool()), name


def test_synflow_leaves_no_trace(tmp_path: Path) -> None:
    """Weights, buffers, modes and random generators, with a BatchNorm and a dropout in the network."""

    class Model(ConvToy):
        @staticmethod
        def build() -> nn.Sequential:
            return ConvToy.build().insert(3, nn.Dropout(0.5))

    model = Model()
    model.network[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    generator = torch.random.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (group,) = MaskRegistry().claim("method", select_weights(model).masked, [optimizer])
    flows = synaptic_flow(model, torch.randn(2, 2, 6, 6, generator=torch.Generator()), list(group))
    assert all((flow >= 0).all() and flow.any() for flow in flows.values())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_that_fails_is_named_and_nothing_has_changed(tmp_path: Path) -> None:
    class Model(ToyModel):
        def forward(self, inputs: Tensor) -> Tensor:
            if self.training:
                return super().forward(inputs)
            raise KeyError("tokens")

    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        MisconfigurationException, match=r"Model\.forward on ones, which raised KeyError.*example_input"
    ):
        make_trainer(tmp_path, callbacks=[SynFlow(0.5)], num_sanity_val_steps=0).fit(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [dict, tuple, list])
def test_an_example_input_array_may_be_several_arguments(kind: type, tmp_path: Path) -> None:
    arguments = {"inputs": torch.zeros(2, 12), "scale": torch.zeros(1)}

    class Model(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = arguments if kind is dict else kind(arguments.values())

        def forward(self, inputs: Tensor, scale: Any = 1.0) -> Tensor:
            return super().forward(inputs) * scale

    synflow = SynFlow(0.5, iterations=3)
    make_trainer(tmp_path, callbacks=[synflow], max_epochs=1).fit(Model())
    assert synflow.registry.num_active == 172


def test_a_list_that_comes_first_in_a_batch_is_one_argument() -> None:
    """As images of several sizes, which a detector takes."""

    class Model(L.LightningModule):
        def forward(self, images: list[Tensor]) -> Tensor:
            return torch.stack([image.sum() for image in images])

    images = [torch.zeros(2, 3), torch.zeros(4, 5)]
    (argument,) = inputs_of(Model(), (images, ["cat", "dog"]))
    assert argument is images


def test_a_flow_that_is_too_large_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(module: Any, inputs: Any, weights: Any) -> dict[str, Tensor]:
        return {weight.name: torch.full_like(weight.value, torch.inf) for weight in weights}

    monkeypatch.setattr("lightning_sparse.methods.synflow.synaptic_flow", overflowing)
    with pytest.raises(MisconfigurationException, match=r"SynFlow's scores are inf or NaN.*Normalise"):
        make_trainer(tmp_path, callbacks=[SynFlow(0.5)]).fit(ToyModel())


# All of them


class WithoutLoss(ToyModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


@pytest.mark.filterwarnings("ignore:.*training_step.*returned.*None")
@pytest.mark.parametrize("method", ALL)
def test_a_module_without_loss_is_named_and_not_trained(method: Any, tmp_path: Path) -> None:
    model, plain = WithoutLoss(), ToyModel()
    with (
        pytest.warns(UserWarning, match="has pruned nothing: training ended at step"),
        pytest.warns(UserWarning, match="no masked weight got a gradient, so neither pruning"),
    ):
        make_trainer(tmp_path, callbacks=[method(0.5)]).fit(model)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


class Diverged(ToyModel):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * float("nan")


@pytest.mark.parametrize("method", ALL)
def test_where_gradients_are_never_finite_the_end_says_so(method: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has pruned nothing: training ended at step 16 before every masked weight"):
        make_trainer(tmp_path, callbacks=[method(0.5)]).fit(Diverged())


class BadAtFirst(ToyModel):
    """The gradients of the first two batches are NaN."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step < 2 else loss


@pytest.mark.parametrize("method", ALL)
def test_batches_whose_gradients_are_not_finite_are_waited_for(method: Any, tmp_path: Path) -> None:
    its = method(0.75)
    begun = Begun(its)
    make_trainer(tmp_path, callbacks=[its, begun]).fit(BadAtFirst())
    assert begun.counts[:2] == [344, 344]
    assert begun.counts[-1] == 86
    assert all(value.isfinite().all() for state in begun.states for value in state.values())


@pytest.mark.parametrize("method", [*ALL, GMP])
def test_a_loader_without_batches_is_a_sentence(method: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"had no batch to train on, so no weight was masked"):
        make_trainer(tmp_path, callbacks=[method(0.5)], limit_train_batches=0).fit(ToyModel())


@pytest.mark.parametrize("method", ALL)
def test_pruning_goes_on_from_what_another_method_has_left(method: Any, tmp_path: Path) -> None:
    model = ToyModel()
    gmp, its = GMP(0.5), method(0.75)
    make_trainer(tmp_path, callbacks=[gmp]).fit(model)
    before = {weight.name: weight.mask.clone() for weight in gmp.weights}
    make_trainer(tmp_path, callbacks=[its]).fit(model)
    assert its.registry.num_active == 86
    for weight in its.weights:
        assert not (weight.mask & ~before[weight.name]).any()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (SNIP, {"sparsity": Linear(0.0, 0.5)}, "SNIP prunes once: give a number"),
        (SNIP, {"sparsity": 0.5, "batches": 0}, "batches is 0; give a number of optimizer steps"),
        (SNIP, {"sparsity": 1.0}, r"sparsity is 1.* \[0, 1\)"),
        (SynFlow, {"sparsity": 0.5, "iterations": 0}, "iterations is 0; give an int of at least 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(method: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**arguments)
