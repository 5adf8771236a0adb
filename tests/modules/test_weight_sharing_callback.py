from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.testing import assert_close

from lightning_sparse import FGGP, GMP, FixedMask, RigL, SparsityMonitor, WeightSharing, unshare_weights
from lightning_sparse.functional import num_active
from tests.helpers import ToyModel, fit_two_processes, make_trainer
from tests.methods.spies import Kill, KilledError, StepIndexedToy

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.conv2(self.relu(self.norm(self.conv1(inputs))))


class Residual(StepIndexedToy):
    """A stem, a stage of four equal blocks and a classifier on 3 x 2 x 2 images: 4 x 160 + 48 = 688 weights."""

    @staticmethod
    def build() -> nn.Sequential:
        stage = nn.Sequential(*(Block() for _ in range(4)))
        return nn.Sequential(
            nn.Unflatten(1, (3, 2, 2)),
            nn.Conv2d(3, 4, 1, bias=False),
            stage,
            nn.Flatten(),
            nn.Linear(16, 3, bias=False),
        )


DENSE = 12 + 4 * (144 + 16) + 48


def fit(model: Any, root: Path, *callbacks: L.Callback, **overrides: Any) -> Any:
    make_trainer(root, callbacks=list(callbacks), **overrides).fit(model)
    return model


@pytest.mark.parametrize("make", [lambda: GMP(0.8, update_every=2, stop=11), lambda: RigL(0.8, update_every=3)])
@pytest.mark.parametrize("first", [True, False])
def test_as_many_weights_are_stored_as_without_sharing(make: Any, first: bool, tmp_path: Path) -> None:
    method, sharing = make(), WeightSharing()
    model = fit(Residual(), tmp_path, *([sharing, method] if first else [method, sharing]))
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    assert sum(weight.numel() for weight in weights) == DENSE - 2 * 160
    assert sum(int(weight.count_nonzero()) for weight in weights) == method.registry.num_active
    assert method.registry.num_active == num_active(0.8, DENSE)
    assert method.registry.sparsity == pytest.approx(0.8, abs=1 / DENSE)
    assert method.target_sparsity() == 0.8


def test_scalars_are_not_masked_and_have_a_reason(tmp_path: Path) -> None:
    method = FGGP(0.8, update_every=2, stop=11)
    fit(Residual(), tmp_path, WeightSharing(), method)
    reasons = {candidate.name: candidate.reason for candidate in method.dense}
    assert reasons["network.2.3.conv1.scale"] == "auxiliary: added by a callback"
    assert "network.2.1.conv1.weight" in method.registry
    assert "network.2.3.conv1.weight" not in method.registry


def test_a_checkpoint_loads_into_the_plain_module_and_computes_the_same(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[WeightSharing(), FGGP(0.8, update_every=2, stop=11)])
    model: Any = Residual()
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    plain = Residual.load_from_checkpoint(tmp_path / "end.ckpt").eval()
    inputs = torch.randn(5, 12)
    assert_close(plain(inputs), model.eval()(inputs))
    unshare_weights(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(plain(inputs), model(inputs))


@pytest.mark.parametrize("step", [3, 8, 13])
def test_resuming_equals_the_uninterrupted_run(step: int, tmp_path: Path) -> None:
    def callbacks(seed: int = 0) -> list[L.Callback]:
        return [WeightSharing(seed=seed), FGGP(0.8, update_every=2, stop=11)]

    path = tmp_path / "killed.ckpt"
    whole = fit(Residual(), tmp_path, *callbacks())
    with pytest.raises(KilledError):
        fit(Residual(), tmp_path, *callbacks(), Kill(step, path))
    resumed = Residual(seed=7)
    make_trainer(tmp_path, callbacks=callbacks(seed=7)).fit(resumed, ckpt_path=path)
    for (name, value), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_two_processes_agree_and_the_main_one_gets_what_they_learned(tmp_path: Path) -> None:
    model: Any = Residual(batch_size=4)
    make_trainer(
        tmp_path, strategy="ddp_fork", devices=2, callbacks=[WeightSharing(), FGGP(0.8, update_every=2, stop=7)]
    ).fit(model)
    first, second = (model.network[2][block].conv1.weight for block in (1, 3))
    assert int(first.count_nonzero()) == int(second.count_nonzero()) < 144
    both = fit_two_processes(Residual(batch_size=4), tmp_path, [WeightSharing(), FGGP(0.8, update_every=2, stop=7)])
    for name, value in both[0]["weights"].items():
        assert torch.equal(value, both[1]["weights"][name]), name


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights(first: bool, tmp_path: Path) -> None:
    average, sharing = EMAWeightAveraging(decay=0.5), WeightSharing()
    callbacks = [average, sharing] if first else [sharing, average]
    model = fit(Residual(), tmp_path, *callbacks, FGGP(0.8, update_every=2, stop=11))
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    assert sum(int(weight.count_nonzero()) for weight in weights) == num_active(0.8, DENSE)


def test_a_module_without_stages_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"ToyModel has no stage of more than 2 equal blocks.*EAST, sharing=False"):
        fit(ToyModel(), tmp_path, WeightSharing())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("method", [FixedMask(), FGGP(0.9, update_every=1)], ids=["fixed", "fggp"])
def test_going_on_without_it_is_refused_and_told(method: L.Callback, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[WeightSharing(), RigL(0.8, update_every=3)])
    trainer.fit(Residual())
    trainer.save_checkpoint(tmp_path / "shared.ckpt")
    more = make_trainer(tmp_path, callbacks=[method], max_epochs=3)
    with pytest.raises(
        MisconfigurationException, match=r"network\.2\.1\.conv1\.weight, .* Add WeightSharing\(\) to the callb"
    ):
        more.fit(Residual(), ckpt_path=tmp_path / "shared.ckpt")
    more.validate(Residual(), ckpt_path=tmp_path / "shared.ckpt", verbose=False)  # the same network, as a plain one
    make_trainer(tmp_path, callbacks=[WeightSharing(), method], max_epochs=3).fit(
        Residual(), ckpt_path=tmp_path / "shared.ckpt"
    )


def test_an_optimizer_made_of_a_list_of_before_is_refused(tmp_path: Path) -> None:
    class Early(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.mine = list(self.parameters())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.mine, lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"WeightSharing has added at network\.2\.2\.conv1"):
        fit(Early(), tmp_path, WeightSharing())


def test_a_second_fit_goes_on_with_what_is_shared(tmp_path: Path) -> None:
    sharing, model = WeightSharing(), Residual()
    fit(model, tmp_path, sharing)
    scale = model.get_parameter("network.2.2.conv1.scale")
    fit(model, tmp_path, sharing)
    assert model.get_parameter("network.2.2.conv1.scale") is scale


@pytest.mark.parametrize("how", ["validate", "predict"])
def test_a_plain_module_that_is_only_looked_at_stays_plain(how: str, tmp_path: Path) -> None:
    model: Any = Residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(tmp_path, callbacks=[WeightSharing()])
    model.predict_step = lambda batch, batch_idx: model(batch[0])
    trainer.validate(model, verbose=False) if how == "validate" else trainer.predict(model, model.val_dataloader())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_fit_of_a_plain_module_with_shared_weights_goes_on_with_their_scalars(tmp_path: Path) -> None:
    shared: Any = fit(Residual(), tmp_path, WeightSharing(), FGGP(0.8, update_every=2, stop=11))
    plain: Any = Residual(seed=3)
    plain.load_state_dict(shared.state_dict())
    fit(plain, tmp_path, WeightSharing(), max_epochs=0)
    for name, value in shared.named_parameters():
        assert_close(plain.get_parameter(name), value)


def test_the_monitor_counts_the_operations_of_every_use(tmp_path: Path) -> None:
    monitor = SparsityMonitor()
    with pytest.warns(UserWarning, match="no logger"):
        fit(Residual(), tmp_path, WeightSharing(), GMP(0.8, start=0, stop=0), monitor)
    # Of the images of 2 x 2: the stem and four blocks see every pixel, the classifier sees one vector.
    weights = monitor._registry  # pyright: ignore[reportPrivateUsage]
    uses = {name: 1 if "network.2.1." not in name else 3 for name in weights}
    pixels = {name: 1 if name == "network.4.weight" else 4 for name in weights}
    at_work = sum(uses[name] * pixels[name] * weight.num_active for name, weight in weights.items())
    dense = sum(uses[name] * pixels[name] * weight.numel for name, weight in weights.items())
    assert monitor.values["flops/inference"] == pytest.approx(at_work / dense)
