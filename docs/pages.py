"""Text that pages of the documentation take over from elsewhere, in the place of markers in comments.

====================================  ==================================================================
``<!-- CONTRIBUTING: Heading -->``    what stands under that heading of CONTRIBUTING.md
``<!-- METHODS -->``                  the table of methods, and the card of each
``<!-- NOTEBOOK: 01_quick_start -->`` a notebook, with the outputs that docs/gallery.py has kept
``<!-- PICTURE: 01_quick_start -->``  a card's option: the first picture of that notebook, where it is there
====================================  ==================================================================
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence.tables import MARGIN, Evidence, beside_baselines
from lightning_sparse.methods.catalog import all_methods, methods_table

__all__ = ["take_over"]

ROOT = Path(__file__).parents[1]
GALLERY = Path(__file__).with_name("gallery")
MARKER = re.compile(r"^<!-- (CONTRIBUTING|METHODS|NOTEBOOK|PICTURE)(?:: (.+))? -->$", re.MULTILINE)

# Where links of CONTRIBUTING.md and notebooks lead, beside pages of docs/ and notebooks. Others lead to no page: their
# text is left.
PAGES = {"docs/decisions": "decisions.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")


def take_over(page: str) -> str:
    """The text of a page, with its markers replaced."""
    return MARKER.sub(lambda marker: MAKERS[marker[1]](marker[2] or ""), page)


def contributing(heading: str) -> str:
    """What stands under a heading of CONTRIBUTING.md, or, without one, between its title and its first heading."""
    parts = re.split(r"^##? (.+)\n", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    headings = parts[1::2]
    wanted = heading or headings[0]
    if wanted not in headings:
        raise LookupError(
            f"CONTRIBUTING.md has no heading {wanted!r}; a page of docs/ takes over what stands under it."
        )
    return _linked(parts[2::2][headings.index(wanted)], up="").strip()


def methods(_: str) -> str:
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


def notebook(stem: str) -> str:
    """The cells of a notebook, and below each what it has printed and drawn."""
    content = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))
    kept = _kept(stem)
    ran = f"*Ran on {kept['machine']}.*" if kept else ""
    return "\n\n".join([*_cells(content["cells"], kept.get("outputs", {})), ran])


def _cells(cells: list[dict[str, Any]], outputs: dict[str, Any]) -> Iterator[str]:
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield _linked(text, up="../")
            continue
        yield f"```python\n{text}\n```"
        for output in outputs.get(cell["id"], ()):
            yield f"```text\n{output['text']}\n```" if "text" in output else f"![]({output['picture']})"


def picture(stem: str) -> str:
    """The option of a card that shows a notebook's first picture."""
    outputs = _kept(stem).get("outputs", {})
    names = [output["picture"] for of_cell in outputs.values() for output in of_cell if "picture" in output]
    return f":img-bottom: gallery/{names[0]}" if names else ""


def _kept(stem: str) -> dict[str, Any]:
    file = GALLERY / f"{stem}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _linked(text: str, *, up: str) -> str:
    def link(found: re.Match[str]) -> str:
        label, target = found[1], found[2].removeprefix("../")
        if target.endswith(".ipynb"):
            return f"[{label}]({'' if up else 'gallery/'}{Path(target).stem}.md)"
        page = PAGES.get(target, target.removeprefix("docs/"))
        return f"[{label}]({up}{page})" if (GALLERY.parent / page).is_file() else label

    return LINK.sub(link, text)


MAKERS: dict[str, Callable[[str], str]] = {
    "CONTRIBUTING": contributing,
    "METHODS": methods,
    "NOTEBOOK": notebook,
    "PICTURE": picture,
}
