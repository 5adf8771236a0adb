"""SR-STE, STR, Top-KAST and Feather: by hand on eight weights, and against autograd through reparametrized weights."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sparse import SRSTE, STR, Feather, TopKAST
from lightning_sparse.masks.patterns import NofM
from lightning_sparse.masks.plan import select_weights
from lightning_sparse.masks.pool import MaskPool
from lightning_sparse.schedules import Constant
from tests.helpers import ConvToy, ToyModel, fit_two_processes, make_trainer
from tests.methods.reference_latent import (
    FeatherNetwork,
    ReferenceToy,
    Reparametrized,
    SRSTENetwork,
    STRNetwork,
    TopKASTNetwork,
)
from tests.methods.spies import StepIndexedToy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning_sparse.methods.latent import LatentMethod

# 1. By hand, on eight weights.


class _Eight(L.LightningModule):
    """Eight weights, whose loss is linear: its gradient is ``grads``, one for each step."""

    def __init__(self, weights: list[list[float]], *grads: list[list[float]], optimizer: Any = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2, bias=False)
        self.layer.weight.data.copy_(torch.tensor(weights))
        self.grads = torch.tensor(grads, dtype=torch.float32)
        self.make_optimizer = optimizer or partial(torch.optim.SGD, lr=0.5)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(self.layer.weight.detach().clone())
        return (self.layer.weight * self.grads[batch_idx]).sum()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.zeros(len(self.grads)))  # type: ignore[arg-type]


def _train(method: LatentMethod, model: _Eight, root: Path) -> Tensor:
    """Train on every gradient once; the dense weights afterwards."""
    make_trainer(root, callbacks=[method], max_epochs=1).fit(model)
    return method.latent(method.weights[0])


def _close(found: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_srste_by_hand(tmp_path: Path) -> None:
    # 2:4 of rows: |4| and |3| of the first, |-4| and |2| of the second (|2| before |1| and |0.5|).
    model = _Eight([[1, -2, 3, 4], [0.5, 2, -4, 1]], [[1, 1, 1, 1], [-1, 0, 0, 0]])
    method = SRSTE("2:4", decay=0.1)
    dense = _train(method, model, tmp_path)
    _close(model.seen[0], [[0, 0, 3, 4], [0, 2, -4, 0]])
    # W - 0.5 (G + 0.1 (1 - M) W)
    _close(dense, [[0.45, -2.4, 2.5, 3.5], [0.975, 2, -4, 0.95]])
    # the second row's two largest are 2 and -4 still; the module holds them
    _close(model.layer.weight.detach(), [[0, 0, 2.5, 3.5], [0, 2, -4, 0]])


def test_str_by_hand(tmp_path: Path) -> None:
    # s = 0: every magnitude is reduced by g(0) = 0.5.
    model = _Eight([[1, -2, 0.5, 0.25], [-0.5, 3, -1, 0]], [[1, 1, 1, 1], [2, 0, -1, 1]])
    method = STR(0.0, decay=0.0)
    dense = _train(method, model, tmp_path)
    _close(model.seen[0], [[0.5, -1.5, 0, 0], [0, 2.5, -0.5, 0]])
    # dL/dW = G M: with M at 1, -2, 3 and -1
    _close(dense, [[0.5, -2.5, 0.5, 0.25], [-0.5, 3, -0.5, 0]])
    # dL/ds = -(1·1 + 1·(-1) + 0·1 + (-1)·(-1)) · 0.5 · 0.5 = -0.25; s = 0 + 0.5 · 0.25
    assert float(method.parameters["layer.weight"].detach()) == pytest.approx(0.125)
    reduced = 1 / (1 + math.exp(-0.125))  # 0.531
    _close(model.layer.weight.detach(), [[0, -2.5 + reduced, 0, 0], [0, 3 - reduced, 0, 0]])


def test_weight_decay_draws_the_threshold_of_str_up(tmp_path: Path) -> None:
    nothing = [[0.0] * 4] * 2
    model = _Eight([[1.0] * 4] * 2, nothing, nothing, optimizer=partial(torch.optim.SGD, lr=0.5, weight_decay=0.2))
    method = STR(-3200.0)
    _train(method, model, tmp_path)
    assert float(method.parameters["layer.weight"].detach()) == pytest.approx(-3200 * 0.9**2)
    own = STR(-3200.0, decay=1.0)
    _train(own, _Eight([[1.0] * 4] * 2, nothing, nothing), tmp_path)
    assert float(own.parameters["layer.weight"].detach()) == pytest.approx(-3200 * 0.5**2)


@pytest.mark.filterwarnings("ignore:.*no more than one weight per output")
def test_topkast_by_hand(tmp_path: Path) -> None:
    # A: the two largest, 4 and -3; B: the four largest, 2 and -2.5 besides.
    model = _Eight(
        [[4, 1, -3, 0.5], [2, -2.5, 1, 0]],
        [[1, 1, 1, 1], [1, 1, 1, 1]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
        optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.5, weight_decay=0.1),
    )
    method = TopKAST(0.75, backward_sparsity=0.5, decay=0.2)
    dense = _train(method, model, tmp_path)
    _close(model.seen[0], [[4, 0, -3, 0], [0, 0, 0, 0]])
    # first step, D = 1/4: g = 1 + 0.2 W + 0.1 W in A, 1 + 0.8 W + 0.1 W in B without A; nothing elsewhere
    #   4 - 0.5 · 2.2 = 2.9; -3 - 0.5 · 0.1 = -3.05; 2 - 0.5 · 2.8 = 0.6; -2.5 - 0.5 · (-1.25) = -1.875
    _close(model.seen[1], [[2.9, 0, -3.05, 0], [0, 0, 0, 0]])
    # second step: A is 2.9 and -3.05, B has -1.875 and the first 1, for 0.6 has fallen back, with its momentum
    #   2.9: 0.5 · 2.2 + 0.3 · 2.9 = 1.97; -3.05: 0.5 · 0.1 - 0.915 = -0.865; -1.875: 0.5 · (-1.25) - 0.9 · 1.875;
    #   1: no momentum yet, 0.9
    _close(dense, [[1.915, 0.55, -2.6175, 0.5], [0.6, -0.71875, 1, 0]])


def test_feather_by_hand(tmp_path: Path) -> None:
    # At sparsity 0.5 the four smallest go, of which the largest magnitude is T = 1.
    model = _Eight([[2, -1, 0.5, 3], [-4, 1.5, 0, 0.25]], [[1, 1, 1, 1], [-1, -1, -1, -1]])
    method = Feather(Constant(0.5), theta=0.25)
    dense = _train(method, model, tmp_path)
    cut = [7 ** (1 / 3), 26 ** (1 / 3), -(63 ** (1 / 3)), 2.375 ** (1 / 3)]
    _close(model.seen[0], [[cut[0], 0, 0, cut[1]], [cut[2], cut[3], 0, 0]])
    # W - 0.5 G where active, W - 0.125 G where pruned
    _close(dense, [[1.5, -1.125, 0.375, 2.5], [-3.5, 2, 0.125, 0.375]])
    assert method.threshold(method.weights[0]) == 1.125


# 2. Whole trainings are those of autograd, step by step.

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}
STEPS = 24
METHODS: dict[str, tuple[Callable[[], LatentMethod], type[Reparametrized], dict[str, Any]]] = {
    "srste": (partial(SRSTE, "2:4", decay=0.05), SRSTENetwork, {"decay": 0.05}),
    "str": (partial(STR, -2.5), STRNetwork, {"initial": -2.5}),
    "topkast": (
        partial(TopKAST, 0.75, backward_sparsity=0.5, decay=0.02),
        TopKASTNetwork,
        {"decay": 0.02},
    ),
    "feather": (
        partial(Feather, 0.8, theta=0.5, start=1, stop=16),
        FeatherNetwork,
        {"sparsity": 0.8, "theta": 0.5, "stop": 16},
    ),
}


class _Scheduled:
    """One-cycle over learning rate and momentum at every step; biases and norms are a group of their own."""

    def configure_optimizers(self) -> Any:
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            groups[parameter.dim() == 2 or "thresholds" in name].append(parameter)
        optimizer = self.optimizer_factory([{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}])  # type: ignore[attr-defined]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=64)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _Ours(_Scheduled, StepIndexedToy):
    """The toy under the callback."""


class _Reference(_Scheduled, ReferenceToy):
    """The reparametrized toy."""


class _Course(L.Callback):
    """What was there after every step: dense weights, masks, what is learned, and the rest of the parameters."""

    def __init__(self, method: LatentMethod | None, root: Path) -> None:
        self.method = method
        self.root = root
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        look = self._ours(pl_module, self.method) if self.method else self._reference(pl_module)
        self.seen[trainer.global_step] = {key: value.detach().clone() for key, value in look.items()}

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        torch.save(self.seen, self.root / f"course{trainer.global_rank}.pt")

    @staticmethod
    def _ours(module: Any, method: LatentMethod) -> dict[str, Tensor]:
        look = dict(module.network.named_parameters())
        for weight in method.weights:
            name = weight.name.removeprefix("network.")
            look |= {name: method.latent(weight), f"m {name}": weight.mask, f"e {name}": weight.value}
            if weight.name in method.parameters:
                look[f"t {name}"] = method.parameters[weight.name]
        return look

    @staticmethod
    def _reference(module: Any) -> dict[str, Tensor]:
        whole: Reparametrized = module.network
        look: dict[str, Tensor] = dict(whole.network.named_parameters())
        look |= {f"m {name}": whole.mask(name) for name in whole.names}
        look |= {f"e {name}": whole.effective(name) for name in whole.names}
        return look | {f"t {name}": value for name, value in zip(whole.names, whole.thresholds, strict=False)}


def _assert_same_course(ours: dict[int, dict[str, Tensor]], reference: dict[int, dict[str, Tensor]]) -> None:
    assert ours.keys() == reference.keys()
    for step, look in ours.items():
        assert look.keys() == reference[step].keys()
        for key, value in look.items():
            torch.testing.assert_close(
                value, reference[step][key], rtol=1e-11, atol=1e-11, msg=lambda m, k=key, s=step: f"{s} {k}: {m}"
            )  # type: ignore[misc]
    masks = [{key: value for key, value in look.items() if key.startswith("m ")} for look in ours.values()]
    assert any(not torch.equal(value, masks[0][key]) for key, value in masks[-1].items()), "not an interesting course"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_training_is_that_of_autograd_step_by_step(name: str, settings: Any, optimizer: str, tmp_path: Path) -> None:
    make, kind, arguments = METHODS[name]
    accumulated = settings.get("accumulate_grad_batches", 1)
    if name == "srste":  # its backward adds what it adds at each batch
        arguments = {"decay": arguments["decay"] / accumulated}
    trainer = {"precision": "64-true", "max_epochs": STEPS * accumulated // 8, **settings}
    method = make()
    ours, reference = _Course(method, tmp_path), _Course(None, tmp_path)
    make_trainer(tmp_path, callbacks=[method, ours], **trainer).fit(_Ours(OPTIMIZERS[optimizer]))
    model = _Reference(kind, arguments, optimizer=OPTIMIZERS[optimizer])
    make_trainer(tmp_path, callbacks=[reference], **trainer).fit(model)
    assert max(ours.seen) == STEPS
    _assert_same_course(ours.seen, reference.seen)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_two_processes_of_autograd(name: str, tmp_path: Path) -> None:
    make, kind, arguments = METHODS[name]
    settings: dict[str, Any] = {"precision": "64-true", "max_epochs": 2}
    method = make()
    model = _Ours(OPTIMIZERS["sgd"], batch_size=4)
    fit_two_processes(model, tmp_path, [method, _Course(method, tmp_path)], **settings)
    ours = [torch.load(tmp_path / f"course{rank}.pt") for rank in (0, 1)]
    reference = _Reference(kind, arguments, optimizer=OPTIMIZERS["sgd"], batch_size=4)
    fit_two_processes(reference, tmp_path, [_Course(None, tmp_path)], **settings)
    for rank in (0, 1):
        _assert_same_course(ours[rank], torch.load(tmp_path / f"course{rank}.pt"))


# 3. What each of them promises.


@pytest.mark.filterwarnings("ignore:.*no more than one weight per output")
@pytest.mark.parametrize("update_every", [1, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_outside_b_moves_under_topkast(optimizer: str, update_every: int, tmp_path: Path) -> None:
    method = TopKAST(0.9, backward_sparsity=0.6, update_every=update_every)

    class Still(L.Callback):
        def __init__(self) -> None:
            self.before: dict[str, tuple[Tensor, Tensor]] = {}
            self.looks = self.moved = 0

        def on_train_batch_start(self, *_: Any) -> None:
            trained = method.trained
            self.before = {w.name: (method.latent(w).clone(), trained[w.name].clone()) for w in method.weights}

        def on_train_batch_end(self, *_: Any) -> None:
            for weight in method.weights:
                values, trained = self.before[weight.name]
                assert torch.equal(method.latent(weight)[~trained], values[~trained])
                assert int((method.latent(weight)[trained] != values[trained]).sum()) > 0
                assert torch.equal(weight.mask & method.trained[weight.name], weight.mask)
                self.looks += 1

    watch = Still()
    make_trainer(tmp_path, callbacks=[method, watch]).fit(ToyModel(OPTIMIZERS[optimizer]))
    assert watch.looks == 3 * 16
    assert method.registry.num_active == int(0.1 * 344)
    assert sum(int(trained.sum()) for trained in method.trained.values()) == int(0.4 * 344 + 1e-9)


@pytest.mark.filterwarnings("ignore:.*no more than one weight per output")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_topkast_computes_with_the_values_that_it_keeps(optimizer: str, tmp_path: Path) -> None:
    method = TopKAST(0.9, backward_sparsity=0.9)

    class Compare(L.Callback):
        def __init__(self) -> None:
            self.before: dict[str, Tensor] = {}
            self.entered = 0

        def on_train_batch_start(self, *_: Any) -> None:
            for weight in method.weights:
                assert torch.equal(weight.value, method.effective(weight, method.latent(weight)))
                # Weights that decay or momentum moved outside of B, and that are used now.
                self.entered += int((weight.mask & ~self.before.get(weight.name, weight.mask)).sum())
                self.before[weight.name] = method.trained[weight.name].clone()

    watch = Compare()
    make_trainer(tmp_path, callbacks=[method, watch], max_epochs=4).fit(ToyModel(OPTIMIZERS[optimizer]))
    assert watch.entered > 0


def test_srste_holds_its_pattern_in_every_block_of_every_layer(tmp_path: Path) -> None:
    method = SRSTE("1:2")
    make_trainer(tmp_path, callbacks=[method]).fit(ConvToy())
    for weight in method.weights:
        channels = weight.value.shape[1] // 2
        blocks = weight.mask.reshape(len(weight.mask), channels, 2, -1)
        assert (blocks.sum(dim=2) == 1).all()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 8), (4, 16)])
def test_the_best_of_every_block_is_that_of_a_sort(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n * m)
    for layer in (nn.Linear(2 * m, 5), nn.Conv2d(m, 6, 3), nn.ConvTranspose2d(2 * m, 4, 2)):
        (weight,) = MaskPool(select_weights(layer).masked)
        scores = torch.randint(0, 4, weight.shape, generator=generator).float()  # with ties
        rows = weight.rows(scores)
        inputs = weight.shape[0 if isinstance(layer, nn.ConvTranspose2d) else 1]
        rows = rows.reshape(len(rows), inputs // m, m, -1)
        found = weight.rows(NofM(n, m).best(weight, scores)).reshape(rows.shape)
        for block, mask in zip(rows.movedim(2, -1).reshape(-1, m), found.movedim(2, -1).reshape(-1, m), strict=True):
            expected = sorted(range(m), key=lambda place, of=block: (-float(of[place]), place))[:n]
            assert mask.nonzero().flatten().tolist() == sorted(expected)


def test_feather_ends_at_its_sparsity_to_the_weight(tmp_path: Path) -> None:
    method = Feather(0.97)
    make_trainer(tmp_path, callbacks=[method]).fit(ToyModel())
    assert method.registry.num_active == int(0.03 * 344)
    assert method.theta == 0.5
    assert Feather(0.95).theta == 1.0


@pytest.mark.parametrize("make", [partial(STR, -2.0, decay=0.05), partial(Feather, 0.5, stop=4)])
def test_what_is_written_into_a_shrunken_weight_becomes_its_dense_value(make: Any, tmp_path: Path) -> None:
    method = make()
    wrote: dict[str, Tensor] = {}

    class Write(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 8:
                with torch.no_grad():
                    weight = pl_module.network[0].weight
                    weight.mul_(1.5)
                    wrote["value"] = weight.clone()

        def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 8 and "value" in wrote:
                weight = method.weights[0]
                wrote["used"] = weight.value.clone()

    make_trainer(tmp_path, callbacks=[Write(), method]).fit(ToyModel())
    torch.testing.assert_close(wrote["used"], wrote["value"], rtol=1e-4, atol=1e-6)


# 4. What cannot be is refused.


class _Odd(ToyModel):
    """No layer has a multiple of four inputs."""

    @staticmethod
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (partial(SRSTE, "any"), r"SRSTE: pattern is 'any', but it needs N:M; give '2:4'"),
        (partial(SRSTE, "4:2"), r"give 1 ≤ n < m"),
        (partial(SRSTE, decay=-1.0), r"decay is -1\.0; give a number of at least 0"),
        (partial(STR, float("nan")), r"initial is nan; give a finite number"),
        (partial(STR, -5.0, decay=-1e-3), r"decay is -0\.001"),
        (partial(TopKAST, 0.5, backward_sparsity=0.8), r"backward_sparsity is 0\.8 and sparsity is 0\.5, but every"),
        (partial(TopKAST, 1.0), r"sparsity is 1.*\[0, 1\)"),
        (partial(TopKAST, 90), r"Did you mean 0\.9"),
        (partial(TopKAST, 0.9, **{"allocation": "global"}), r"allocation is 'global'; give one of"),
        (partial(TopKAST, 0.9, **{"update_every": 0.5}), r"update_every is 0\.5; give a number of steps"),
        (partial(Feather, 1.0), r"sparsity is 1.*\[0, 1\)"),
        (partial(Feather, 0.9, theta=2.0), r"theta is 2\.0"),
        (partial(Feather, 0.9, power=0.5), r"power is 0\.5"),
        (partial(Feather, 0.9, start=0.8, stop=0.5), r"start \(0\.8\) comes after stop"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_pattern_that_no_layer_satisfies_is_refused(tmp_path: Path) -> None:
    model = _Odd()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        MisconfigurationException, match=r"cannot mask any weight.*12 inputs are not a multiple of 8.*Give"
    ):
        make_trainer(tmp_path, callbacks=[SRSTE("4:8")]).fit(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_does_not_satisfy_the_pattern_stays_dense(tmp_path: Path) -> None:
    method = SRSTE("2:4")
    make_trainer(tmp_path, callbacks=[method]).fit(_Odd())
    assert [weight.name for weight in method.weights] == ["network.0.weight"]


@pytest.mark.parametrize("make", [partial(TopKAST, 0.9999), partial(Feather, 0.9999)])
def test_a_sparsity_that_leaves_no_weight_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"largest feasible sparsity is 0\.99\d+"):
        make_trainer(tmp_path, callbacks=[make()]).fit(ToyModel())


def test_str_without_weight_decay_says_that_nothing_will_happen(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"SGD has no weight decay.*give STR decay="):
        make_trainer(tmp_path, callbacks=[STR(-5.0)]).fit(ToyModel())


def test_feather_without_a_known_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stop=0\.5 are in fractions of training"):
        make_trainer(tmp_path, max_epochs=-1, callbacks=[Feather(0.9)]).fit(ToyModel())


def _forget_trained(state: dict[str, Any]) -> None:
    state["method"]["own"].popitem()


def _cut_trained(state: dict[str, Any]) -> None:
    own = state["method"]["own"]
    own["network.0.weight"] = own["network.0.weight"][:-1]


@pytest.mark.parametrize(
    ("make", "damage"),
    [
        (partial(TopKAST, 0.75), _forget_trained),
        (partial(TopKAST, 0.75), _cut_trained),
        (partial(Feather, 0.75), _forget_trained),
    ],
)
def test_a_damaged_checkpoint_is_refused(make: Any, damage: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[make()], max_epochs=1)
    trainer.fit(ToyModel())
    trainer.save_checkpoint(tmp_path / "damaged.ckpt")
    checkpoint = torch.load(tmp_path / "damaged.ckpt", weights_only=True)
    damage(next(iter(checkpoint["callbacks"].values())))
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(MisconfigurationException, match="earlier"):
        make_trainer(tmp_path, callbacks=[make()]).fit(ToyModel(), ckpt_path=tmp_path / "damaged.ckpt")
