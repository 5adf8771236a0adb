"""Where a method is defined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

__all__ = ["Paper"]


@final
@dataclass(frozen=True, kw_only=True)
class Paper:
    """The paper that defines a method.

    Args:
        authors: Family names, as one cites them: one, two, three, or the first and "et al.".
        title: The title in full.
        venue: Where and when it was published, e.g. "ICML 2020".
        url: A page on which it can be read.

    Example:
        >>> from lightning_sparse.methods.paper import Paper
        >>> paper = Paper(
        ...     authors="Evci et al.",
        ...     title="Rigging the Lottery: Making All Tickets Winners",
        ...     venue="ICML 2020",
        ...     url="https://arxiv.org/abs/1911.11134",
        ... )
        >>> paper.venue
        'ICML 2020'
    """

    authors: str
    title: str
    venue: str
    url: str
