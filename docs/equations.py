"""Equations as SVG in the page, drawn while the documentation is built: no script, no font and no network.

An extension of Sphinx, for its ``math`` role and directive. `ziamath <https://ziamath.readthedocs.io>`_ draws LaTeX in
pure Python, with the glyphs of STIX Two. An equation takes the colour and the size of the text around it, and carries
its LaTeX as the label that screen readers speak.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from docutils.nodes import SkipNode
from ziamath.zmath import Latex

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

__all__ = ["setup", "svg"]

_SIZE = 100.0  # the size that ziamath draws at, so that a hundredth of its units is a percent of an em
_SCALE = 1.08  # of the size of the text, beside whose letters STIX Two looks small


def svg(latex: str, *, inline: bool) -> str:
    """An equation as an ``svg`` element.

    Args:
        latex: In LaTeX's mathematical mode.
        inline: Whether it stands in a line of text.
    """
    lines = rf"\begin{{aligned}}{latex}\end{{aligned}}" if r"\\" in latex else latex  # as Sphinx does for LaTeX
    drawn = Latex(lines, size=_SIZE, inline=inline, color="currentColor")
    element = drawn.svgxml()
    lengths = {
        "width": float(element.attrib.pop("width")),
        "height": float(element.attrib.pop("height")),
        "vertical-align": drawn.getyofst(),
    }
    style = ";".join(f"{name}:{_SCALE * length / _SIZE:.3f}em" for name, length in lengths.items())
    element.attrib |= {"role": "img", "aria-label": " ".join(latex.split()), "style": style}
    return ElementTree.tostring(element, encoding="unicode")


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(f'<span class="math">{svg(node.astext(), inline=True)}</span>')
    raise SkipNode


def _display(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{svg(node.astext(), inline=False)}</div>')
    raise SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Let Sphinx draw equations with :func:`svg`."""
    app.add_html_math_renderer("svg", inline_renderers=(_inline, None), block_renderers=(_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
