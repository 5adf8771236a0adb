from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lightning_sparse.zoo import Classifier, DigitsDataModule, LeNet300100
from tests.helpers import make_trainer


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(LeNet300100(in_features=64), optimizer=partial(torch.optim.SGD, lr=0.1))


def test_training_logs_loss_and_accuracy_of_training_and_validation(tmp_path: Path, model: Classifier) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, datamodule=DigitsDataModule())
    assert set(trainer.callback_metrics) == {"train_loss", "train_accuracy", "val_loss", "val_accuracy"}


def test_a_few_epochs_classify_most_digits(tmp_path: Path, model: Classifier) -> None:
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(model, datamodule=DigitsDataModule())
    assert trainer.callback_metrics["val_accuracy"] > 0.85


def test_accuracy_is_the_fraction_of_all_images(tmp_path: Path, model: Classifier) -> None:
    data = DigitsDataModule(batch_size=77)  # the last batch is smaller
    trainer = make_trainer(tmp_path, max_epochs=1)
    (metrics,) = trainer.validate(model, data, verbose=False)
    with torch.no_grad():
        correct = model(data.val_set.images).argmax(1) == data.val_set.labels
    assert metrics["val_accuracy"] == pytest.approx(correct.float().mean().item())


def test_testing_and_validation_agree_and_prediction_gives_classes(tmp_path: Path, model: Classifier) -> None:
    data, trainer = DigitsDataModule(), make_trainer(tmp_path, max_epochs=1)
    (validated,) = trainer.validate(model, data, verbose=False)
    (tested,) = trainer.test(model, data, verbose=False)
    predictions = trainer.predict(model, data)
    assert tested["test_accuracy"] == validated["val_accuracy"]
    assert predictions is not None
    classes = torch.cat([batch for batch in predictions if isinstance(batch, torch.Tensor)])
    assert (classes == data.val_set.labels).float().mean().item() == pytest.approx(tested["test_accuracy"])


def test_a_checkpoint_loads_into_a_network_that_is_given(tmp_path: Path, model: Classifier) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, datamodule=DigitsDataModule())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", network=LeNet300100(in_features=64))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_a_checkpoint_holds_no_python_objects(tmp_path: Path, model: Classifier) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, datamodule=DigitsDataModule())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert list(state) == [f"network.fc{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")]


def test_the_default_optimizer_is_sgd_with_momentum() -> None:
    optimizer = Classifier(LeNet300100()).configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.01, 0.9)


@pytest.mark.parametrize("scheduler", [partial(StepLR, step_size=1, gamma=0.5), partial(ReduceLROnPlateau, patience=0)])
def test_schedulers_of_either_kind_are_stepped(tmp_path: Path, scheduler: partial[StepLR | ReduceLROnPlateau]) -> None:
    model = Classifier(LeNet300100(in_features=64), partial(torch.optim.SGD, lr=1e9), scheduler)  # pyright: ignore[reportArgumentType]  # Lightning's alias names a subclass
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(model, datamodule=DigitsDataModule())
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e9


def test_a_classifier_can_be_sent_to_a_process_that_is_spawned() -> None:
    assert isinstance(pickle.loads(pickle.dumps(Classifier(LeNet300100()))), Classifier)
