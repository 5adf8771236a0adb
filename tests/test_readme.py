"""What the documentation shows works: Python blocks run, commands exist, the table of methods is the methods'.

The Python blocks of a file run in turn, as one program that finds a ``model`` of the class ``MyModule`` and a
``datamodule``, in an empty folder.
"""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sparse import FGGP, GMP, report
from lightning_sparse.cli import TRAINER_COMMANDS, main
from lightning_sparse.methods.catalog import methods_table
from lightning_sparse.schedules import Exponential
from tests.helpers import ToyModel, make_trainer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(markdown: str, language: str) -> list[str]:
    """The blocks of a language, each after as many empty lines as put it on its own lines of the file."""
    return [
        "\n" * markdown.count("\n", 0, match.start("text")) + textwrap.dedent(match["text"])
        for match in BLOCK.finditer(markdown)
        if match["language"] == language
    ]


def commands(markdown: str) -> list[list[str]]:
    """The commands in bash blocks, as words, without comments."""
    lines = "\n".join(blocks(markdown, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def documented(tool: str) -> list[list[str]]:
    """The distinct arguments with which the documentation calls a tool."""
    found = [
        words[1:]
        for path in DOCUMENTS
        if path.exists()
        for words in commands(path.read_text(encoding="utf-8"))
        if words[0] == tool
    ]
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


class ToyData(L.LightningDataModule):
    """The data of a toy as a data module: two batches an epoch, so that 160 epochs take seconds."""

    toy = ToyModel(samples=16)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.toy.train_dataloader()

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.toy.val_dataloader()


NAMESPACE: dict[str, Any] = {"__name__": "__main__", "MyModule": ToyModel}


def run_python(markdown: str, name: str) -> None:
    namespace = NAMESPACE | {"model": ToyModel(), "datamodule": ToyData()}
    for block in blocks(markdown, "python"):
        exec(compile(block, name, "exec"), namespace)


@pytest.fixture
def on_cpu_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a plain ``Trainer()`` choose the CPU, in silence, and write into ``tmp_path``."""
    monkeypatch.setenv("PL_TRAINER_ACCELERATOR", "cpu")  # a GPU in use would break the tests that fork
    monkeypatch.setenv("PL_TRAINER_ENABLE_PROGRESS_BAR", "False")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_share_a_namespace_and_keep_their_line_numbers() -> None:
    markdown = "# Title\n\n```python\nx = 1\n```\n\n- item\n\n  ```python\n  y = x / 0\n  ```\n"
    with pytest.raises(ZeroDivisionError) as error:
        run_python(markdown, "example.md")
    assert (error.traceback[-1].path, error.traceback[-1].lineno + 1) == ("example.md", 10)


def test_commands_are_read_without_comments_and_across_lines() -> None:
    assert commands("```bash\nmake demo  # look\n\nlightning-sparse fit \\\n  --config x\n```\n") == [
        ["make", "demo"],
        ["lightning-sparse", "fit", "--config", "x"],
    ]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # one method takes over from another
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # with a logger's next version, too
@pytest.mark.filterwarnings("ignore:The number of training batches")  # the toy data are fewer than anyone's
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # a teacher
@pytest.mark.usefixtures("on_cpu_in_an_empty_folder")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_run(path: Path) -> None:
    run_python(path.read_text(encoding="utf-8"), str(path))


class Overfit(ToyModel):
    """A toy whose validation loss rises from the first epoch on, so that the first is the best."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.usefixtures("on_cpu_in_an_empty_folder")
def test_the_best_that_waits_is_sparse() -> None:
    markdown = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
    (block,) = (block for block in blocks(markdown, "python") if "class BestSparse" in block)
    namespace: dict[str, Any] = NAMESPACE | {
        "L": L,
        "FGGP": FGGP,
        "report": report,
        "model": Overfit(),
        "datamodule": ToyData(),
    }
    exec(compile(block, "getting-started.md", "exec"), namespace)
    assert report(namespace["best"].best_model_path).sparsity >= 0.95
    assert namespace["stop"].stopped_epoch > 15  # FGGP prunes until 0.8 of the 20 epochs; patience is 3


@pytest.mark.parametrize("steps", [50, 200])
def test_the_steps_of_lightnings_pruning_are_what_the_documentation_says(steps: int, tmp_path: Path) -> None:
    markdown = (ROOT / "docs/moving.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^GMP\(.*Exponential.*\)$", markdown, re.MULTILINE)
    assert "prunes to 0.50, 0.75, 0.88 and 0.94 at the ends of the four epochs" in markdown
    method = eval(line, {"GMP": GMP, "Exponential": Exponential})
    seen: list[float] = []
    note = LambdaCallback(on_train_batch_end=lambda trainer, *_: seen.append(method.registry.sparsity))
    make_trainer(tmp_path, callbacks=[method, note], max_epochs=4).fit(ToyModel(samples=8 * steps))
    assert [round(value, 2) for value in [*seen[steps::steps], seen[-1]]] == [0.5, 0.75, 0.88, 0.94]


OWN_CLASSES = """
from lightning.pytorch.demos.boring_classes import BoringDataModule as Digits
from lightning.pytorch.demos.boring_classes import BoringModel


class LitCNN(BoringModel):
    pass
"""


@pytest.mark.parametrize("tool", ["make", "lightning-sparse"])
def test_the_documentation_shows_how_to_use(tool: str) -> None:
    assert documented(tool)


@pytest.mark.parametrize("arguments", documented("make"), ids=" ".join)
def test_make_commands_name_targets(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w.]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {word for word in arguments if "=" not in word} <= set(targets)


@pytest.mark.parametrize("arguments", documented("lightning-sparse"), ids=" ".join)
def test_lightning_sparse_commands_are_understood(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a training command every option is parsed, but nothing is trained. One names classes of the reader's own.
    (tmp_path / "mynet.py").write_text(OWN_CLASSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    trains = arguments[0] in TRAINER_COMMANDS
    asked = [*arguments, "--print_config" if trains else "--help"]
    monkeypatch.setattr(sys, "argv", ["lightning-sparse", *asked])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


def test_the_readme_shows_the_table_of_methods() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n{methods_table()}\n\n" in readme, f"Put this table into README.md:\n{methods_table()}"
