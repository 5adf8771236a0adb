"""The notebooks run from top to bottom, in their fast mode, and are kept without output."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def left_by_running(notebook: Any) -> list[str]:
    """The cells that have been run, by their ids."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell.id for cell in code if cell.outputs or cell.execution_count is not None]


def test_there_are_six() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@every_notebook
def test_it_is_stripped(path: Path) -> None:
    assert left_by_running(read(path)) == []


@every_notebook
def test_it_is_valid_and_names_no_machine(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)  # type: ignore[no-untyped-call]
    assert notebook.metadata.kernelspec.name == "python3"
    assert str(Path.home()) not in path.read_text(encoding="utf-8")


@every_notebook
def test_the_documentation_shows_what_this_code_has_printed(path: Path) -> None:
    gallery = runpy.run_path(str(ROOT / "docs" / "gallery.py"))
    kept = json.loads((ROOT / "docs" / "gallery" / f"{path.stem}.json").read_text(encoding="utf-8"))
    assert kept["digest"] == gallery["digest"](read(path)), f"run python docs/gallery.py {path.name[:2]}"
    shown = [output for outputs in kept["outputs"].values() for output in outputs]
    assert all((ROOT / "docs" / "gallery" / output["picture"]).exists() for output in shown if "picture" in output)
    assert not any("\x1b" in output.get("text", "") for output in shown), "a page shows what a terminal would obey"


@every_notebook
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's own libraries; the kernel has its filters
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SPARSE_FAST", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # no browser shows tqdm's bars
    notebook = read(path)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert left_by_running(notebook)
