"""Figures in the documentation. A command writes them between two markers of a page; nobody does by hand."""

from __future__ import annotations

import io
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["as_markdown", "put_into", "written"]


def as_markdown(table: Table) -> str:
    """A table as Markdown, without spaces at the ends of its lines."""
    table.box = box.MARKDOWN
    stream = io.StringIO()
    Console(file=stream, width=240, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().strip().splitlines())


def written(page: str, name: str, text: str) -> str:
    """Return a page with ``text`` between its markers.

    Args:
        page: The text of the page.
        name: The name in the markers ``<!-- name: begin -->`` and ``<!-- name: end -->``.
        text: The text to put between them.

    Raises:
        ValueError: The page has no such markers.

    Example:
        >>> print(written("<!-- it: begin --> old <!-- it: end -->", "it", "new"))
        <!-- it: begin -->
        <BLANKLINE>
        new
        <BLANKLINE>
        <!-- it: end -->
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"The page has no {begin} before {end}.")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def put_into(page: Path, name: str, text: str) -> None:
    """Write ``text`` between the markers of a page."""
    page.write_text(written(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")
