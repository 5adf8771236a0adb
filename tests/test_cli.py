from __future__ import annotations

import runpy
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

import lightning_sparse
from lightning_sparse.cli import SparseCLI, main
from lightning_sparse.report import checkpoint_sparsity
from lightning_sparse.zoo import list_recipes

TINY = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def test_fit_trains_a_recipe_and_leaves_a_sparse_checkpoint(tmp_path: Path) -> None:
    assert main(["fit", "--config", "digits-fggp", "--trainer.callbacks.sparsity=0.75", *TINY]) == 0
    (checkpoint,) = tmp_path.glob("logs/digits-fggp/version_0/checkpoints/*.ckpt")
    layers = checkpoint_sparsity(checkpoint)
    assert sum(layer.num_active for layer in layers) == 50_200 // 4


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_trained_checkpoint_can_be_validated_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "digits-fggp", *TINY])
    (checkpoint,) = tmp_path.glob("logs/digits-fggp/version_0/checkpoints/*.ckpt")
    assert main(["validate", "--config", "digits-fggp", "--ckpt_path", str(checkpoint), *TINY]) == 0
    assert main(["report", str(checkpoint)]) == 0
    assert "95.00%" in capsys.readouterr().out


def test_the_saved_configuration_trains_again(tmp_path: Path) -> None:
    main(["fit", "--config", "digits-fggp", *TINY])
    saved = tmp_path / "logs/digits-fggp/version_0/config.yaml"
    assert "Unable to serialize" not in saved.read_text()
    assert main(["fit", "--config", str(saved)]) == 0


def test_classes_are_known_by_their_bare_names() -> None:
    cli = SparseCLI(
        [
            "--model=Classifier",
            "--model.network=LeNet300100",
            "--model.network.in_features=64",
            "--data=DigitsDataModule",
            "--trainer.logger=false",
            "--trainer.callbacks=GMP",
            "--trainer.callbacks.sparsity=Polynomial",
            "--trainer.callbacks.sparsity.initial=0.5",
            "--trainer.callbacks.sparsity.final=0.9",
        ],
        run=False,
    )
    assert "GMP" in [type(callback).__name__ for callback in cli.trainer.callbacks]  # pyright: ignore[reportAttributeAccessIssue]


def test_any_module_data_and_callback_can_be_named_by_class_path(tmp_path: Path) -> None:
    config = {
        "trainer": {"callbacks": [{"class_path": "lightning_sparse.FGGP", "init_args": {"sparsity": 0.5}}]},
        "model": "lightning.pytorch.demos.boring_classes.BoringModel",
        "data": "lightning.pytorch.demos.boring_classes.BoringDataModule",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "own.yaml", "--trainer.logger=false", *TINY]) == 0


def test_a_default_classifier_has_a_configuration_that_can_be_saved(tmp_path: Path) -> None:
    arguments = ["--model=Classifier", "--model.network=LeNet300100", "--model.network.in_features=64"]
    main(["fit", *arguments, "--data=DigitsDataModule", "--trainer.max_steps=1", *TINY[1:]])
    (saved,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["optimizer"] == "lightning_sparse.zoo.classifier.sgd"


def test_a_file_goes_before_a_recipe_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "digits-fggp").write_text("model: lightning.pytorch.demos.boring_classes.BoringModel")
    cli = SparseCLI(["--config", "digits-fggp", "--trainer.logger=false"], run=False)
    assert isinstance(cli.model, L.LightningModule)
    assert type(cli.model).__name__ == "BoringModel"


def test_an_unknown_recipe_is_one_sentence_that_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("fit", "--config", "lenet301") == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "There is no recipe named 'lenet301'" in sentence
    assert "lenet300-fggp" in sentence


def test_missing_data_is_one_sentence_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "lenet300-fggp", *TINY]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("lightning-sparse: error: MNIST is not complete: looked in data/MNIST/raw and in data")
    assert "--data.download=true" in sentence


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"], ids=["missing", "empty", "text"])
def test_report_of_an_unreadable_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "model.ckpt").write_bytes(content)
    assert main(["report", "model.ckpt"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (sentence,) = output.err.splitlines()
    assert "model.ckpt" in sentence


def test_report_all_shows_biases_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    main(["report", "model.pt"])
    assert "bias" not in capsys.readouterr().out
    main(["report", "model.pt", "--all"])
    assert "bias" in capsys.readouterr().out


def test_report_refuses_options_that_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("report", "model.pt", "--everything") == 2
    assert "report does not know --everything" in capsys.readouterr().err


def test_help_names_every_command_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    shown = capsys.readouterr().out
    for name in ("fit", "validate", "test", "predict", "report", *list_recipes()):
        assert name in shown


def test_fit_has_the_help_of_lightning_cli(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("fit", "--help") == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"lightning-sparse {lightning_sparse.__version__}\n"


def test_the_module_runs_as_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning_sparse", "report", "nowhere.ckpt"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(Path(lightning_sparse.__file__).with_name("__main__.py")), run_name="__main__")
    assert stopped.value.code == 2
    assert "nowhere.ckpt" in capsys.readouterr().err
