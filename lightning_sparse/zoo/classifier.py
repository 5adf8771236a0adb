"""One LightningModule for every classification network of the zoo, with nothing sparse in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torchmetrics import Metric

__all__ = ["Classifier", "sgd"]


def sgd(params: Iterable[nn.Parameter], lr: float = 0.01, momentum: float = 0.9) -> torch.optim.SGD:
    """Make SGD with momentum, as DST trains the LeNets.

    A function with a name, so that a saved configuration can tell it and a process that is spawned can import it.

    Example:
        >>> import torch
        >>> from lightning_sparse.zoo.classifier import sgd
        >>> sgd([torch.nn.Parameter(torch.zeros(2))]).defaults["momentum"]
        0.9
    """
    return torch.optim.SGD(params, lr=lr, momentum=momentum)


@final
class Classifier(L.LightningModule):
    """Trains a network to classify with cross entropy.

    It logs once per epoch ``train_loss``, ``train_accuracy``, ``val_loss`` and ``val_accuracy``; ``trainer.test`` logs
    ``test_loss`` and ``test_accuracy``. Accuracy is the fraction of all images that are classified correctly.

    Args:
        network: Turns a batch of inputs into logits of shape (N, num_classes).
        optimizer: Makes the optimizer from the network's parameters; in YAML its class and arguments.
        lr_scheduler: Makes a scheduler from the optimizer, stepped once per epoch; ``val_loss`` is its metric if it
            needs one.
        num_classes: Classes that the accuracy counts.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from lightning_sparse.zoo import Classifier, LeNet300100
        >>> model = Classifier(LeNet300100(in_features=64), optimizer=partial(torch.optim.Adam, lr=1e-3))
        >>> model(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])

        The network is part of the checkpoint's ``state_dict`` and not of its hyper-parameters, so loading is given one:
        ``Classifier.load_from_checkpoint(path, network=LeNet300100(in_features=64))``.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.loss = nn.CrossEntropyLoss()
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = self.train_accuracy.clone()
        self.test_accuracy = self.train_accuracy.clone()

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(inputs)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        return self._step("train", self.train_accuracy, batch)

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        return self._step("val", self.val_accuracy, batch)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        return self._step("test", self.test_accuracy, batch)

    @override
    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the most probable class of each input; the labels are not looked at."""
        return self(batch[0]).argmax(dim=1)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer, and the scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "monitor": "val_loss"},
        }

    def _step(self, part: str, accuracy: Metric, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        logits = self(inputs)
        loss = self.loss(logits, labels)
        accuracy.update(logits, labels)
        values = {f"{part}_loss": loss, f"{part}_accuracy": accuracy}
        self.log_dict(
            values, on_step=False, on_epoch=True, sync_dist=True, prog_bar=part != "train", batch_size=len(labels)
        )
        return loss
