"""Recipes: one YAML file per method, network and data set, for ``lightning-sparse fit --config NAME``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["list_recipes", "recipe_path"]


def list_recipes() -> list[str]:
    """Return the names of all recipes, sorted.

    Example:
        >>> from lightning_sparse.zoo.recipes import list_recipes
        >>> "fggp-lenet300" in list_recipes()
        True
    """
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return the YAML file of a recipe.

    Args:
        name: One of :func:`list_recipes`.

    Raises:
        ValueError: If there is no recipe of that name; the message names those that there are.

    Example:
        >>> from lightning_sparse.zoo.recipes import recipe_path
        >>> recipe_path("fggp-lenet300").name
        'fggp-lenet300.yaml'
    """
    if name not in list_recipes():
        raise ValueError(f"There is no recipe named {name!r}. The recipes are {', '.join(list_recipes())}.")
    return _folder() / f"{name}.yaml"


def _folder() -> Path:
    return Path(str(files(__name__)))
