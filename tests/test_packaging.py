"""What is installed is what setup.cfg says, and nothing else says it."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from configparser import ConfigParser
from functools import cache
from importlib.metadata import Distribution, distribution, distributions
from importlib.resources import files
from pathlib import Path

import pytest

import lightning_sparse
from tests.test_imports import FILES, PACKAGE, foreign_packages, name_of

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


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names(lines: str) -> set[str]:
    """What a list of requirements names."""
    names = (re.match(r"[\w.-]+", line) for line in lines.splitlines())
    return {normalized(name[0]) for name in names if name}


def distributions_of(packages: set[str]) -> set[str]:
    """The distributions from which importable packages were installed."""
    return {owners()[package] for package in packages}


@cache
def owners() -> Mapping[str, str]:
    """The distribution that each importable package comes from, by the files that it installed.

    Python 3.10's ``packages_distributions`` knows only those that list their packages in ``top_level.txt``.
    """
    return {
        file.parts[0].removesuffix(".py"): normalized(each.metadata["Name"])
        for each in distributions()
        for file in each.files or ()
        if file.suffix == ".py"
    }


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


def test_each_package_has_one_minimum(declared: ConfigParser) -> None:
    # ``make .venv-oldest`` installs exactly these, and of one package no two releases at once.
    lists = [declared["options"]["install_requires"], *declared["options.extras_require"].values()]
    found = re.findall(r"^([\w.-]+)(?:\[[a-z,]+\])?>=", "\n".join(lists), re.MULTILINE)
    named = [normalized(name) for name in found]
    assert len(named) > 20
    assert sorted(set(named)) == sorted(named)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_imported_package_is_declared(path: Path, declared: ConfigParser) -> None:
    required = requirement_names(declared["options"]["install_requires"])
    extras = declared["options.extras_require"]
    optional = requirement_names(extras["demo"]) | requirement_names(extras["fast"])
    if path.is_relative_to(PACKAGE / "execution" / "kernels" / "llvm"):  # which is imported where llvmlite is
        required |= requirement_names(extras["fast"])
    if path.is_relative_to(PACKAGE / "testing"):  # which refuses, with a sentence, to be imported without pytest
        required |= requirement_names(declared["options.extras_require"]["testing"])
    assert distributions_of(foreign_packages(path, nested=False)) <= required
    assert distributions_of(foreign_packages(path)) <= required | optional


def test_type_information_and_recipes_are_part_of_the_package() -> None:
    package = files("lightning_sparse")
    assert (package / "py.typed").is_file()
    assert [item for item in (package / "zoo" / "recipes").iterdir() if item.name.endswith(".yaml")]


QUICK_START = """
import lightning as L
import torch
from lightning_sparse import FGGP, SparsityMonitor, accelerate, report, save_sparse
from lightning_sparse.zoo import Classifier, DigitsDataModule, LeNet300100

model = Classifier(LeNet300100(in_features=64))
trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[FGGP(sparsity=0.95), SparsityMonitor()])
trainer.fit(model, DigitsDataModule())
print(report(model))
save_sparse(model, "model.sparse")
accelerate(model.network, torch.randn(16, 64), threads=1)
trainer.save_checkpoint("last.ckpt")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_runs_the_quick_start_outside_of_the_checkout(tmp_path: Path) -> None:
    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        ended = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    run(
        sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ".", cwd=ROOT
    )  # the wheel from the sources' archive
    run(sys.executable, "-m", "twine", "check", "--strict", *(tmp_path / "dist").iterdir())
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    # An environment that has only the wheel, and finds all that it needs where the tests find it.
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    found = run(
        python, "-I", "-c", "import lightning_sparse; print(lightning_sparse.__file__, lightning_sparse.__version__)"
    )
    assert found.split() == [str(packages / "lightning_sparse" / "__init__.py"), lightning_sparse.__version__]
    (tmp_path / "quick_start.py").write_text(QUICK_START)
    assert "95.0" in run(python, "-I", "quick_start.py")
    command = tmp_path / "env" / "bin" / "lightning-sparse"
    assert "fggp-digits" in run(command, "recipes")
    assert "95.0" in run(command, "report", "last.ckpt")
