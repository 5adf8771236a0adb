"""Whatever a method does with masks of sharded weights, they are those of one process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.methods.cases import CASES, Case
from tests.sharded.processes import MESHES, ONE, Mesh, assert_same, fit, forked, processes_of, recorded

# One of each family, and those that rank, count or sum in ways of their own; `make test-all` trains them all.
OFTEN = ("fggp-global", "rigl", "dst-sparsity", "srigl")
# Methods that differentiate the module in ways that FSDP2 cannot.
REFUSED = ("grasp", "synflow")


def train_all(mesh: Mesh, cases: Sequence[Case], root: Path) -> None:
    """Train with each method in one set of processes; what fails is told in a file."""
    for case in cases:
        try:
            fit(mesh, case.make(), root / f"{case.name}.pt")
        except Exception:
            (root / f"{case.name}.error").write_text(traceback.format_exc())


Results = Callable[[Mesh, str], Path]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Where the results of a mesh are; all cases that were chosen are trained at the first question."""
    chosen = {
        item.callspec.params["case"]
        for item in request.session.items
        if hasattr(item, "callspec") and "case" in item.callspec.params
    }
    roots: dict[Mesh, Path] = {}

    def of(mesh: Mesh, name: str) -> Path:
        if mesh not in roots:
            roots[mesh] = tmp_path_factory.mktemp("mesh")
            forked(processes_of(mesh), train_all, mesh, [case for case in CASES if case.name in chosen], roots[mesh])
        error = roots[mesh] / f"{name}.error"
        if error.exists():
            raise AssertionError(error.read_text())
        return roots[mesh] / f"{name}.pt"

    yield of


NAMES = [
    pytest.param(case.name, marks=[] if case.name in OFTEN else [pytest.mark.slow])
    for case in CASES
    if case.name not in REFUSED
]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")
@pytest.mark.parametrize("case", NAMES)
def test_masks_are_those_of_one_process(case: str, mesh: Mesh, results: Results) -> None:
    assert_same(recorded(results(mesh, case)), recorded(results(ONE, case)))
