"""How the documentation is built: ``make docs``. Whatever is said elsewhere is taken from there, not repeated."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lightning_sparse  # noqa: E402
from benchmarks.evidence.tables import MARGIN, Evidence, beside_baselines  # noqa: E402
from lightning_sparse.methods.catalog import all_methods, methods_table  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "lightning_sparse"
author = "the authors of lightning_sparse"
version = release = lightning_sparse.__version__
html_title = f"lightning_sparse {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["ruff.toml"]

myst_heading_anchors = 3
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # Lightning documents its hooks itself
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_rtype = False

# Where the links of README.md and CONTRIBUTING.md lead here; others are to files that are no pages, and lose the link.
PAGES = {
    "docs/decisions": "decisions.md",
    "docs/getting-started.md": "getting-started.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/methods/test_contract.py": "api/testing.md",
}
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")
MARKER = re.compile(r"^<!-- (README|CONTRIBUTING|METHODS)(?:: (.+))? -->$", re.MULTILINE)


def section(file: str, heading: str | None) -> str:
    """What stands under a heading of a file, or, without one, between its title and its first heading."""
    text = (ROOT / f"{file}.md").read_text(encoding="utf-8")
    parts = re.split(r"^##? (.+)\n", text, flags=re.MULTILINE)
    headings = parts[1::2]
    wanted = headings[0] if heading is None else heading
    if wanted not in headings:
        raise LookupError(f"{file}.md has no heading {wanted!r}; a page of docs/ takes over what stands under it.")
    return LINK.sub(_linked, parts[2::2][headings.index(wanted)]).strip()


def _linked(link: re.Match[str]) -> str:
    text, target = link.groups()
    return f"[{text}]({PAGES[target]})" if target in PAGES else text


def cards() -> str:
    """The table of methods, and the docstring of each."""
    entries = [f"## {method.__name__}\n\n```{{eval-rst}}\n{_card(method)}\n```" for method in all_methods()]
    return "\n\n".join([methods_table(), *entries])


def _card(method: type) -> str:
    source = Path(inspect.getsourcefile(method) or "").read_text(encoding="utf-8")
    differs = re.search(r"^Differs from.*?(?=^\"\"\")", source, re.MULTILINE | re.DOTALL)
    card = f".. autoclass:: lightning_sparse.{method.__name__}\n   :no-members:\n"
    if differs is None:
        return card
    heading, _, rest = differs[0].partition("\n")
    lines = "\n".join(line.removeprefix("    ") for line in rest.splitlines())
    return f"{card}\n.. rubric:: {heading.rstrip(':')}\n\n{lines}\n\n{_beside_baselines(method.__name__)}"


def _beside_baselines(method: str) -> str:
    """To which baselines a method loses in docs/evidence.md, and where; nothing where it loses to none."""
    lost = beside_baselines(Evidence.read()).get(method, [])
    items = "\n".join(f"- {sentence}" for sentence in lost)
    head = f"With its defaults, in the short runs of :doc:`evidence`, it ended by more than {MARGIN} points behind"
    return f".. rubric:: Beside a baseline\n\n{head}\n\n{items}\n" if lost else ""


def take_over(_: Sphinx, __: str, source: list[str]) -> None:
    """Put text from elsewhere in the place of a marker such as ``<!-- README: Limits -->``."""
    source[0] = MARKER.sub(lambda found: cards() if found[1] == "METHODS" else section(found[1], found[2]), source[0])


def setup(app: Sphinx) -> None:
    """Let the pages take over what is said elsewhere."""
    app.connect("source-read", take_over)
