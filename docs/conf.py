"""How the documentation is built: ``make docs``. Whatever is said elsewhere is taken from there, not repeated."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import pages  # noqa: E402

import lightning_sparse  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "lightning_sparse"
author = "the authors of lightning_sparse"
version = release = lightning_sparse.__version__
html_title = f"lightning_sparse {version}"

# Nothing here asks the network, neither the build nor the pages: equations are drawn by docs/equations.py.
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design", "equations"]
html_math_renderer = "svg"
html_theme = "furo"
html_show_copyright = False
pygments_dark_style = "github-dark"
html_static_path = ["static"]
html_css_files = ["pages.css"]
exclude_patterns = ["ruff.toml"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # Lightning documents its hooks itself
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_rtype = False


def take_over(_: Sphinx, __: str, source: list[str]) -> None:
    """Let a page take over what is said elsewhere, and keep a figure and its deviation on one line."""
    source[0] = pages.take_over(source[0]).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


COLON = "\ue000"  # stands for one while napoleon reads, which takes what comes before a first colon for a type


def hide_colon(_: Sphinx, what: str, *others: Any) -> None:
    """Let the first line of a property's docstring be a sentence that may have a colon."""
    lines = others[-1]
    if what in {"property", "attribute", "data"} and lines:
        lines[0] = lines[0].replace(": ", f"{COLON} ")


def show_colon(*arguments: Any) -> None:
    """Give a docstring its colon back."""
    arguments[-1][:] = [line.replace(COLON, ":") for line in arguments[-1]]


def plain_defaults(*arguments: Any) -> tuple[str, str | None] | None:
    """Write ``...`` for a default that has no literal: Sphinx cannot read its repr, and shows the whole as it is."""
    signature, returns = arguments[-2:]
    return (re.sub(r"= <.+?>(?=[,)])", "= ...", signature), returns) if signature else None


def setup(app: Sphinx) -> None:
    """Let the pages take over what is said elsewhere."""
    app.connect("source-read", take_over)
    app.connect("autodoc-process-docstring", hide_colon, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-docstring", show_colon, priority=600)
    app.connect("autodoc-process-signature", plain_defaults)
