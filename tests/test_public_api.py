"""What is public says what it is: every name has a docstring, every method its card."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from typing import Any, get_origin

import pytest

import lightning_sparse
from lightning_sparse.methods import SparseMethod
from lightning_sparse.methods.catalog import all_methods


def public_modules() -> list[str]:
    """The package and every module in it but ``_private`` ones and ``__main__``."""
    found = pkgutil.walk_packages(lightning_sparse.__path__, prefix="lightning_sparse.")
    names = [info.name for info in found if not any(part.startswith("_") for part in info.name.split("."))]
    return ["lightning_sparse", *names]


def public_definitions() -> dict[str, Any]:
    """Every class and function that some ``__all__`` names, once, by where it is defined."""
    modules = [importlib.import_module(name) for name in public_modules()]
    values = [getattr(module, name) for module in modules for name in module.__all__]
    return {
        f"{value.__module__}.{value.__qualname__}": value
        for value in values
        if (inspect.isclass(value) or inspect.isfunction(value)) and get_origin(value) is None  # as of an alias
    }


MODULES = public_modules()
DEFINITIONS = public_definitions()


def described(definition: object) -> bool:
    """Whether it has a docstring of its own, neither inherited nor made by ``dataclass``."""
    text = vars(definition).get("__doc__") if isinstance(definition, type) else definition.__doc__
    return bool(text) and not text.startswith(f"{getattr(definition, '__name__', '')}(")


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_exists(name: str) -> None:
    module = importlib.import_module(name)
    assert [item for item in module.__all__ if not hasattr(module, item)] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert described(importlib.import_module(name))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_public_class_and_function_has_a_docstring_of_its_own(name: str) -> None:
    assert described(DEFINITIONS[name])


@pytest.mark.parametrize("method", all_methods())
class TestMethod:
    def test_shows_an_example_and_its_references(self, method: type[SparseMethod]) -> None:
        card = inspect.cleandoc(method.__doc__ or "")
        assert "\nExample:\n    >>> " in card
        assert "\nReferences:\n" in card

    def test_names_its_paper(self, method: type[SparseMethod]) -> None:
        assert all(vars(method.paper).values())
        assert method.paper.url in (method.__doc__ or "")

    def test_is_final(self, method: type[SparseMethod]) -> None:
        definition = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
        assert isinstance(definition, ast.ClassDef)
        assert "final" in [ast.unparse(decorator) for decorator in definition.decorator_list]

    def test_is_offered_by_the_package(self, method: type[SparseMethod]) -> None:
        assert getattr(lightning_sparse, method.__name__) is method
