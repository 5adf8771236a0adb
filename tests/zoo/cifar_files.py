"""CIFAR-10 in its published formats, with few images, small enough to write in every test."""

from __future__ import annotations

import lzma
import pickle
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from lightning_sparse.zoo import cifar

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PER_FILE = 16
NUM_TRAIN, NUM_TEST = 5 * PER_FILE, PER_FILE


def expect_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files hold ``PER_FILE`` images, and let torchvision compare no checksums."""
    monkeypatch.setattr(cifar, "IMAGES_PER_FILE", PER_FILE)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name in cifar.TRAIN_FILES])
    monkeypatch.setattr(CIFAR10, "test_list", [[cifar.TEST_FILE, None]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})


def cifar_tensors() -> dict[str, tuple[Tensor, Tensor]]:
    """Make random images, shape (N, 3, 32, 32), and labels under the names of the six files."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randint(256, (PER_FILE, 3, 32, 32), generator=generator, dtype=torch.uint8),
            torch.randint(10, (PER_FILE,), generator=generator),
        )
        for name in cifar.FILES
    }


def train_tensors() -> tuple[Tensor, Tensor]:
    """The images and the labels of the five training files, in order."""
    *train, _ = cifar_tensors().values()
    return torch.cat([images for images, _ in train]), torch.cat([labels for _, labels in train])


def binary_bytes(images: Tensor, labels: Tensor) -> bytes:
    """Encode as the data set's page describes the binary version: label, red plane, green plane, blue plane."""
    planes = images.numpy()
    return b"".join(
        bytes([int(label)]) + b"".join(planes[row, channel].tobytes() for channel in range(3))
        for row, label in enumerate(labels)
    )


def write_binary(folder: Path, *, compressed: bool = False) -> None:
    """Write the six files of the binary version into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in cifar_tensors().items():
        data = binary_bytes(images, labels)
        if compressed:
            (folder / f"{name}.bin.xz").write_bytes(lzma.compress(data, preset=0))
        else:
            (folder / f"{name}.bin").write_bytes(data)


def write_python(folder: Path) -> None:
    """Write the seven pickled files that torchvision reads into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in cifar_tensors().items():
        entry = {"data": images.reshape(PER_FILE, -1).numpy(), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
