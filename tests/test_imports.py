"""Imports run one way: functional, execution, schedules, masks, methods, zoo, cli. Read from their statements."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_sparse"

# A part is a module or folder directly below the package. It may import its own layer and those before it.
LAYERS = [
    {"_version", "functional"},
    {"arguments", "atomic", "schedules", "timetable", "trainer", "execution"},
    {"masks"},
    {"modules"},
    {"methods", "metrics", "monitor", "reporting"},
    {"__init__"},
    {"testing", "zoo"},
    {"cli", "consolidate", "trained", "__main__"},
]
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source: str, *, nested: bool = True) -> set[str]:
    """Dotted names of all that ``source`` imports, in functions and conditions too if ``nested``.

    ``from a import b`` gives ``a.b``.
    """
    names: set[str] = set()
    module = ast.parse(source)
    for node in ast.walk(module) if nested else module.body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def part_of(name: str) -> str:
    """The part of the package to which a dotted name of ours belongs: ``lightning_sparse.masks.x`` to ``masks``."""
    part = name.split(".")[1] if "." in name else "__init__"
    return part if part in LAYER_OF else "__init__"


def imported_parts(path: Path) -> set[str]:
    return {part_of(name) for name in imported(path.read_text(encoding="utf-8")) if name.split(".")[0] == PACKAGE.name}


def own_part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def foreign_packages(path: Path, *, nested: bool = True) -> set[str]:
    """Imported packages that are neither Python's nor ours."""
    tops = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"), nested=nested)}
    return tops - sys.stdlib_module_names - {PACKAGE.name}


def test_an_import_inside_a_function_or_for_the_type_checker_counts() -> None:
    source = "if TYPE_CHECKING:\n    import a.b\ndef f():\n    from c import d, e\n"
    assert imported(source) == {"a.b", "c.d", "c.e"}


def test_a_name_exported_by_the_package_itself_belongs_to_the_package() -> None:
    assert [part_of(f"lightning_sparse{rest}") for rest in ("", ".FGGP", ".masks.MaskRegistry")] == [
        "__init__",
        "__init__",
        "masks",
    ]


def test_every_part_of_the_package_has_its_layer() -> None:
    assert {own_part(path) for path in FILES} <= set(LAYER_OF)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_imports_a_later_layer(path: Path) -> None:
    later = {part for part in imported_parts(path) if LAYER_OF[part] > LAYER_OF[own_part(path)]}
    assert not later, f"{name_of(path)} imports {sorted(later)}, which may import {own_part(path)}, not the reverse."


def test_parts_of_one_layer_do_not_import_each_other_in_a_circle() -> None:
    imports: dict[str, set[str]] = {}
    for path in FILES:
        imports.setdefault(own_part(path), set()).update(imported_parts(path) - {own_part(path)})
    TopologicalSorter(imports).prepare()


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").rglob("*.py")), ids=name_of)
def test_functional_imports_torch_and_numpy_alone(path: Path) -> None:
    assert foreign_packages(path) <= {"numpy", "torch"}
    assert "torch.distributed" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((PACKAGE / "execution").rglob("*.py")), ids=name_of)
def test_execution_needs_no_lightning(path: Path) -> None:
    assert foreign_packages(path) <= {"llvmlite", "numpy", "rich", "safetensors", "torch", "typing_extensions"}
    assert imported_parts(path) <= {"atomic", "execution", "functional"}


def test_llvmlite_is_imported_by_its_kernels_alone() -> None:
    assert {path.parent.name for path in FILES if "llvmlite" in foreign_packages(path)} == {"llvm"}


@pytest.mark.parametrize("name", ["schedules.py", "timetable.py"])
def test_schedules_import_the_standard_library_alone(name: str) -> None:
    assert not foreign_packages(PACKAGE / name)
