from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

from lightning_sparse.zoo import CIFAR10DataModule, Classifier, MissingDataError
from lightning_sparse.zoo.cifar import crop_and_flip, random_crop_and_flip, read_cifar
from tests.helpers import make_trainer
from tests.zoo.cifar_files import (
    NUM_TEST,
    NUM_TRAIN,
    PER_FILE,
    binary_bytes,
    cifar_tensors,
    expect_small_files,
    train_tensors,
    write_binary,
    write_python,
)

PYTHON, BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_small_files(monkeypatch)


def write(root: Path, layout: str) -> None:
    folder, _, suffix = layout.partition("+")
    if folder == PYTHON:
        write_python(root / folder)
    else:
        write_binary(root / folder, compressed=suffix == "xz")


@pytest.mark.parametrize("layout", [PYTHON, BINARY, ".", f"{BINARY}+xz", ".+xz"])
def test_every_layout_is_read_in_order(tmp_path: Path, layout: str) -> None:
    write(tmp_path, layout)
    data = CIFAR10DataModule(tmp_path)
    data.prepare_data()
    torch.testing.assert_close((data.train_set.images, data.train_set.labels), train_tensors())
    torch.testing.assert_close((data.val_set.images, data.val_set.labels), cifar_tensors()["test_batch"])


def labelled_zero(root: Path, layout: str) -> None:
    """Write a layout, and then label 0 throughout, so that it can be told from the others."""
    write(root, layout)
    for path in (root / layout.partition("+")[0]).glob("*.bin*"):
        data = binary_bytes(torch.zeros(PER_FILE, 3, 32, 32, dtype=torch.uint8), torch.zeros(PER_FILE))
        if path.suffix == ".xz":
            path.write_bytes(lzma.compress(data))
        elif path.suffix == ".bin":
            path.write_bytes(data)


@pytest.mark.parametrize(
    ("first", "second"), [(PYTHON, BINARY), (PYTHON, ".+xz"), (BINARY, f"{BINARY}+xz"), (".", f"{BINARY}+xz")]
)
def test_the_layouts_are_looked_for_in_the_stated_order(tmp_path: Path, first: str, second: str) -> None:
    labelled_zero(tmp_path, second)
    write(tmp_path, first)
    assert CIFAR10DataModule(tmp_path).train_set.labels.tolist() == train_tensors()[1].tolist()


def test_images_stay_bytes_in_memory(tmp_path: Path) -> None:
    write_binary(tmp_path)
    images, labels = next(iter(CIFAR10DataModule(tmp_path, batch_size=8).train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((8, 3, 32, 32), torch.uint8, torch.int64)


def test_reading_writes_nothing(tmp_path: Path) -> None:
    write_binary(tmp_path, compressed=True)
    before = sorted(tmp_path.rglob("*"))
    data = CIFAR10DataModule(tmp_path, download=True)
    data.prepare_data()
    assert len(data.train_set) == NUM_TRAIN
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_files_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    write_binary(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(
        MissingDataError, match=r"batches-py for .*batches-bin and in .* for data_batch_3.bin \(.*download=True"
    ):
        CIFAR10DataModule(tmp_path).prepare_data()


def test_missing_files_are_downloaded_if_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "download", lambda self: write_python(Path(self.root) / PYTHON))  # pyright: ignore[reportUnknownLambdaType]
    data = CIFAR10DataModule(tmp_path, download=True)
    data.prepare_data()
    assert len(data.val_set) == NUM_TEST


def test_an_incomplete_download_of_torchvision_is_no_data(tmp_path: Path) -> None:
    write_python(tmp_path / PYTHON)
    (tmp_path / PYTHON / "batches.meta").unlink()
    with pytest.raises(MissingDataError, match="CIFAR-10 is not complete"):
        CIFAR10DataModule(tmp_path).prepare_data()


def test_torchvisions_files_with_another_checksum_are_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_python(tmp_path / PYTHON)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", "40351d587109b95175f43aff81a1287e"]])
    with pytest.raises(ValueError, match=r"batches-py does not hold CIFAR-10 .* Delete the folder"):
        _ = CIFAR10DataModule(tmp_path).train_set


WHOLE = binary_bytes(*cifar_tensors()["test_batch"])


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (b"", "it holds 0 bytes"),
        (WHOLE[:-1], f"it holds {len(WHOLE) - 1:,} bytes, not {len(WHOLE):,}"),
        (WHOLE[:-3073], "bytes, not"),
        (WHOLE + b"\0", "bytes, not"),
        (WHOLE[:3073] + b"\x0a" + WHOLE[3074:], "the label of image 1 is 10, not one of 0 to 9"),
    ],
    ids=["empty", "cut", "one image short", "too long", "label"],
)
@pytest.mark.parametrize("name", ["data_batch_1.bin", "data_batch_1.bin.xz"])
def test_damaged_files_are_named_in_the_error(tmp_path: Path, name: str, damaged: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(lzma.compress(damaged) if name.endswith("xz") else damaged)
    with pytest.raises(ValueError, match=rf"{name} is not a whole file .*{reason}.* download it again"):
        read_cifar(path)


@pytest.mark.parametrize("damaged", [lzma.compress(WHOLE)[:-20], WHOLE, b""], ids=["cut", "not compressed", "empty"])
def test_damaged_compression_is_named_in_the_error(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "test_batch.bin.xz"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"test_batch\.bin\.xz is not a whole file .* download it again"):
        read_cifar(path)


def slow_crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Pixel by pixel: which one of the original image is seen there, if any."""
    result = torch.zeros_like(images)
    height, width = images.shape[2:]
    for n in range(len(images)):
        for row in range(height):
            for column in range(width):
                y = row + int(top[n]) - padding
                x = (width - 1 - column if flip[n] else column) + int(left[n]) - padding
                if 0 <= y < height and 0 <= x < width:
                    result[n, :, row, column] = images[n, :, y, x]
    return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("height", "width", "padding"), [(5, 5, 2), (4, 7, 4), (6, 3, 0)])
def test_crops_and_flips_equal_those_made_pixel_by_pixel(
    dtype: torch.dtype, height: int, width: int, padding: int
) -> None:
    generator = torch.Generator().manual_seed(height)
    images = torch.randint(1, 256, (20, 3, height, width), generator=generator).to(dtype)
    top, left = torch.randint(2 * padding + 1, (2, 20), generator=generator)
    flip = torch.rand(20, generator=generator) < 0.5
    expected = slow_crop_and_flip(images, top, left, flip, padding)
    torch.testing.assert_close(crop_and_flip(images, top, left, flip, padding), expected)


def test_every_window_and_its_mirror_image_is_as_likely() -> None:
    torch.manual_seed(0)
    image = torch.arange(1, 65).reshape(1, 1, 8, 8)
    crops = random_crop_and_flip(image.expand(16_200, -1, -1, -1)).flatten(1)
    _, counts = crops.unique(dim=0, return_counts=True)
    assert len(counts) == 9 * 9 * 2
    assert counts.min() > 50  # 100 on average, with a standard deviation of 10
    assert counts.max() < 150


class KeepBatches(L.Callback):
    """Keeps the images that the module sees."""

    def __init__(self) -> None:
        self.train: list[Tensor] = []
        self.val: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *step: Any) -> None:
        self.train.append(step[1][0])

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *step: Any) -> None:
        self.val.append(step[1][0])


def linear_model() -> Classifier:
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)))


def seen(root: Path, *, seed: int = 0, augment: bool = True, **settings: Any) -> KeepBatches:
    """Train one epoch, and return what was trained and validated on."""
    batches = KeepBatches()
    L.seed_everything(seed, verbose=False)
    data = CIFAR10DataModule(root, batch_size=20, augment=augment)
    make_trainer(root, callbacks=[batches], **({"max_epochs": 1} | settings)).fit(linear_model(), data)
    return batches


def standardised(images: Tensor) -> Tensor:
    return (images / 255 - MEAN) / STD


def test_validation_sees_the_standardised_images(tmp_path: Path) -> None:
    write_binary(tmp_path)
    batches = seen(tmp_path, num_sanity_val_steps=0)
    torch.testing.assert_close(torch.cat(batches.val), standardised(cifar_tensors()["test_batch"][0]))


def by_sum(images: Tensor) -> Tensor:
    return images[images.sum((1, 2, 3)).argsort()]


def test_without_augmentation_training_sees_the_standardised_images(tmp_path: Path) -> None:
    write_binary(tmp_path)
    images = torch.cat(seen(tmp_path, augment=False).train)
    torch.testing.assert_close(by_sum(images), by_sum(standardised(train_tensors()[0])))


def test_training_images_are_cropped_each_by_itself_before_they_are_standardised(tmp_path: Path) -> None:
    write_binary(tmp_path)
    black = (standardised(torch.zeros(1, 3, 1, 1)) - torch.cat(seen(tmp_path).train)).abs().amax(1) < 1e-6
    padded_rows = black[:, :, 8:24].all(2).sum(1)  # random pixels are hardly ever black in all three channels
    assert set(padded_rows.tolist()) == {0, 1, 2, 3, 4}


def test_augmentation_follows_the_global_seed(tmp_path: Path) -> None:
    write_binary(tmp_path)
    first, again, other = (torch.cat(seen(tmp_path, seed=seed).train) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_epoch_is_augmented_anew(tmp_path: Path) -> None:
    write_binary(tmp_path)
    batches = seen(tmp_path, max_epochs=2).train
    first, second = torch.cat(batches[:4]), torch.cat(batches[4:])
    known = {tuple(image.flatten()[::97].tolist()) for image in first}
    assert sum(tuple(image.flatten()[::97].tolist()) in known for image in second) < 10


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_images_have_the_precision_of_the_trainer(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    write_binary(tmp_path)
    assert seen(tmp_path, precision=precision, limit_train_batches=1).train[0].dtype == dtype


class CountImages(L.Callback):
    """Writes to ``root/rank{r}`` how many images a process was trained on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *step: Any) -> None:
        _, (images, _), _ = step
        assert images.is_floating_point()
        self.count += len(images)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self.root / f"rank{trainer.global_rank}").write_text(str(self.count))


def test_two_processes_share_the_training_images(tmp_path: Path) -> None:
    write_binary(tmp_path)
    trainer = make_trainer(tmp_path, strategy="ddp_fork", devices=2, max_epochs=1, callbacks=[CountImages(tmp_path)])
    trainer.fit(linear_model(), datamodule=CIFAR10DataModule(tmp_path, batch_size=8))
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [str(NUM_TRAIN // 2)] * 2
