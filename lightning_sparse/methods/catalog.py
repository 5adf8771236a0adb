"""The methods as a table, from what their classes say of themselves."""

from __future__ import annotations

import inspect

from lightning_sparse import methods
from lightning_sparse.methods.base import SparseMethod

__all__ = ["all_methods", "methods_table"]


def all_methods() -> list[type[SparseMethod]]:
    """Return the methods that a user can choose from, by name: the concrete ones of ``lightning_sparse.methods``.

    Example:
        >>> from lightning_sparse import GMP
        >>> from lightning_sparse.methods.catalog import all_methods
        >>> GMP in all_methods()
        True
    """
    public = (getattr(methods, name) for name in sorted(methods.__all__))
    return [item for item in public if _is_method(item)]


def _is_method(item: object) -> bool:
    if not (isinstance(item, type) and issubclass(item, SparseMethod)) or inspect.isabstract(item):
        return False
    return hasattr(item, "paper")  # the families have none


def methods_table() -> str:
    """Return the methods as a Markdown table: name, what it does, and its paper. The README shows this table.

    Example:
        >>> from lightning_sparse.methods.catalog import methods_table
        >>> print(methods_table().splitlines()[0])
        | Method | What it does | Paper |
    """
    rows = ["| Method | What it does | Paper |", "| --- | --- | --- |"]
    rows += [f"| `{method.__name__}` | {_summary(method)} | {_paper(method)} |" for method in all_methods()]
    return "\n".join(rows)


def _summary(method: type[SparseMethod]) -> str:
    """The first line of the docstring, as Markdown."""
    line = inspect.cleandoc(method.__doc__ or "").partition("\n")[0]
    return line.replace("``", "`")


def _paper(method: type[SparseMethod]) -> str:
    paper = method.paper
    return f"{paper.authors}, [{paper.title}]({paper.url}), {paper.venue}"
