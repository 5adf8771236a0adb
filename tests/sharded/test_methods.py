"""Whatever a method does with masks of sharded weights, they are those of one process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import _redistribute

from tests.methods.cases import CASES, Case
from tests.sharded.processes import MESHES, ONE, Mesh, assert_same, fit, forked, processes_of, recorded

# One of each family, and those that rank, count or sum in ways of their own; `make test-all` trains them all.
OFTEN = ("fggp-global", "rigl", "dst-sparsity", "srigl")
# What differentiates twice, as FSDP2 cannot.
NOT_IN_FSDP = ("grasp",)
# What needs whole rows, or all channels of an activation, which the toy's tensor parallelism divides.
NOT_IN_TENSOR_PARALLEL = ("srigl", "east")


# What torch loses, GraSP refuses.
KEEPS_SECOND_DERIVATIVES = hasattr(_redistribute, "NestedRedistribute")


def train(mesh: Mesh, case: Case, root: Path) -> None:
    """Train with a method; what fails is told in a file."""
    try:
        fit(mesh, case.make(), root / f"{case.name}.pt")
    except Exception:
        (root / f"{case.name}.error").write_text(traceback.format_exc())


def train_all(mesh: Mesh, cases: Sequence[Case], root: Path) -> None:
    for case in cases:
        train(mesh, case, root)


Results = Callable[[Mesh, str], Path]
PAIRS = [
    pytest.param(case.name, mesh, marks=[] if case.name in OFTEN else [pytest.mark.slow])
    for case in CASES
    for mesh in MESHES
    if not (mesh[0] > 1 and case.name in NOT_IN_FSDP) and not (mesh[1] > 1 and case.name in NOT_IN_TENSOR_PARALLEL)
]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Where the results of a mesh are: what is asked for is trained at the first question, by one set of processes."""
    asked = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and isinstance(item, pytest.Function) and hasattr(item, "callspec")
    ]
    roots: dict[Mesh, Path] = {}

    def of(mesh: Mesh, name: str) -> Path:
        if mesh not in roots:
            roots[mesh] = tmp_path_factory.mktemp("mesh")
            names = {its["case"] for its in asked if mesh in (ONE, its["mesh"])}
            forked(processes_of(mesh), train_all, mesh, [case for case in CASES if case.name in names], roots[mesh])
        error = roots[mesh] / f"{name}.error"
        if error.exists():
            raise AssertionError(error.read_text())
        return roots[mesh] / f"{name}.pt"

    return of


@pytest.mark.parametrize(("case", "mesh"), PAIRS)
def test_masks_are_those_of_one_process(case: str, mesh: Mesh, results: Results) -> None:
    if case == "grasp" and not KEEPS_SECOND_DERIVATIVES:
        pytest.skip(f"torch {torch.__version__} loses second derivatives, and GraSP refuses")
    assert_same(recorded(results(mesh, case)), recorded(results(ONE, case)))
