from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_sparse import load_sparse, save_sparse
from lightning_sparse.cli import main
from lightning_sparse.zoo import Classifier, LeNet300100

MODULE = """
import lightning as L
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, inputs):
        return self.down(torch.relu(self.up(inputs)))

class Lit(L.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(width)
        self.example_input_array = torch.zeros(5, 6)

    def forward(self, inputs):
        return self.net(inputs)

class Tokens(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(2, 6), Net())

class Needy(Net):
    def __init__(self, width, depth):
        super().__init__(width)
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name == "sparsenet"]:
        monkeypatch.delitem(sys.modules, name)
    Path("sparsenet.py").write_text(MODULE)


def half_zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data[::2] = 0
    return module


def sparse_lenet() -> dict[str, Tensor]:
    state = half_zero(Classifier(LeNet300100(in_features=64))).state_dict()
    torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.6.0"}, "last.ckpt")
    return state


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


@pytest.mark.parametrize("kind", ["sparse", "safetensors"])
def test_a_checkpoint_is_exported_whole(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = sparse_lenet()
    assert main(["export", "last.ckpt", "--to", kind]) == 0
    loaded = load_sparse("last.sparse") if kind == "sparse" else load_file("last.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    nbytes = sum(tensor.nbytes for tensor in state.values())
    assert f"last.{kind}: " in (said := capsys.readouterr().out)
    assert f"for {nbytes:,} bytes of tensors" in said
    assert main(["report", f"last.{kind}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "50.00%" in shown
    assert "A sparse file takes about" in shown


def test_an_export_may_be_of_half_precision_and_elsewhere() -> None:
    state = sparse_lenet()
    assert main(["export", "last.ckpt", "--to", "sparse", "--values", "float16", "--out", "half.sparse"]) == 0
    loaded = load_sparse("half.sparse")["network.fc1.weight"]
    assert torch.equal(loaded, state["network.fc1.weight"].half().float())
    assert main(["export", "half.sparse", "--to", "safetensors"]) == 0
    assert torch.equal(load_file("half.safetensors")["network.fc1.weight"], loaded)


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    sparse_lenet()
    Path("last.sparse").write_text("mine")
    assert "last.sparse exists already" in refused(capsys, "export", "last.ckpt", "--to", "sparse")
    assert Path("last.sparse").read_text() == "mine"


def test_a_folder_that_is_not_there_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    sparse_lenet()
    for kind in ("sparse", "safetensors"):
        sentence = refused(capsys, "export", "last.ckpt", "--to", kind, "--out", "nowhere/x")
        assert "there is no folder" in sentence


def test_onnx_gives_the_outputs_of_the_recipe() -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sparse_lenet()
    arguments = ["--model", "fggp-digits", "--input", "1x8x8", "--batch", "2"]
    assert main(["export", "last.ckpt", "--to", "onnx", *arguments]) == 0
    model = Classifier(LeNet300100(in_features=64)).eval()
    model.load_state_dict(torch.load("last.ckpt")["state_dict"])
    inputs = torch.randn(2, 1, 8, 8)
    session = runtime.InferenceSession("last.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(inputs), rtol=1e-4, atol=1e-5)


class Report:
    def __str__(self) -> str:
        return "the table"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What accelerate is asked; it is tested where it stands."""
    calls: list[Any] = []

    class Accelerate:
        report = Report()

        @staticmethod
        def accelerate(module: nn.Module, example: Tensor, *, threads: int) -> type[Accelerate]:
            calls.append((module, example, threads))
            return Accelerate

    monkeypatch.setitem(sys.modules, "lightning_sparse.execution.accelerate", Accelerate)  # pyright: ignore
    return calls


def test_speed_prints_what_accelerate_found(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    state = sparse_lenet()
    assert main(["speed", "last.ckpt", "--model", "fggp-digits", "--input", "1x8x8", "--batch", "3"]) == 0
    assert capsys.readouterr().out == "the table\n"
    ((module, example, threads),) = asked
    assert torch.equal(module.network.fc1.weight, state["network.fc1.weight"])
    assert not module.training
    assert (tuple(example.shape), threads) == ((3, 1, 8, 8), 1)


def test_a_class_takes_its_hyperparameters_and_example_from_where_they_are(asked: list[Any]) -> None:
    from sparsenet import Lit  # pyright: ignore  # made by the fixture

    lit = half_zero(Lit(width=12))
    saved = {"state_dict": lit.state_dict(), "hyper_parameters": {"width": 12, "other": 1}}
    torch.save(saved, "last.ckpt")
    assert main(["speed", "last.ckpt", "--model", "sparsenet.Lit", "--threads", "2"]) == 0
    ((module, example, threads),) = asked
    assert module.net.up.out_features == 12
    assert (tuple(example.shape), threads) == ((1, 6), 2)


@pytest.mark.parametrize("kind", ["yaml", "sparse", "class"])
def test_plain_modules_and_files_of_a_training_will_do(kind: str, asked: list[Any]) -> None:
    from sparsenet import Net  # pyright: ignore

    module: Any = half_zero(Net())
    torch.save(module.state_dict(), "net.pt")
    save_sparse(module, "net.sparse")
    Path("config.yaml").write_text("seed: 1\nmodel:\n  class_path: sparsenet.Net\n  init_args:\n    width: 8\n")
    model = "config.yaml" if kind == "yaml" else "sparsenet.Net"
    assert main(["speed", "net.sparse" if kind == "sparse" else "net.pt", "--model", model, "--input", "6"]) == 0
    assert torch.equal(asked[0][0].up.weight, module.up.weight)


def test_the_report_of_a_network_counts_dead_units_and_operations(capsys: pytest.CaptureFixture[str]) -> None:
    sparse_lenet()
    assert main(["report", "last.ckpt", "--model", "fggp-digits", "--input", "1x8x8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "FLOPs" in shown
    assert "shrink removes 200 dead units of 410" in shown  # every second one has no inputs; the ten outputs stay


def test_a_report_without_an_input_has_what_is_known_and_says_what_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    from sparsenet import Net  # pyright: ignore

    torch.save(half_zero(Net()).state_dict(), "last.ckpt")
    assert main(["report", "last.ckpt", "--model", "sparsenet.Net"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sparsenet.Net does not say what it takes" in shown
    assert "dead rows" in shown
    assert "FLOPs │" not in shown


def test_inputs_may_be_tokens(asked: list[Any]) -> None:
    from sparsenet import Tokens  # pyright: ignore

    torch.save(half_zero(Tokens()).state_dict(), "last.ckpt")
    assert main(["speed", "last.ckpt", "--model", "sparsenet.Tokens", "--input", "5:int64", "--batch", "2"]) == 0
    ((_, example, _),) = asked
    assert (example.shape, example.dtype) == ((2, 5), torch.int64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-recipe"], "There is no recipe named 'no-recipe'"),
        (["--model", "nowhere.yaml"], "There is no file nowhere.yaml"),
        (["--model", "sparsenet.py"], "sparsenet.py "),
        (["--model", "sparsenet.Nothing"], "There is no class sparsenet.Nothing"),
        (["--model", "nowhere.Net"], "There is no class nowhere.Net"),
        (["--model", "torch.zeros"], "There is no class torch.zeros"),
        (["--model", "sparsenet.Needy"], "sparsenet.Needy cannot be built"),
        (["--model", "fggp-digits"], "last.ckpt does not fit fggp-digits: it lacks network.fc1.bias"),
        (["--model", "sparsenet.Net"], "it has no tensor example_input_array. Give the sizes"),
        (["--model", "sparsenet.Net", "--input", "7"], "does not take an input of shape (1, 7) and type float32"),
        (["--model", "sparsenet.Net", "--input", "6:words"], "--input is '6:words'; it takes sizes"),
        (["--model", "sparsenet.Net", "--input", "6,-1"], "--input is '6,-1'; it takes sizes"),
        (["--model", "sparsenet.Net", "--input", "6", "--batch", "0"], "--batch is 0; it takes 1 or more"),
        (["--model", "torch.nn.Identity", "--input", "6"], "last.ckpt does not fit torch.nn.Identity: it also has"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsenet import Net  # pyright: ignore

    torch.save(Net().state_dict(), "last.ckpt")
    assert words in refused(capsys, "speed", "last.ckpt", *arguments)


def test_weights_of_another_shape_and_missing_files_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from sparsenet import Net  # pyright: ignore

    torch.save(Net(9).state_dict(), "last.ckpt")
    sentence = refused(capsys, "speed", "last.ckpt", "--model", "sparsenet.Net", "--input", "6")
    assert "last.ckpt does not fit sparsenet.Net: size mismatch" in sentence
    assert "There is no file none.ckpt" in refused(capsys, "export", "none.ckpt", "--to", "sparse")
    assert "give it with --model" in refused(capsys, "export", "last.ckpt", "--to", "onnx")
