"""Hosts other than ``lightning.pytorch``: the other package of the same Trainer trains alike; Fabric is refused."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lightning as L
import lightning.pytorch
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as l_callbacks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import DST, EAST, GMP, DyReLUPhasing, FixedMask, SparsityMonitor, WeightSharing
from lightning_sparse.testing import Case, ToyModel, random_masks
from tests.methods.cases import CASES

if TYPE_CHECKING:
    from pathlib import Path

# lightning requires it, so it is there; whoever has removed it skips these.
pytorch_lightning = pytest.importorskip("pytorch_lightning")


def toy(package: ModuleType) -> Any:
    """The toy of the tests, as a module of either package."""

    class Toy(package.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.toy = ToyModel()
            self.network = self.toy.network
            self.toy.network = None  # type: ignore[assignment]

        def forward(self, inputs: Tensor) -> Tensor:
            return self.network(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("worse", float(self.current_epoch))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.network.parameters(), lr=0.01)

        def train_dataloader(self) -> DataLoader[Any]:
            return self.toy.train_dataloader()

        def val_dataloader(self) -> DataLoader[Any]:
            return self.toy.val_dataloader()

    return Toy()


def trainer_of(package: ModuleType, root: Path, callbacks: list[Any], **settings: Any) -> Any:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return package.Trainer(callbacks=callbacks, **(quiet | settings))


PACKAGES = [lightning.pytorch, pytorch_lightning]


@pytest.mark.filterwarnings("ignore:DST. training ended at sparsity")  # sixteen steps are few
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "fixedmask"], ids=lambda case: case.name)
def test_every_method_trains_alike(case: Case, tmp_path: Path) -> None:
    """Bit for bit, gradients clipped, with what is logged."""
    ends = []
    for package in PACKAGES:
        method, module = case.make(), toy(package)
        logger = package.loggers.CSVLogger(tmp_path)
        trainer = trainer_of(package, tmp_path, [method, SparsityMonitor()], logger=logger, gradient_clip_val=0.5)
        trainer.fit(module)
        masks = {weight.name: weight.mask for weight in method.weights}
        for weight in method.weights:
            assert weight.value[~weight.mask].count_nonzero() == 0
        ends.append((module.state_dict(), masks, dict(trainer.callback_metrics)))
    (weights, masks, logged), (other_weights, other_masks, other_logged) = ends
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    assert all(torch.equal(mask, other_masks[name]) for name, mask in masks.items())
    assert logged.keys() == other_logged.keys()


def test_it_is_killed_resumed_and_fine_tuned(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    package: Any = pytorch_lightning
    trainer = trainer_of(package, tmp_path, [GMP(0.8, update_every=2, stop=11)])
    trainer.fit(toy(package))
    trainer.save_checkpoint(path)
    resumed = GMP(0.8, update_every=2, stop=11)
    trainer_of(package, tmp_path, [resumed], max_epochs=3).fit(toy(package), ckpt_path=path)
    assert (resumed.step, resumed.registry.sparsity) == (24, pytest.approx(0.8, abs=0.01))
    fixed = FixedMask(path)
    trainer_of(package, tmp_path, [fixed]).fit(toy(package))
    assert fixed.registry.sparsity == resumed.registry.sparsity


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_averages_come_before_and_after_what_changes_the_module(package: Any, tmp_path: Path) -> None:
    for average in (package.callbacks.EMAWeightAveraging(), package.callbacks.StochasticWeightAveraging(0.01)):
        for callbacks in ([average, GMP(0.8)], [GMP(0.8), average]):
            module = toy(package)
            trainer_of(package, tmp_path, callbacks).fit(module)
            zeros = sum(int((m.weight == 0).sum()) for m in module.network if isinstance(m, nn.Linear))
            assert zeros >= 0.79 * 344
    east = EAST(sparsity=0.8, sharing=False)
    trainer_of(package, tmp_path, [package.callbacks.EMAWeightAveraging(), east], max_epochs=4).fit(toy(package))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_denser_best_checkpoint_is_told(package: Any, tmp_path: Path) -> None:
    best = package.callbacks.ModelCheckpoint(dirpath=tmp_path, monitor="worse")
    trainer = trainer_of(package, tmp_path, [GMP(0.9), best], max_epochs=6, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="the best checkpoint by worse"):
        trainer.fit(toy(package))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_what_one_package_refuses_the_other_does(package: Any, tmp_path: Path) -> None:
    class Nested(type(toy(package))):  # type: ignore[misc]
        def on_train_epoch_start(self) -> None:
            trainer_of(package, tmp_path, [method]).fit(toy(package))

    method = GMP(0.8)
    with pytest.raises(Exception, match="in the middle of a training by another Trainer"):
        trainer_of(package, tmp_path, [method]).fit(Nested())


# Fabric.


@pytest.mark.parametrize(
    "make",
    [
        lambda: GMP(0.8),
        lambda: DST(0.03),
        lambda: FixedMask(random_masks(ToyModel())),
        SparsityMonitor,
        DyReLUPhasing,
        WeightSharing,
    ],
    ids=["gmp", "dst", "fixedmask", "monitor", "phasing", "sharing"],
)
def test_fabric_is_refused_in_words(make: Any) -> None:
    callback = make()
    sentence = rf"{type(callback).__name__} is a callback of Lightning's Trainer, and Fabric .*L\.Trainer.*prune"
    model = nn.Linear(4, 2)
    with pytest.raises(MisconfigurationException, match=sentence):
        L.Fabric(accelerator="cpu", devices=1, callbacks=[callback]).setup(model)
    fabric = L.Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    module = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.backward(module(torch.randn(2, 4)).sum())
    with pytest.raises(MisconfigurationException, match=sentence):
        optimizer.step()


# Detectors of torchvision, which have no forward of their module's and compute losses in training mode alone.


def test_east_phases_a_detector(tmp_path: Path) -> None:
    torchvision: Any = pytest.importorskip("torchvision.models.detection")

    class Detector(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1), nn.ReLU())
            backbone.out_channels = 8
            anchors = torchvision.anchor_utils.AnchorGenerator(((16,),), ((1.0,),))
            self.detector = torchvision.FasterRCNN(
                backbone,
                num_classes=None,
                rpn_anchor_generator=anchors,
                box_roi_pool=torchvision.faster_rcnn.MultiScaleRoIAlign(["0"], 2, 1),
                box_head=torchvision.faster_rcnn.TwoMLPHead(8 * 4, 8),
                box_predictor=torchvision.faster_rcnn.FastRCNNPredictor(8, 2),
                min_size=32,
                max_size=32,
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            boxes = torch.tensor([[2.0, 2.0, 20.0, 20.0]])
            targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in batch[0]]
            losses: dict[str, Tensor] = self.detector(list(batch[0]), targets)
            return torch.stack(list(losses.values())).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(torch.randn(8, 3, 32, 32)), batch_size=2)

    east, model = EAST(sparsity=0.5, sharing=False), Detector()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_of(lightning.pytorch, tmp_path, [east]).fit(model)
    assert east.registry.sparsity == pytest.approx(0.5, abs=0.01)


def test_both_packages_have_callbacks_of_their_own() -> None:
    assert not issubclass(pytorch_lightning.callbacks.ModelCheckpoint, l_callbacks.ModelCheckpoint)
