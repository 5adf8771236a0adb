"""Data modules that keep a whole small data set in memory, so that a batch costs one tensor index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_sparse.zoo.idx import find_idx, read_idx

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["DigitsDataModule", "InMemoryDataModule", "MNISTDataModule", "MissingDataError", "TensorImages"]

MNIST_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of all training pixels, scaled to [0, 1]


class MissingDataError(FileNotFoundError):
    """A data set was not found; the message says how to get it."""


@final
class TensorImages(Dataset["tuple[Tensor, Tensor]"]):
    """Images and their labels in two tensors; a batch is one index of each.

    :class:`torch.utils.data.TensorDataset` fetches sample by sample and stacks them. Here ``__getitems__``, which
    :class:`~torch.utils.data.DataLoader` prefers where it exists, takes the whole batch at once, so there is nothing to
    collate. Samplers work as with any map-style data set, those that Lightning puts in for several processes too.

    Args:
        images: One image per row.
        labels: One class index per image.

    Raises:
        ValueError: If the numbers of labels and images differ.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo import TensorImages
        >>> images, labels = TensorImages(torch.zeros(4, 1, 8, 8), torch.arange(4)).__getitems__([3, 1])
        >>> images.shape, labels
        (torch.Size([2, 1, 8, 8]), tensor([3, 1]))
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(images) != len(labels):
            raise ValueError(f"Got {len(images)} images and {len(labels)} labels; every image needs one label.")
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        return self.images[rows], self.labels[rows]


class InMemoryDataModule(L.LightningDataModule, ABC):
    """A training and a validation set in memory; subclasses say where they come from.

    The order of the training images comes from torch's global generator, so ``seed_everything`` fixes it. ``test`` and
    ``predict`` run over the validation set: there is no third set, and nothing is selected on this one.

    Args:
        batch_size: Images per batch and process.

    Raises:
        ValueError: If the batch size is below 1.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is the number of images in a batch, at least 1; got {batch_size}.")
        self.batch_size = batch_size
        self._sets: tuple[TensorImages, TensorImages] | None = None

    @abstractmethod
    def load(self) -> tuple[TensorImages, TensorImages]:
        """Read the training set and the validation set."""

    @property
    def train_set(self) -> TensorImages:
        """The training set, read on first use."""
        return self._loaded()[0]

    @property
    def val_set(self) -> TensorImages:
        """The validation set, read on first use."""
        return self._loaded()[1]

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of the training set in a new order every epoch; the last may be smaller."""
        return self._batches(self.train_set, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of the validation set in order."""
        return self._batches(self.val_set, shuffle=False)

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The same as validation."""
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The same as validation."""
        return self.val_dataloader()

    def _loaded(self) -> tuple[TensorImages, TensorImages]:
        if self._sets is None:
            self._sets = self.load()
        return self._sets

    def _batches(self, images: TensorImages, *, shuffle: bool) -> DataLoader[tuple[Tensor, Tensor]]:
        # no workers: to hand a batch to another process takes longer than to index it
        return DataLoader(images, batch_size=self.batch_size, shuffle=shuffle, collate_fn=_as_it_is)


@final
class DigitsDataModule(InMemoryDataModule):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: real data that needs no download.

    360 images, a fifth of each class, are kept for validation. Images are float32 of shape (N, 1, 8, 8), standardised
    with the mean and the standard deviation of all training pixels.

    Args:
        batch_size: Images per batch and process.
        split_seed: Which images are kept for validation. It does not follow ``seed_everything``: runs with different
            seeds are validated on the same images.

    Raises:
        MissingDataError: On use, if scikit-learn is not installed.

    Example:
        >>> from lightning_sparse.zoo import DigitsDataModule
        >>> images, labels = next(iter(DigitsDataModule(batch_size=32).train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))

    References:
        Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository 1998
    """

    def __init__(self, batch_size: int = 64, split_seed: int = 0) -> None:
        super().__init__(batch_size)
        self.split_seed = split_seed

    @override
    def load(self) -> tuple[TensorImages, TensorImages]:
        """Split and standardise the digits that scikit-learn ships."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise MissingDataError(
                "The digits come with scikit-learn, which is not installed: pip install 'lightning-sparse[demo]', or"
                " pip install scikit-learn."
            ) from error

        pixels, classes = load_digits(return_X_y=True)
        train, val = train_test_split(
            torch.arange(len(classes)).numpy(),
            test_size=0.2,
            stratify=classes,
            random_state=self.split_seed,
        )
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)
        images = (images - images[train].mean()) / images[train].std()
        labels = torch.from_numpy(classes).long()
        return TensorImages(images[train], labels[train]), TensorImages(images[val], labels[val])


@final
class MNISTDataModule(InMemoryDataModule):
    """MNIST's 60,000 training images, validated on the 10,000 of its official test set.

    Published results of sparse training on MNIST are test accuracies, and so are these: report the last epoch, and let
    neither early stopping nor a checkpoint callback choose an epoch by them. Images are float32 of shape
    (N, 1, 28, 28), scaled to [0, 1] and standardised with the training set's mean 0.1307 and standard deviation 0.3081.

    The four IDX files, each as it is or with ``.gz``, may lie in ``<root>/MNIST/raw``, where torchvision puts them, or
    in ``root`` itself. Nothing is written unless it is downloaded.

    Args:
        root: Folder to look in.
        download: Fetch the files with torchvision into ``<root>/MNIST/raw`` if they are not there.
        batch_size: Images per batch and process.
        standardize: Whether pixels have mean 0 and standard deviation 1; otherwise they stay in [0, 1], as in the code
            of DST.

    Raises:
        MissingDataError: On use, if a file is not there and ``download`` is off.

    Example:
        >>> from lightning_sparse.zoo import MNISTDataModule
        >>> data = MNISTDataModule(root="data", download=True)

    References:
        LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE 1998
    """

    def __init__(
        self, root: str | Path = "data", download: bool = False, batch_size: int = 64, standardize: bool = True
    ) -> None:
        super().__init__(batch_size)
        self.root = Path(root)
        self.download = download
        self.standardize = standardize

    @override
    def prepare_data(self) -> None:
        """Download what is missing if that is wanted; otherwise say what is missing before training starts."""
        if self.download and not all(find_idx(self.root, name) for name in MNIST_FILES):
            from torchvision.datasets import MNIST

            MNIST(self.root, download=True)
        self._paths()

    @override
    def load(self) -> tuple[TensorImages, TensorImages]:
        """Read and standardise the four files."""
        train_images, train_labels, test_images, test_labels = (read_idx(path) for path in self._paths())
        mean, std = (MNIST_MEAN, MNIST_STD) if self.standardize else (0.0, 1.0)
        return _scaled(train_images, train_labels, mean, std), _scaled(test_images, test_labels, mean, std)

    def _paths(self) -> list[Path]:
        found = {name: find_idx(self.root, name) for name in MNIST_FILES}
        missing = [name for name, path in found.items() if path is None]
        if missing:
            raise MissingDataError(
                f"MNIST is not complete: looked in {self.root / 'MNIST' / 'raw'} and in {self.root} for "
                f"{', '.join(missing)} (each may end in .gz). Put the files into one of these folders, or let "
                f"MNISTDataModule(root={str(self.root)!r}, download=True) fetch them (on the command line: "
                "--data.download=true)."
            )
        return [path for path in found.values() if path is not None]


def _as_it_is(batch: Any) -> Any:
    """Collate nothing: ``__getitems__`` made the batch."""
    return batch


def _scaled(pixels: Tensor, labels: Tensor, mean: float, std: float) -> TensorImages:
    images = pixels.unsqueeze(1).float().div_(255).sub_(mean).div_(std)
    return TensorImages(images, labels.long())
