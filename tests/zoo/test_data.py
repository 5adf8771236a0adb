from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torchvision.datasets import MNIST

from lightning_sparse.zoo import (
    Classifier,
    DigitsDataModule,
    LeNet300100,
    MissingDataError,
    MNISTDataModule,
    TensorImages,
)
from tests.helpers import make_trainer
from tests.zoo.idx_files import NUM_TEST, NUM_TRAIN, mnist_tensors, write_mnist

LAYOUTS = pytest.mark.parametrize("folder", [".", "MNIST/raw"], ids=["plain", "torchvision"])
COMPRESSIONS = pytest.mark.parametrize("compressed", [False, True], ids=["uncompressed", "gz"])


@LAYOUTS
@COMPRESSIONS
def test_mnist_is_read_from_either_layout(tmp_path: Path, folder: str, compressed: bool) -> None:
    write_mnist(tmp_path / folder, compressed=compressed)
    data = MNISTDataModule(tmp_path)
    data.prepare_data()
    assert (len(data.train_set), len(data.val_set)) == (NUM_TRAIN, NUM_TEST)
    assert data.train_set.labels.tolist() == mnist_tensors()["train-labels-idx1-ubyte"].tolist()


def test_mnist_pixels_are_scaled_and_standardised(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    images = MNISTDataModule(tmp_path).val_set.images
    pixels = mnist_tensors()["t10k-images-idx3-ubyte"].unsqueeze(1)
    torch.testing.assert_close(images, (pixels / 255 - 0.1307) / 0.3081)


def test_reading_mnist_writes_nothing(tmp_path: Path) -> None:
    write_mnist(tmp_path, compressed=True)
    before = sorted(tmp_path.rglob("*"))
    data = MNISTDataModule(tmp_path, download=True)
    data.prepare_data()
    assert len(data.train_set) == NUM_TRAIN
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_files_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingDataError, match=r"looked in .*raw and in .* for t10k-labels-idx1-ubyte .*download=True"):
        MNISTDataModule(tmp_path).prepare_data()


def test_without_scikit_learn_the_digits_are_missing_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDataError, match=r"scikit-learn, which is not installed: pip install .*\[demo\]"):
        DigitsDataModule().train_dataloader()


def test_missing_files_are_downloaded_if_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST, "download", lambda self: write_mnist(Path(self.raw_folder)))  # pyright: ignore[reportUnknownLambdaType]
    data = MNISTDataModule(tmp_path, download=True)
    data.prepare_data()
    assert len(data.val_set) == NUM_TEST


def test_digits_are_split_by_class() -> None:
    data = DigitsDataModule()
    assert (len(data.train_set), len(data.val_set)) == (1437, 360)
    per_class = data.val_set.labels.bincount()
    assert per_class.min() >= 34
    assert per_class.max() <= 37


def test_training_digits_are_standardised() -> None:
    images = DigitsDataModule().train_set.images
    assert images.shape == (1437, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-5)


def test_the_split_follows_its_own_seed() -> None:
    L.seed_everything(1, verbose=False)
    first = DigitsDataModule().val_set.labels
    L.seed_everything(2, verbose=False)
    assert torch.equal(DigitsDataModule().val_set.labels, first)
    assert not torch.equal(DigitsDataModule(split_seed=1).val_set.labels, first)


def test_an_epoch_shows_every_image_once() -> None:
    data = DigitsDataModule(batch_size=100)
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [100] * 14 + [37]
    shown = torch.cat([images for images, _ in batches]).flatten(1)
    torch.testing.assert_close(shown.unique(dim=0), data.train_set.images.flatten(1).unique(dim=0))


def test_training_order_follows_the_global_seed_and_changes_every_epoch() -> None:
    data = DigitsDataModule()

    def order(seed: int) -> list[torch.Tensor]:
        L.seed_everything(seed, verbose=False)
        loader = data.train_dataloader()
        return [torch.cat([labels for _, labels in loader]) for _ in range(2)]

    first, second = order(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, order(0)[0])
    assert not torch.equal(first, order(1)[0])


class CountImages(L.Callback):
    """Writes to ``root/rank{r}`` how many images a process was trained on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *step: Any) -> None:
        _, (images, _), _ = step
        self.count += len(images)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self.root / f"rank{trainer.global_rank}").write_text(str(self.count))


def test_two_processes_share_the_training_images(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy="ddp_fork", devices=2, max_epochs=1, callbacks=[CountImages(tmp_path)])
    trainer.fit(Classifier(LeNet300100(in_features=64)), datamodule=DigitsDataModule())
    # 1437 is odd, so one image is shown to both
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["719", "719"]


def test_validation_order_is_that_of_the_file() -> None:
    data = DigitsDataModule()
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    assert torch.equal(labels, data.val_set.labels)


def test_a_batch_equals_its_samples_stacked() -> None:
    images = TensorImages(torch.randn(6, 1, 2, 2), torch.arange(6))
    batch = images.__getitems__([4, 0, 5])
    samples = [images[index] for index in (4, 0, 5)]
    assert torch.equal(batch[0], torch.stack([image for image, _ in samples]))
    assert torch.equal(batch[1], torch.stack([label for _, label in samples]))


def test_images_without_labels_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 images and 2 labels"):
        TensorImages(torch.zeros(3, 1, 2, 2), torch.zeros(2))


def test_an_empty_batch_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"batch_size .* at least 1; got 0"):
        DigitsDataModule(batch_size=0)
