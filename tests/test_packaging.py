"""What is installed is what setup.cfg says, and nothing else says it."""

from __future__ import annotations

import re
from configparser import ConfigParser
from importlib.metadata import Distribution, distribution, packages_distributions
from importlib.resources import files
from pathlib import Path

import pytest

import lightning_sparse
from tests.test_imports import FILES, foreign_packages, own_part

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def declared() -> ConfigParser:
    """The contents of setup.cfg."""
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def installed() -> Distribution:
    """The installed package; ``make .venv`` installs it."""
    return distribution("lightning-sparse")


def requirement_names(lines: str) -> set[str]:
    """Names of the packages in a list of requirements, as package indexes normalise them."""
    names = (re.match(r"[\w.-]+", line) for line in lines.splitlines())
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


def test_the_version_is_stated_once(installed: Distribution) -> None:
    assert installed.version == lightning_sparse.__version__


def test_the_metadata_are_those_of_setup_cfg(installed: Distribution, declared: ConfigParser) -> None:
    metadata = declared["metadata"]
    assert installed.metadata["Name"] == metadata["name"]
    assert installed.metadata["Summary"] == metadata["description"]
    assert installed.metadata["License-Expression"] == metadata["license_expression"]
    assert installed.metadata["Requires-Python"] == declared["options"]["python_requires"]


def test_the_command_is_installed_and_can_be_loaded(installed: Distribution) -> None:
    (command,) = installed.entry_points.select(group="console_scripts", name="lightning-sparse")
    assert command.value == "lightning_sparse.cli:main"
    assert callable(command.load())


def test_nothing_but_setup_cfg_states_metadata() -> None:
    assert not (ROOT / "setup.py").exists()
    assert not re.search(r"^\[project\b", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_imported_package_is_a_declared_dependency(declared: ConfigParser) -> None:
    required = requirement_names(declared["options"]["install_requires"])
    demo = requirement_names(declared["options.extras_require"]["demo"])
    distributions = packages_distributions()
    for path in FILES:
        allowed = required | demo if own_part(path) == "zoo" else required
        for package in foreign_packages(path):
            names = {re.sub(r"[-_.]+", "-", name).lower() for name in distributions[package]}
            assert names & allowed, f"{path} imports {package}, which setup.cfg does not require."


def test_type_information_and_recipes_are_part_of_the_package() -> None:
    package = files("lightning_sparse")
    assert (package / "py.typed").is_file()
    assert [item for item in (package / "zoo" / "recipes").iterdir() if item.name.endswith(".yaml")]
