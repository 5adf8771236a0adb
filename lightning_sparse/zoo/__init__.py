"""Networks, data modules, one LightningModule and recipes, for examples and comparisons."""

from __future__ import annotations

from lightning_sparse.zoo.cifar import CIFAR10DataModule
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
from lightning_sparse.zoo.resnet import ResNet20, ResNet34, ResNet50
from lightning_sparse.zoo.vgg import VGG16, VGG19
from lightning_sparse.zoo.wide_resnet import WideResNet

__all__ = [
    "VGG16",
    "VGG19",
    "CIFAR10DataModule",
    "Classifier",
    "DigitsDataModule",
    "InMemoryDataModule",
    "LeNet5Caffe",
    "LeNet300100",
    "MNISTDataModule",
    "MissingDataError",
    "ResNet20",
    "ResNet34",
    "ResNet50",
    "RowLSTM",
    "TensorImages",
    "WideResNet",
    "list_recipes",
    "recipe_path",
]
