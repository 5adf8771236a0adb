from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_sparse
from lightning_sparse.cli import SparseCLI, main
from lightning_sparse.reporting import LayerSparsity, SparsityReport, checkpoint_sparsity
from lightning_sparse.zoo import list_recipes, recipe_path

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
    monkeypatch.setattr(sys, "path", [*sys.path])  # where the command puts the folder that it is in


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def test_fit_trains_a_recipe_and_leaves_a_sparse_checkpoint(tmp_path: Path) -> None:
    assert main(["fit", "--config", "fggp-digits", "--trainer.callbacks.sparsity=0.75", *TINY]) == 0
    (checkpoint,) = tmp_path.glob("logs/fggp-digits/version_0/checkpoints/*.ckpt")
    layers = checkpoint_sparsity(checkpoint)
    assert sum(layer.num_active for layer in layers) == 50_200 // 4


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_trained_checkpoint_can_be_validated_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "fggp-digits", *TINY])
    (checkpoint,) = tmp_path.glob("logs/fggp-digits/version_0/checkpoints/*.ckpt")
    assert main(["validate", "--config", "fggp-digits", "--ckpt_path", str(checkpoint), *TINY]) == 0
    assert main(["report", str(checkpoint)]) == 0
    assert "95.00%" in capsys.readouterr().out


def test_the_saved_configuration_trains_again(tmp_path: Path) -> None:
    main(["fit", "--config", "fggp-digits", *TINY])
    saved = tmp_path / "logs/fggp-digits/version_0/config.yaml"
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
    (tmp_path / "fggp-digits").write_text("model: lightning.pytorch.demos.boring_classes.BoringModel")
    cli = SparseCLI(["--config", "fggp-digits", "--trainer.logger=false"], run=False)
    assert isinstance(cli.model, L.LightningModule)
    assert type(cli.model).__name__ == "BoringModel"


def test_an_unknown_recipe_is_one_sentence_that_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("fit", "--config", "lenet301") == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "There is no recipe named 'lenet301'" in sentence
    assert "fggp-lenet300" in sentence


OWN = """
from lightning.pytorch.demos.boring_classes import BoringModel


class Net(BoringModel):
    def __init__(self, width: int = 1):
        super().__init__()
        if width < 1:
            raise ValueError("my own check")
        self.width = width

    def training_step(self, batch, batch_idx):
        if self.width > 1:
            raise ValueError("in the midst of my step")
        return super().training_step(batch, batch_idx)
"""

BORING = ["--data=lightning.pytorch.demos.boring_classes.BoringDataModule", "--trainer.logger=false", *TINY]


def test_the_installed_command_finds_classes_in_this_folder(tmp_path: Path) -> None:
    (tmp_path / "ownnet.py").write_text(OWN)
    command = [str(Path(sys.executable).with_name("lightning-sparse")), "fit", "--model=ownnet.Net", *BORING]
    done = subprocess.run([*command, "--trainer.callbacks+=GMP", "--trainer.callbacks.sparsity=0.5"], check=False)
    assert done.returncode == 0
    assert list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        # while callbacks are made, within an error of the parser; when training begins; in Lightning itself
        (["--trainer.callbacks.sparsity=95"], "sparsity is 95, but it is a fraction in [0, 1). Did you mean 0.95?"),
        (["--trainer.callbacks.exclude=[head]"], "exclude='head' matches no parameter name and no module type."),
        (["--ckpt_path=none.ckpt"], "Checkpoint file not found: "),
        (["--trainer.max_epochs=-5"], "`max_epochs` must be a non-negative integer or -1."),
    ],
)
def test_what_is_refused_is_one_sentence(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config=fggp-digits", *TINY, *options]) == 2
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith(f"lightning-sparse: error: {sentence}")
    assert "Traceback" not in errors


@pytest.mark.parametrize(("width", "message"), [(0, "my own check"), (2, "in the midst of my step")])
def test_errors_of_own_code_keep_their_traceback(
    width: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failingnet.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "failingnet", raising=False)
    with pytest.raises(ValueError, match=message):
        main(["fit", "--model=failingnet.Net", f"--model.width={width}", *BORING])


def test_an_accident_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = LayerSparsity("weight", (2, 2), num_active="one")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("lightning_sparse.cli.report", lambda *_, **__: SparsityReport((layer,)))  # pyright: ignore[reportUnknownLambdaType]
    with pytest.raises(ValueError, match="Cannot specify ','"):  # Python's own error, within the package
        main(["report", "model.ckpt"])


def test_missing_data_is_one_sentence_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "fggp-lenet300", *TINY]) == 2
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
    assert "weights_only" not in sentence


def test_report_takes_several_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_with("1100", "a.ckpt")
    checkpoint_with("1000", "b.ckpt")
    assert main(["report", "a.ckpt", "b.ckpt"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("a.ckpt") < shown.index("50.00%") < shown.index("b.ckpt") < shown.index("75.00%")
    assert shown.count("embeddings too") == 1
    assert "embeddings too" in shown.splitlines()[-1]


def test_report_breaks_no_name_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "encoder.layer.11.attention.self." * 5 + "query.weight"
    torch.save({name: torch.eye(2)}, "long.pt")
    assert main(["report", "long.pt"]) == 0
    assert name in capsys.readouterr().out


def test_report_of_a_file_of_masks_says_what_is_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    lightning_sparse.save_masks("sparse.masks", {"weight": torch.eye(2) != 0})
    assert main(["report", "sparse.masks"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "sparse.masks is in the safetensors format, like a file of masks" in sentence
    assert "`lightning-sparse masks compare A B`" in sentence
    assert "weights_only" not in sentence


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
    for name in ("fit", "validate", "test", "predict", "report", "masks", "recipes", *list_recipes()):
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


def checkpoint_with(mask: str, path: str) -> None:
    """A checkpoint of one layer of eight weights; those are zero whose digit is."""
    torch.save({"state_dict": {"fc.weight": torch.tensor([[float(bit) for bit in mask]])}}, path)


def test_masks_are_extracted_to_a_file_that_can_be_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_with("11010000", "a.ckpt")
    assert main(["masks", "extract", "a.ckpt", "a.masks"]) == 0
    assert "fc.weight" in capsys.readouterr().out
    masks = lightning_sparse.load_masks("a.masks")
    assert masks["fc.weight"].tolist() == [[True, True, False, True, False, False, False, False]]


def test_masks_of_a_trained_recipe_are_those_that_it_ended_with(tmp_path: Path) -> None:
    recipe = next(name for name in list_recipes() if "digits" in name)
    main(["fit", "--config", recipe, *TINY])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert main(["masks", "extract", str(checkpoint), "digits.masks"]) == 0
    active = {name: int(mask.sum()) for name, mask in lightning_sparse.load_masks("digits.masks").items()}
    assert active == {layer.name: layer.num_active for layer in checkpoint_sparsity(checkpoint)}


def test_fixed_masks_train_from_the_command_line_and_their_configuration_again(tmp_path: Path) -> None:
    model = BoringModel()
    with torch.no_grad():
        model.layer.weight[:, ::2] = 0
    lightning_sparse.save_masks("half.masks", model)
    arguments = ["--model=lightning.pytorch.demos.boring_classes.BoringModel", "--trainer.callbacks=FixedMask"]
    arguments += ["--data=lightning.pytorch.demos.boring_classes.BoringDataModule", "--seed_everything=0"]
    assert main(["fit", *arguments, "--trainer.callbacks.masks=half.masks", *TINY]) == 0
    (saved,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["trainer"]["callbacks"][0]["init_args"]["masks"] == "half.masks"
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert [layer.num_active for layer in checkpoint_sparsity(checkpoint)] == [32]
    assert main(["fit", "--config", str(saved)]) == 0


def test_masks_are_compared_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_with("11010000", "a.ckpt")  # 3 active, 5 of 8 are zeros
    checkpoint_with("11001110", "b.ckpt")  # 5 active; 2 in both, 6 in one at least, 2 of 3 kept
    main(["masks", "extract", "b.ckpt", "b.masks"])
    capsys.readouterr()
    assert main(["masks", "compare", "a.ckpt", "b.masks"]) == 0
    shown = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["fc.weight", "8", "62.50%", "37.50%", "0.3333", "66.67%"] in shown
    assert ["total", "8", "62.50%", "37.50%", "0.3333", "66.67%"] in shown


def test_masks_of_two_networks_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_with("1101", "a.ckpt")
    checkpoint_with("110100", "b.ckpt")
    assert main(["masks", "compare", "a.ckpt", "b.ckpt"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "A is a.ckpt and B is b.ckpt. The masks of fc.weight have the shapes (1, 4) and (1, 6)" in sentence


@pytest.mark.parametrize("command", [["extract", "none.ckpt", "a.masks"], ["compare", "none.ckpt", "a.masks"]])
def test_masks_of_a_missing_file_are_one_sentence(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["masks", *command]) == 2
    assert capsys.readouterr().err == "lightning-sparse: error: There is no file none.ckpt.\n"


def test_a_dense_checkpoint_has_no_masks_to_extract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_with("11111111", "a.ckpt")
    assert main(["masks", "extract", "a.ckpt", "a.masks"]) == 2
    assert "a.ckpt is dense" in capsys.readouterr().err
    assert not (tmp_path / "a.masks").exists()


def test_nothing_that_is_there_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_with("11010000", "a.ckpt")
    before = (tmp_path / "a.ckpt").read_bytes()
    assert main(["masks", "extract", "a.ckpt", "a.ckpt"]) == 2
    assert main(["recipes", "copy", list_recipes()[0], "a.ckpt"]) == 2
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "error: a.ckpt exists already. Remove it, or give another file."
    ] * 2
    assert (tmp_path / "a.ckpt").read_bytes() == before


@pytest.mark.parametrize("arguments", [["masks"], ["masks", "unpack"], ["recipes", "bake"], ["recipes", "show"]])
def test_a_command_that_there_is_not_shows_those_that_there_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    assert "usage: lightning-sparse" in capsys.readouterr().err


def test_every_recipe_is_listed_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_recipes()
    for line in lines:
        sentence = line.partition(" ")[2].strip()
        assert len(sentence.split()) >= 4
        assert sentence.endswith(".")


def test_a_recipe_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for name in list_recipes():
        assert main(["recipes", "show", name]) == 0
        assert capsys.readouterr().out == recipe_path(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [None, "mine.yaml"])
def test_a_copied_recipe_can_be_trained(file: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(name for name in list_recipes() if "digits" in name)
    assert main(["recipes", "copy", name, *([file] if file else [])]) == 0
    target = file or f"{name}.yaml"
    assert f"fit --config {target}" in capsys.readouterr().out
    assert Path(target).read_bytes() == recipe_path(name).read_bytes()
    assert type(SparseCLI(["--config", target], run=False).model).__name__ == "Classifier"


@pytest.mark.parametrize("command", ["show", "copy"])
def test_an_unknown_recipe_cannot_be_looked_at(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", command, "lenet301"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "There is no recipe named 'lenet301'" in sentence


def test_a_recipe_is_not_copied_into_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy", list_recipes()[0], "nowhere/mine.yaml"]) == 2
    assert "nowhere/mine.yaml cannot be written: No such file or directory." in capsys.readouterr().err
