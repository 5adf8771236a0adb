"""Run the notebooks and keep what they show, for the documentation: ``python docs/gallery.py [NUMBER ...]``.

The notebooks hold no output. What their cells print and draw is kept beside this file: for each notebook a JSON file
of texts, and pictures. ``docs/conf.py`` joins both into a page. A test fails where a notebook's code is no longer the
code that was run; then run this again for that notebook.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import platform
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
GALLERY = Path(__file__).with_name("gallery")
COLOURS = 128  # of a picture: it is a fifth of the size, and looks the same
TERMINAL = re.compile(r"\x1b\[[0-9;]*m")  # bold and colours, which rich asks a terminal for
MACHINE = Path("/proc/cpuinfo")


def main(numbers: list[str]) -> int:
    """Run the notebooks whose names begin with one of ``numbers``, or all of them; return the exit code 0."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not numbers or path.name[:2] in numbers:
            keep(path)
    return 0


def digest(notebook: Any) -> str:
    """A hash of what a notebook's cells of code say."""
    code = "\n\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def keep(path: Path) -> None:
    """Run a notebook in an empty folder, and write what it shows to :data:`GALLERY`."""
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # no browser shows tqdm's bars
    notebook: Any = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute()
    for old in GALLERY.glob(f"{path.stem}-*.png"):
        old.unlink()
    record = {
        "digest": digest(notebook),
        "machine": f"{processor()}, Python {platform.python_version()}, torch {version('torch')}",
        "outputs": {cell.id: list(kept(cell, path.stem)) for cell in notebook.cells if cell.get("outputs")},
    }
    (GALLERY / f"{path.stem}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")


def kept(cell: Any, stem: str) -> Any:
    """The outputs of a cell: text without colours, pictures as the names of files that are written here."""
    for number, output in enumerate(cell.outputs):
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{stem}-{cell.id}-{number}.png"
            write_picture(base64.b64decode(data["image/png"]), GALLERY / name)
            yield {"picture": name}
        elif output.get("name") == "stderr":
            continue  # remarks on this machine
        elif text := output.get("text") or data.get("text/plain"):
            yield {"text": TERMINAL.sub("", text).rstrip()}


def write_picture(png: bytes, path: Path) -> None:
    """Write a picture with :data:`COLOURS` colours."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def processor() -> str:
    """The processor's name, as Linux tells it."""
    lines = MACHINE.read_text(encoding="utf-8").splitlines() if MACHINE.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
