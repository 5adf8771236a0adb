"""CIFAR-10 in memory, as bytes; crops, flips and normalisation are done to whole batches, where the batch is.

References:
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch.nn import functional as F
from typing_extensions import override

from lightning_sparse.zoo.data import InMemoryDataModule, MissingDataError, TensorImages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["CIFAR10DataModule", "crop_and_flip", "random_crop_and_flip", "read_cifar"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of each channel over all training pixels, scaled to [0, 1]
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"
FILES = (*TRAIN_FILES, TEST_FILE)
IMAGES_PER_FILE = 10_000
PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"

_CHANNELS, _SIDE, _NUM_CLASSES = 3, 32, 10
_RECORD = 1 + _CHANNELS * _SIDE * _SIDE


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int = 4) -> Tensor:
    """Surround each image with zeros, cut out a window of its own size, and mirror it if that is wanted.

    Args:
        images: Shape (N, channels, height, width), of any dtype.
        top: Row in the padded image where the window of each image begins, in [0, 2 * padding], shape (N,); with
            ``padding`` the window is the image itself.
        left: Column where it begins, likewise.
        flip: Whether left and right are swapped, ``bool``, shape (N,).
        padding: Pixels of zeros on each side.

    Returns:
        New images of the same shape and dtype.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo.cifar import crop_and_flip
        >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
        >>> down, right = torch.tensor([2]), torch.tensor([1])
        >>> crop_and_flip(image, down, right, torch.tensor([False]), padding=1).tolist()
        [[[[3, 4], [0, 0]]]]
        >>> crop_and_flip(image, down, right, torch.tensor([True]), padding=1).tolist()
        [[[[4, 3], [0, 0]]]]
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, tops, lefts, height, width)
    crops = windows[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(flip[:, None, None, None], crops.flip(3), crops)


def random_crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Crop and flip each image at random: every window of the padded image is as likely, and so is its mirror image.

    The draws come from torch's generator of the device that the images are on, so ``seed_everything`` fixes them.

    Args:
        images: Shape (N, channels, height, width), of any dtype.
        padding: Pixels of zeros on each side of the image before it is cropped.

    Returns:
        New images of the same shape and dtype.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo.cifar import random_crop_and_flip
        >>> random_crop_and_flip(torch.zeros(5, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([5, 3, 32, 32])
    """
    draws = (len(images),)
    top, left = torch.randint(2 * padding + 1, (2, *draws), device=images.device)
    flip = torch.rand(draws, device=images.device) < 0.5
    return crop_and_flip(images, top, left, flip, padding)


@final
class CIFAR10DataModule(InMemoryDataModule):
    """CIFAR-10's 50,000 training images, validated on the 10,000 of its official test set.

    Published results of sparse training on CIFAR-10 are test accuracies, and so are these: report the last epoch, and
    let neither early stopping nor a checkpoint callback choose an epoch by them.

    In memory and in what the data loaders yield, images are uint8 of shape (N, 3, 32, 32). In
    ``on_after_batch_transfer``, so on the device that trains, training batches are augmented as in the papers (four
    pixels of zeros on each side, a random window of 32 x 32, a horizontal flip for every second image, each image by
    itself), and every batch becomes float32, scaled to [0, 1] and standardised with the training set's mean
    (0.4914, 0.4822, 0.4465) and standard deviation (0.2470, 0.2435, 0.2616).

    What is found first in ``root`` is read: torchvision's folder ``cifar-10-batches-py``, or the six files of the
    official binary version, in ``cifar-10-batches-bin`` or in ``root`` itself, each as it is or with ``.xz``. Nothing
    is written unless it is downloaded.

    Args:
        root: Folder to look in.
        download: Fetch the data with torchvision into ``<root>/cifar-10-batches-py`` if it is not there in any form.
        batch_size: Images per batch and process.
        augment: Whether training images are cropped and flipped at random.

    Raises:
        MissingDataError: On use, if a file is not there and ``download`` is off.
        ValueError: On use, if a file is damaged or cut short.

    Example:
        >>> from lightning_sparse.zoo import CIFAR10DataModule
        >>> data = CIFAR10DataModule(root="data", download=True, batch_size=128)

    References:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009
    """

    def __init__(
        self, root: str | Path = "data", download: bool = False, batch_size: int = 64, augment: bool = True
    ) -> None:
        super().__init__(batch_size)
        self.root = Path(root)
        self.download = download
        self.augment = augment

    @override
    def prepare_data(self) -> None:
        """Download what is missing if that is wanted; otherwise say what is missing before training starts."""
        if _has_python_version(self.root):
            return
        if self.download and not all(_find_binary(self.root, name) for name in FILES):
            from torchvision.datasets import CIFAR10

            CIFAR10(self.root, download=True)
        else:
            self._binary_paths()

    @override
    def load(self) -> tuple[TensorImages, TensorImages]:
        """Read the training set and the test set, as bytes."""
        if _has_python_version(self.root):
            return _read_python_version(self.root, train=True), _read_python_version(self.root, train=False)
        *train, test = self._binary_paths()
        return _joined([read_cifar(path) for path in train]), _joined([read_cifar(test)])

    @override
    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment a batch if it is trained on, and standardise it."""
        images, labels = batch
        assert self.trainer is not None  # the caller
        if self.augment and self.trainer.training:
            images = random_crop_and_flip(images)
        mean, std = (255 * torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
        images = images.float().sub_(mean).div_(std)
        # Lightning has converted the batch to the Trainer's precision before this hook, when it was still bytes.
        return self.trainer.precision_plugin.convert_input((images, labels))

    def _binary_paths(self) -> list[Path]:
        found = {name: _find_binary(self.root, name) for name in FILES}
        missing = [f"{name}.bin" for name, path in found.items() if path is None]
        if missing:
            raise MissingDataError(
                f"CIFAR-10 is not complete: looked in {self.root / PYTHON_FOLDER} for the files of torchvision, and in"
                f" {self.root / BINARY_FOLDER} and in {self.root} for {', '.join(missing)} (each may end in .xz). Put"
                f" the files into one of these folders, or let CIFAR10DataModule(root={str(self.root)!r},"
                " download=True) fetch them (on the command line: --data.download=true)."
            )
        return [path for path in found.values() if path is not None]


def read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Read a file of CIFAR-10's binary version, compressed if its name ends in ``.xz``.

    10,000 records of 3,073 bytes: the label, then the red, the green and the blue pixels, each row by row.

    Args:
        path: The file.

    Returns:
        The images, uint8 of shape (10000, 3, 32, 32), and their labels in [0, 9], int64 of shape (10000,).

    Raises:
        ValueError: If the file is damaged, has another length, or holds a label above 9.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_sparse.zoo.cifar import read_cifar
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "test_batch.bin")
        ...     _ = path.write_bytes(bytes(10_000 * 3073))
        ...     images, labels = read_cifar(path)
        >>> images.shape, labels.shape
        (torch.Size([10000, 3, 32, 32]), torch.Size([10000]))
    """
    try:
        data = _read_bytes(path)
        if len(data) != IMAGES_PER_FILE * _RECORD:
            raise ValueError(
                f"it holds {len(data):,} bytes, not {IMAGES_PER_FILE * _RECORD:,} ({IMAGES_PER_FILE:,} images of"
                f" {_RECORD:,} bytes)"
            )
        records = torch.frombuffer(data, dtype=torch.uint8).view(IMAGES_PER_FILE, _RECORD)
        labels = records[:, 0].long()
        if int(labels.max()) >= _NUM_CLASSES:
            row = int((labels >= _NUM_CLASSES).nonzero()[0])
            raise ValueError(f"the label of image {row} is {int(labels[row])}, not one of 0 to {_NUM_CLASSES - 1}")
    except (EOFError, lzma.LZMAError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole file of CIFAR-10's binary version: {error}. Delete it and download it again."
        ) from error
    return records[:, 1:].reshape(-1, _CHANNELS, _SIDE, _SIDE), labels


def _read_bytes(path: Path) -> bytearray:
    if path.suffix == ".xz":
        with lzma.open(path, "rb") as file:
            return bytearray(file.read())
    return bytearray(path.read_bytes())


def _find_binary(root: Path, name: str) -> Path | None:
    """The file of the binary version, compressed or not, or None."""
    folders = (root / BINARY_FOLDER, root)
    candidates = (folder / f"{name}.bin{suffix}" for suffix in ("", ".xz") for folder in folders)
    return next((path for path in candidates if path.is_file()), None)


def _has_python_version(root: Path) -> bool:
    return all((root / PYTHON_FOLDER / name).is_file() for name in (*FILES, "batches.meta"))


def _read_python_version(root: Path, *, train: bool) -> TensorImages:
    """Read torchvision's files, which are pickled; it compares their checksums before it opens them."""
    from torchvision.datasets import CIFAR10

    try:
        images = CIFAR10(root, train=train)
    except RuntimeError as error:
        raise ValueError(
            f"{root / PYTHON_FOLDER} does not hold CIFAR-10 as torchvision knows it: {error}. Delete the folder and"
            f" let CIFAR10DataModule(root={str(root)!r}, download=True) fetch it again."
        ) from error
    pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()  # torchvision has channels last
    return TensorImages(pixels, torch.tensor(images.targets))


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> TensorImages:
    images, labels = zip(*parts, strict=True)
    return TensorImages(torch.cat(images), torch.cat(labels))
