"""DST against the explicit masked layers of its authors, and what is the package's own: guard, steering, sleep."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_sparse import DST
from tests.helpers import ToyModel, fit_two_processes, make_trainer
from tests.methods.reference_dst import MaskedNetwork, ReferenceToy
from tests.methods.spies import StepIndexedToy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


ALPHA = 0.01


# 1. Gradients are autograd's.


class _Tied(nn.Module):
    """Two linear layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


class _Attention(nn.Module):
    """Self-attention; its output projection is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs, need_weights=False)[0]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    "linear": (partial(nn.Linear, 5, 4), (3, 5), [4]),
    "conv": (partial(nn.Conv2d, 2, 4, 3), (3, 2, 6, 6), [4]),
    "grouped conv": (partial(nn.Conv2d, 4, 6, 3, groups=2), (3, 4, 6, 6), [6]),
    "transposed": (partial(nn.ConvTranspose2d, 3, 4, 2), (3, 3, 5, 5), [4]),
    "grouped transposed": (partial(nn.ConvTranspose2d, 4, 6, 2, groups=2), (3, 4, 5, 5), [6]),
    "lstm": (partial(nn.LSTM, 4, 3, num_layers=2), (5, 2, 4), [12] * 4),
    "gru": (partial(nn.GRU, 4, 3), (5, 2, 4), [9] * 2),
    "attention": (_Attention, (2, 3, 6), [18, 6]),
    "tied": (_Tied, (3, 5), [5]),
}


def _loss(outputs: Tensor | tuple[Tensor, Any]) -> Tensor:
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    return (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).reshape(outputs.shape)).sum()


class _OneLayer(L.LightningModule):
    """A layer, a batch, and the gradients that its optimizer is given."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer.double()
        self.inputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        self.grads: dict[str, Tensor] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return _loss(self.layer(batch))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.grads = {name: p.grad.clone() for name, p in self.layer.named_parameters() if p.grad is not None}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader([self.inputs], batch_size=None)  # type: ignore[arg-type]


class _DrawThresholds(L.Callback):
    """Thresholds between the weights' magnitudes, before the first forward; their gradients, before the step."""

    def __init__(self, method: DST) -> None:
        self.method = method
        self.thresholds: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}

    def on_train_start(self, *_: Any) -> None:
        generator = torch.Generator().manual_seed(6)
        for weight in self.method.weights:
            thresholds = self.method.thresholds[weight.name]
            thresholds.data.uniform_(-0.1, 0.4, generator=generator)
            self.method.renew(weight)
            weight.apply_()
            self.thresholds[weight.name] = thresholds.detach().clone()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.grads = {name: threshold.grad.clone() for name, threshold in self.method.thresholds.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_autograd_through_masked_layers(layer: str, tmp_path: Path) -> None:
    build, shape, rows = LAYERS[layer]
    torch.manual_seed(4)
    model = _OneLayer(build(), shape)
    dense = copy.deepcopy(model.layer)
    method = DST(alpha=ALPHA)
    draw = _DrawThresholds(method)
    make_trainer(tmp_path, max_steps=1, max_epochs=1, callbacks=[method, draw]).fit(model)
    assert [threshold.numel() for threshold in method.thresholds.values()] == rows
    assert 0.05 < method.registry.sparsity < 0.95

    names = [weight.name.removeprefix("layer.") for weight in method.weights]
    reference = MaskedNetwork(dense, names, ALPHA)
    for own, drawn in zip(reference.thresholds, draw.thresholds.values(), strict=True):
        own.data.copy_(drawn)
    (_loss(reference(model.inputs)) + reference.penalty()).backward()
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(model.grads[name], parameter.grad, rtol=1e-12, atol=1e-12)
    for own, grad in zip(reference.thresholds, draw.grads.values(), strict=True):
        torch.testing.assert_close(grad, own.grad, rtol=1e-12, atol=1e-12)


# 2. Whole trainings are the reference's, step by step.

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
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
    """The toy of masked layers."""


class _Course(L.Callback):
    """What was there after every batch: dense weights, thresholds, masks, and the rest of the parameters."""

    def __init__(self, method: DST | None = None, root: Path | None = None) -> None:
        self.method = method
        self.root = root
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        look = self._ours(pl_module, self.method) if self.method else self._reference(pl_module)
        self.seen.append({key: value.detach().clone() for key, value in look.items()})

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.root is not None:
            torch.save(self.seen, self.root / f"course{trainer.global_rank}.pt")

    @staticmethod
    def _ours(module: Any, method: DST) -> dict[str, Tensor]:
        look = {f"network.{name}": value for name, value in module.network.named_parameters()}
        for weight in method.weights:
            look[weight.name] = method.latent(weight)
            look[f"t {weight.name}"] = method.thresholds[weight.name]
            look[f"m {weight.name}"] = weight.mask
        return look

    @staticmethod
    def _reference(module: Any) -> dict[str, Tensor]:
        masked = module.network
        look = {f"network.{name}": value for name, value in masked.network.named_parameters()}
        for name, mask, thresholds in zip(masked.names, masked.masks().values(), masked.thresholds, strict=True):
            look[f"t network.{name}"] = thresholds
            look[f"m network.{name}"] = mask > 0
        return look


def _assert_same_course(ours: list[dict[str, Tensor]], reference: list[dict[str, Tensor]], tolerance: float) -> None:
    assert len(ours) == len(reference)
    for one, other in zip(ours, reference, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(
                value, other[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )  # type: ignore[misc]
    masks = [look[key] for look in ours for key in look if key.startswith("m ")]
    assert 0.05 < float(torch.cat([mask.flatten() for mask in masks]).double().mean()) < 0.95, (
        "not an interesting course"
    )


def _courses(
    tmp_path: Path, alpha: float = ALPHA, optimizer: str = "sgd", reset: float = 0.99, **trainer: Any
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The course of the callback and that of the reference, over the same batches."""
    factory = OPTIMIZERS[optimizer]
    method = DST(alpha, reset_sparsity=reset)
    ours, reference = _Course(method), _Course()
    settings: dict[str, Any] = {"precision": "64-true", "max_epochs": 4} | trainer
    make_trainer(tmp_path, callbacks=[method, ours], **settings).fit(_Ours(factory))
    make_trainer(tmp_path, callbacks=[reference], **settings).fit(_Reference(alpha, reset, optimizer=factory))
    return ours.seen, reference.seen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2, "max_epochs": 6},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_training_is_that_of_masked_layers_step_by_step(optimizer: str, settings: Any, tmp_path: Path) -> None:
    ours, reference = _courses(tmp_path, optimizer=optimizer, alpha=0.05, **settings)
    _assert_same_course(ours, reference, 1e-12)


@pytest.mark.filterwarnings("ignore:DST. alpha is 0.3")
def test_collapsed_layers_are_reset_as_in_the_authors_layers(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"ha(s|ve) collapsed to sparsity"):
        ours, reference = _courses(tmp_path, alpha=0.3, reset=0.7)
    assert any(float(look["t network.4.weight"].abs().max()) == 0.0 for look in ours)
    _assert_same_course(ours, reference, 1e-12)


def test_steps_that_the_grad_scaler_skips_are_skipped_by_thresholds_too(tmp_path: Path) -> None:
    class Overflow:
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx in (2, 3) else 1.0)  # type: ignore[misc]

    ours, reference = _Course(method := DST(ALPHA)), _Course()
    for callbacks, model in (
        ([method, ours], type("O", (Overflow, _Ours), {})(optimizer=OPTIMIZERS["adamw"])),
        ([reference], type("R", (Overflow, _Reference), {})(ALPHA, optimizer=OPTIMIZERS["adamw"])),
    ):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        make_trainer(tmp_path, plugins=[precision], callbacks=callbacks, max_epochs=3).fit(model)
    assert method.step == 24 - 6
    _assert_same_course(ours.seen, reference.seen, 1e-5)


def test_a_fused_optimizer_under_the_grad_scaler_is_the_plain_one(tmp_path: Path) -> None:
    courses = []
    for fused in (False, True):
        method = DST(ALPHA)
        courses.append(_Course(method))
        model = _Ours(optimizer=partial(OPTIMIZERS["adamw"], fused=fused))
        precision = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
        make_trainer(tmp_path, plugins=[precision], callbacks=[method, courses[-1]], max_epochs=3).fit(model)
    _assert_same_course(courses[1].seen, courses[0].seen, 1e-4)


def test_two_processes_train_as_two_processes_of_masked_layers(tmp_path: Path) -> None:
    method = DST(0.05)
    settings: dict[str, Any] = {"precision": "64-true", "max_epochs": 5}
    model = _Ours(optimizer=OPTIMIZERS["sgd"], batch_size=4)
    fit_two_processes(model, tmp_path, [method, _Course(method, tmp_path)], **settings)
    ours = [torch.load(tmp_path / f"course{rank}.pt") for rank in (0, 1)]
    reference = _Reference(0.05, optimizer=OPTIMIZERS["sgd"], batch_size=4)
    fit_two_processes(reference, tmp_path, [_Course(None, tmp_path)], **settings)
    for rank in (0, 1):
        _assert_same_course(ours[rank], torch.load(tmp_path / f"course{rank}.pt"), 1e-12)


@pytest.mark.parametrize("names", [False, True], ids=["plain", "named parameters"])
def test_optimizers_of_named_parameters_are_twinned(names: bool, tmp_path: Path) -> None:
    class Named(ToyModel):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.named_parameters() if names else self.parameters(), lr=0.01)

    method = DST(0.05)
    path = tmp_path / "named.ckpt"
    trainer = make_trainer(tmp_path, callbacks=[method], max_epochs=1)
    trainer.fit(Named())
    trainer.save_checkpoint(path)
    make_trainer(tmp_path, callbacks=[method := DST(0.05)]).fit(Named(), ckpt_path=path)
    assert method.step == 16
    assert method.registry.sparsity > 0.1


class _Unfreeze(L.Callback):
    """Gives the biases of the last layer to the optimizer in the middle of training, as BackboneFinetuning does."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": [pl_module.network[4].bias], "lr": 0.01})


def test_a_parameter_group_added_while_training_is_no_obstacle(tmp_path: Path) -> None:
    class AllButOneBias(ToyModel):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p is not self.network[4].bias], lr=0.1)

    method = DST(0.05)
    make_trainer(tmp_path, callbacks=[method, _Unfreeze()]).fit(AllButOneBias())
    assert method.step == 16


# 3. Sleep, wake, collapse.


def test_sleeping_weights_keep_their_value_and_wake_with_it(tmp_path: Path) -> None:
    method = DST(0.05)
    course = _Course(method)
    make_trainer(tmp_path, callbacks=[method, course], max_epochs=6).fit(_Ours(optimizer=OPTIMIZERS["adamw"]))
    name, woken = "network.0.weight", 0
    for before, after in zip(course.seen, course.seen[1:], strict=False):
        asleep = ~before[f"m {name}"]
        assert before[name][asleep].count_nonzero() == asleep.sum()
        woken += int((asleep & after[f"m {name}"]).sum())
    assert woken > 0


def test_a_weight_that_takes_no_part_in_the_loss_is_left_alone_but_for_the_regulariser(tmp_path: Path) -> None:
    class Unused(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)

    model = Unused()
    before = model.unused.weight.detach().clone()
    method = DST(0.05)
    make_trainer(tmp_path, callbacks=[method]).fit(model)
    assert torch.equal(method.latent(method.registry["unused.weight"]), before)
    own = torch.zeros(4, requires_grad=True)  # by autograd, as in the authors' code
    optimizer = torch.optim.SGD([own], lr=0.1, momentum=0.9)
    for _ in range(16):
        optimizer.zero_grad()
        (0.05 * torch.exp(-own).sum()).backward()
        optimizer.step()
    torch.testing.assert_close(method.thresholds["unused.weight"].detach(), own.detach())


class _NaN(ToyModel):
    """The loss is NaN at batches 3 and 4."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss * float("nan") if batch_idx in (3, 4) else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_()


def test_a_gradient_of_nan_moves_no_threshold_and_no_mask(tmp_path: Path) -> None:
    method = DST(0.05)
    course = _Course(method)
    make_trainer(tmp_path, callbacks=[method, course], max_epochs=1).fit(_NaN())
    for key, value in course.seen[2].items():
        if key[:2] in ("t ", "m "):
            assert torch.equal(value, course.seen[3][key]), key
            assert torch.equal(value, course.seen[4][key]), key
    assert not torch.equal(course.seen[5]["t network.0.weight"], course.seen[4]["t network.0.weight"])


class _LSTM(ToyModel):
    """An LSTM over the twelve inputs as a sequence of three."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.LSTM(4, 6, batch_first=True)  # type: ignore[assignment]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs.reshape(-1, 3, 4))[0][:, -1, :3]


@pytest.mark.filterwarnings("ignore:DST. alpha is 3")
@pytest.mark.parametrize(("model", "layer"), [(ToyModel, r"network\.\d\.weight"), (_LSTM, r"network\.weight_[ih]h_l0")])
def test_layers_that_collapse_are_reset_told_of_at_the_first_and_the_end_and_counted(
    model: Any, layer: str, tmp_path: Path
) -> None:
    method = DST(3.0, reset_sparsity=0.99)
    trainer = make_trainer(tmp_path, callbacks=[method], max_epochs=4)
    with pytest.warns(UserWarning, match=rf"DST: {layer}.* ha(s|ve) collapsed .* (at|by) step \d+") as caught:
        trainer.fit(model())
    said = [str(warning.message) for warning in caught if "collapsed" in str(warning.message)]
    assert len(said) <= 2
    warned = [name for line in said for name in re.findall(layer, line)]
    assert sorted(warned) == sorted(name for name, resets in method.resets.items() if resets)
    assert sum(method.resets.values()) > len(warned)
    assert trainer.callback_metrics["masks/threshold_resets"] == sum(method.resets.values())
    assert all(weight.sparsity < 0.99 for weight in method.weights)


@pytest.mark.filterwarnings("ignore:DST. alpha is 3")
@pytest.mark.filterwarnings(r"ignore:DST at step \d+. network\.weight_.* no active weight left")
def test_recurrent_layers_have_no_guard_unless_one_is_asked_for(tmp_path: Path) -> None:
    method = DST(3.0)
    make_trainer(tmp_path, callbacks=[method], max_epochs=4).fit(_LSTM())
    assert sum(method.resets.values()) == 0
    assert all(weight.sparsity > 0.99 for weight in method.weights)


class _LoRA(nn.Module):
    """A frozen linear layer with a low-rank adapter, B of which begins at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a, self.b = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.b(self.a(inputs))


class _Adapted(ToyModel):
    @staticmethod
    def build() -> nn.Sequential:
        return nn.Sequential(_LoRA(12, 16), nn.ReLU(), _LoRA(16, 3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_layer_that_begins_at_zero_is_trained_in_silence(optimizer: str, tmp_path: Path) -> None:
    method = DST(1e-4)
    model = _Adapted(OPTIMIZERS[optimizer])
    make_trainer(tmp_path, callbacks=[method]).fit(model)  # a warning is an error
    for name in ("network.0.b.weight", "network.2.b.weight"):
        assert method.latent(method.registry[name]).count_nonzero() == method.registry[name].numel
        assert method.registry[name].sparsity < 0.9
        assert not method.thresholds[name].isnan().any()


def test_thresholds_of_a_layer_of_zeros_wait_for_its_first_gradient(tmp_path: Path) -> None:
    class Unused(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)
            nn.init.zeros_(self.unused.weight)

    path = tmp_path / "zeros.ckpt"
    trainer = make_trainer(tmp_path, callbacks=[DST(0.05)], max_epochs=1)
    trainer.fit(Unused())
    trainer.save_checkpoint(path)
    method = DST(0.05)
    make_trainer(tmp_path, callbacks=[method]).fit(Unused(), ckpt_path=path)
    assert float(method.thresholds["unused.weight"].detach().abs().max()) < 1e-30
    assert method.registry["unused.weight"].sparsity == 0.0


def zeroed(share: float) -> ToyModel:
    """The toy whose second layer has that share of zeros."""
    model = ToyModel()
    weight = model.get_parameter("network.2.weight").data.view(-1)
    weight[: round(share * len(weight))] = 0.0
    return model


def test_a_layer_of_zeros_is_not_said_to_have_collapsed(tmp_path: Path) -> None:
    sentence = r"0\.9922 of network\.2\.weight is zero already.* a lower alpha does not help"
    with pytest.warns(UserWarning, match=sentence) as caught:
        make_trainer(tmp_path, callbacks=[DST(1e-4)]).fit(zeroed(127 / 128))
    assert len([warning for warning in caught if "DST: " in str(warning.message)]) == 1


@pytest.mark.filterwarnings("ignore:DST. alpha is 3")
@pytest.mark.filterwarnings("ignore:.* no active weight left")
def test_no_layer_is_reset_when_the_guard_is_off(tmp_path: Path) -> None:
    method = DST(3.0, reset_sparsity=1.1)
    make_trainer(tmp_path, callbacks=[method]).fit(ToyModel())
    assert sum(method.resets.values()) == 0
    assert method.registry.sparsity == 1.0


@pytest.mark.filterwarnings("ignore:DST. alpha is 3")
@pytest.mark.filterwarnings("ignore:.* no active weight left")
def test_evaluation_never_resets(tmp_path: Path) -> None:
    method = DST(3.0, reset_sparsity=1.1)
    trainer = make_trainer(tmp_path, callbacks=[method])
    trainer.fit(model := ToyModel())
    method.reset_sparsity = 0.99
    before = {name: thresholds.detach().clone() for name, thresholds in method.thresholds.items()}
    trainer.validate(model, verbose=False)
    assert all(torch.equal(thresholds, before[name]) for name, thresholds in method.thresholds.items())
    assert sum(method.resets.values()) == 0


# 4. What cannot be is refused.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give one of them"),
        ({"alpha": 1e-3, "sparsity": 0.9}, "give one of them"),
        ({"alpha": -1e-3}, "alpha is -0.001"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"sparsity": 1.0}, r"sparsity is 1, .*\[0, 1\)"),
        ({"sparsity": 95}, r"Did you mean 0\.95"),
        ({"sparsity": -0.1}, r"sparsity is -0\.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"alpha": 1e-3, "reset_sparsity": 0.0}, "reset_sparsity is 0"),
        ({"alpha": 1e-3, "reset_sparsity": float("nan")}, "reset_sparsity is nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DST(**arguments)


@pytest.mark.parametrize(
    ("alpha", "sentence"),
    [
        (0.95, r"alpha is 0\.95; the authors use 5e-4\. For a sparsity, DST\(sparsity=0\.95\)\.$"),
        (3.0, r"alpha is 3; the authors use 5e-4\.$"),
    ],
)
def test_an_alpha_that_looks_like_a_sparsity_is_named(alpha: float, sentence: str) -> None:
    with pytest.warns(UserWarning, match=sentence):
        DST(alpha)


@pytest.mark.parametrize("alpha", [0.0, 5e-4, 0.1])
def test_other_alphas_are_not(alpha: float) -> None:
    assert DST(alpha).alpha == alpha


def test_steering_towards_an_end_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no known end.*max_steps, or give alpha"):
        make_trainer(tmp_path, max_epochs=-1, callbacks=[DST(sparsity=0.9)]).fit(ToyModel())


def _forget_asleep(state: dict[str, Any]) -> None:
    state["method"]["asleep"].popitem()


def _forget_all_asleep(state: dict[str, Any]) -> None:
    del state["method"]["asleep"]


def _cut_asleep(state: dict[str, Any]) -> None:
    state["method"]["asleep"]["network.0.weight"] = state["method"]["asleep"]["network.0.weight"][:-1]


def _forget_threshold(state: dict[str, Any]) -> None:
    state["method"]["learned"].popitem()


def _forget_thresholds(state: dict[str, Any]) -> None:
    del state["method"]["learned"]


def _cut_thresholds(state: dict[str, Any]) -> None:
    thresholds = state["method"]["learned"]
    thresholds["network.0.weight"] = thresholds["network.0.weight"][:1]


def _forget_moments(state: dict[str, Any]) -> None:
    state["method"]["twins"].pop()


@pytest.mark.parametrize(
    "damage",
    [
        _forget_asleep,
        _forget_all_asleep,
        _cut_asleep,
        _forget_threshold,
        _forget_thresholds,
        _cut_thresholds,
        _forget_moments,
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_of_it_is_taken(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "damaged.ckpt"
    trainer = make_trainer(tmp_path, callbacks=[DST(0.05)], max_epochs=1)
    trainer.fit(ToyModel())
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    damage(next(iter(checkpoint["callbacks"].values())))
    torch.save(checkpoint, path)
    method = DST(0.05)
    with pytest.raises(MisconfigurationException, match="earlier"):
        make_trainer(tmp_path, callbacks=[method]).fit(ToyModel(), ckpt_path=path)
    assert not method.groups
    make_trainer(tmp_path, callbacks=[method], max_epochs=1).fit(ToyModel())
    assert method.step == 8


# 6. Memory.


def _bytes_held(method: DST) -> int:
    weights = method.weights
    held = [method.latent(weight) for weight in weights] + [weight.mask for weight in weights]
    held += list(method.thresholds.values())
    held += [
        value
        for optimizer in method._kept.twins.values()
        for state in optimizer.state.values()
        for value in state.values()
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in held if isinstance(tensor, Tensor))


def test_a_dense_copy_and_a_mask_are_what_is_held_between_steps(tmp_path: Path) -> None:
    class Wide(ToyModel):
        @staticmethod
        def build() -> nn.Sequential:
            return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    method = DST(0.01)
    make_trainer(tmp_path, callbacks=[method]).fit(Wide())
    assert _bytes_held(method) / method.registry.numel <= 6.1
    assert all(threshold.grad is None for threshold in method.thresholds.values())


def test_a_new_fit_lets_go_of_everything_of_the_last(tmp_path: Path) -> None:
    method = DST(0.01)
    make_trainer(tmp_path, callbacks=[method]).fit(model := ToyModel())
    held = [
        weakref.ref(value)
        for value in (model, method.latent(method.weights[0]), next(iter(method._kept.twins.values())))
    ]
    held += [weakref.ref(value) for value in (*method.thresholds.values(), method.weights[0].parameter)]
    del model
    make_trainer(tmp_path, callbacks=[method]).fit(ToyModel())
    gc.collect()
    assert [reference() is None for reference in held] == [True] * len(held)


def test_training_that_misses_its_sparsity_says_so(tmp_path: Path) -> None:
    model = ToyModel(partial(torch.optim.SGD, lr=1e-5))
    with pytest.warns(UserWarning, match=r"DST: training ended at sparsity 0\.\d+ instead of 0\.9"):
        make_trainer(tmp_path, callbacks=[DST(sparsity=0.9)]).fit(model)
