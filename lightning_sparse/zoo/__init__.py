"""What examples and comparisons are made of: networks, data modules, one LightningModule, and recipes."""

from __future__ import annotations

from lightning_sparse.zoo.classifier import Classifier
from lightning_sparse.zoo.data import (
    DigitsDataModule,
    InMemoryDataModule,
    MissingDataError,
    MNISTDataModule,
    TensorImages,
)
from lightning_sparse.zoo.networks import LeNet5Caffe, LeNet300100, RowLSTM
from lightning_sparse.zoo.recipes import list_recipes, recipe_path

__all__ = [
    "Classifier",
    "DigitsDataModule",
    "InMemoryDataModule",
    "LeNet5Caffe",
    "LeNet300100",
    "MNISTDataModule",
    "MissingDataError",
    "RowLSTM",
    "TensorImages",
    "list_recipes",
    "recipe_path",
]
