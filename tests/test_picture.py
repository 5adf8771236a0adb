"""The picture in the README shows what benchmarks/results holds."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "gains.png"


@pytest.fixture(scope="module")
def picture() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "picture.py"))


def test_it_shows_the_figures_that_are_there(picture: dict[str, Any]) -> None:
    figures = picture["read"]()
    digest = picture["digest"](figures)
    assert b"Source\0" + digest.encode() in PICTURE.read_bytes(), "they are others now: run python docs/picture.py"
    assert len(figures["speeds"]) == 7
    assert {row["sparsity"] for row in figures["files"]} == {0.9, 0.95, 0.99, 0.999}


def test_it_can_be_drawn(picture: dict[str, Any], tmp_path: Path) -> None:
    drawn = tmp_path / "gains.png"
    figures = picture["read"]()
    picture["draw"](figures).savefig(drawn)
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_the_readme_shows_it_and_it_is_small() -> None:
    assert re.search(r"!\[[^\]]{80,}\]\(docs/gains\.png\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert PICTURE.stat().st_size < 150_000
