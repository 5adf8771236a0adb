"""The evidence: what its tables count, whom they rank and name, and that the documentation shows what the runs say."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

import lightning_sparse
from benchmarks import fine_tuning, moments
from benchmarks.evidence.__main__ import PAGE, all_runs
from benchmarks.evidence.contenders import METHODS, ONLY_ON, STR_DECAY, VARIANTS, n_of_m
from benchmarks.evidence.networks import NETWORKS, equal_width, num_weights
from benchmarks.evidence.tables import Evidence, beside_baselines, markdown, on_cnns
from benchmarks.evidence.training import Run, train
from benchmarks.pages import written
from benchmarks.runs import read
from lightning_sparse.methods.catalog import all_methods
from tests.test_benchmarks import tiny_mnist

__all__ = ["tiny_mnist"]  # a fixture


def row(method: str, accuracy: float | None, *, seed: int = 0, sparsity: float = 0.9, **others: Any) -> dict[str, Any]:
    its: dict[str, Any] = {
        "network": "lenet300", "method": method, "sparsity": sparsity, "seed": seed, "train_images": 0, "epochs": 0,
        "accuracy": accuracy, "achieved_sparsity": sparsity, "machine": "a machine", "versions": {"torch": "2.9"},
        "cpu_seconds": 36.0, "training_flops": 0.5,
    }  # fmt: skip
    return its | others


def test_every_method_of_the_package_takes_part() -> None:
    assert {kind.__name__ for kind in all_methods()} == {*METHODS, "FixedMask"}  # which holds the masks of baselines
    assert ONLY_ON.keys() <= VARIANTS.keys()


def test_a_cut_leaves_whole_seeds() -> None:
    seeds = [run.seed for run in all_runs(["lenet300"])]
    assert seeds == sorted(seeds)
    assert len(set(all_runs())) == len(all_runs())
    assert {(run.network, run.sparsity) for run in all_runs() if run.method == "STR"} == STR_DECAY.keys()


@pytest.mark.parametrize("network", NETWORKS)
def test_the_small_dense_network_has_at_most_as_many_weights(network: str) -> None:
    setting = NETWORKS[network]
    full = num_weights(setting.make())
    sizes = [num_weights(setting.make(equal_width(setting.make, sparsity))) for sparsity in (0.9, 0.99)]
    assert sizes[0] <= 0.1 * full
    assert sizes[1] <= 0.01 * full
    assert sizes[0] > 0.08 * full
    narrow = setting.make(equal_width(setting.make, 0.9)).eval()
    assert narrow(torch.zeros(2, *setting.shape)).shape == (2, 10)


@pytest.mark.parametrize(("inputs", "sparsity"), [(784, 0.9), (300, 0.98), (100, 0.99)])
def test_n_of_m_comes_near(inputs: int, sparsity: float) -> None:
    n, m = map(int, n_of_m(inputs, sparsity).split(":"))
    assert inputs % m == 0
    assert 1 - n / m == pytest.approx(sparsity, abs=0.1 * (1 - sparsity))


@pytest.mark.parametrize("method", ["equal-weights", "static", "one-shot", "RigL"])
def test_a_run_counts_its_own_zeros(method: str, tiny_mnist: Path) -> None:
    result = train(Run("lenet300", method, 0.9, seed=0, epochs=2), tiny_mnist)
    assert json.loads(json.dumps(result)) == result
    assert 0.899 < result["achieved_sparsity"] < 0.91
    assert result["weights"] == 266_200
    assert 0.0 < result["inference_flops"] < 0.2
    assert result["file_bytes"] < 200_000


def test_a_method_that_cannot_is_kept_as_a_run(tiny_mnist: Path) -> None:
    result = train(Run("lenet300", "GMP", 0.9999999, seed=0, epochs=1), tiny_mnist)
    assert result["accuracy"] is None
    assert "largest feasible sparsity" in result["error"]


def test_ranks_by_hand() -> None:
    # GMP, FGGP and static, two seeds: 1 2 3 and 1.5 1.5 3.
    rows = [row("GMP", 97.0), row("FGGP", 96.0), row("static", 90.0)]
    rows += [row("GMP", 96.0, seed=1), row("FGGP", 96.0, seed=1), row("static", 91.0, seed=1)]
    ranks = Evidence(rows).ranks()
    assert ranks is not None
    assert dict(ranks.average) == {"GMP": 1.25, "FGGP": 1.75, "static": 3.0}
    assert ranks.blocks == 2
    assert ranks.intervals["GMP"] == (1.0, 1.5)
    assert Evidence([*rows, row("SET", 99.0)]).ranks() is None  # of one seed: one block has all four


def test_a_network_that_a_method_cannot_have_costs_the_others_no_block() -> None:
    rows = [
        row(method, 90.0 + place, network=network)
        for network in ("lenet300", "cnn")
        for place, method in enumerate(("GMP", "SET", "static", "STR"))
        if (network, method) != ("cnn", "STR")
    ]
    ranks = Evidence(rows).ranks()
    assert ranks is not None
    assert (ranks.blocks, set(ranks.average)) == (2, {"GMP", "SET", "static"})


def test_who_misses_the_sparsity_is_not_ranked_and_is_marked() -> None:
    rows = [
        row(method, 90.0 + place, seed=seed) for seed in (0, 1) for place, method in enumerate(("GMP", "SET", "static"))
    ]
    rows += [row("STR", 99.0, seed=seed, achieved_sparsity=0.88) for seed in (0, 1)]
    evidence = Evidence(rows)
    ranks = evidence.ranks()
    assert ranks is not None
    assert "STR" not in ranks.average
    assert "(at 88.0 %)" in markdown(evidence)


def test_a_method_that_loses_to_a_baseline_is_named() -> None:
    rows = [row("static", 95.0), row("SET", 94.0), row("RigL", 94.9), row("GMP", None), row("one-shot", 94.5)]
    assert beside_baselines(Evidence(rows)) == {
        "SET": ["random masks (ERK): LeNet-300-100, MNIST at 90 %", "one-shot magnitude: LeNet-300-100, MNIST at 90 %"]
    }


def test_a_card_says_where_on_the_cnns_its_method_loses() -> None:
    def rows(network: str, sparsity: float, **accuracies: float) -> list[dict[str, Any]]:
        return [row(name, value, sparsity=sparsity) | {"network": network} for name, value in accuracies.items()]

    one = [
        *rows("cnn-bn", 0.9, static=95.0, SET=90.0, RigL=95.0),
        *rows("cnn-bn", 0.99, static=90.0, SET=89.8, RigL=88.0),
    ]
    two = [*rows("cnn", 0.9, static=95.0, SET=90.0, RigL=96.0), *rows("cnn", 0.99, static=90.0, SET=89.0, RigL=90.0)]
    evidence = Evidence([*one, *two])
    loses = "On a small CNN it loses to a baseline at"
    assert on_cnns(evidence, "SET") == f"{loses} 90 % with BatchNorm, and at 90 and 99 % without."
    assert on_cnns(evidence, "RigL") == f"{loses} 99 % with BatchNorm."
    assert on_cnns(Evidence(two), "SET") == f"{loses} 90 and 99 % without BatchNorm."
    assert on_cnns(Evidence(one), "GMP") == "On a small CNN it loses to no baseline."


def test_trials_on_fewer_images_are_no_evidence() -> None:
    assert not Evidence([row("GMP", 97.0) | {"train_images": 1000}]).rows


def test_the_documentation_shows_what_was_measured() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page, "evidence", markdown(Evidence.read())) == page, "python -m benchmarks.evidence --docs"
    finished = list(read(moments.RESULTS, moments.Run).values())
    assert written(page, "moments", moments.figures(finished)) == page, "python -m benchmarks.moments --docs"
    page = fine_tuning.PAGE.read_text(encoding="utf-8")
    content = json.loads(fine_tuning.RESULTS.read_text())
    assert written(page, "fine-tuning", fine_tuning.figures(content)) == page, "python -m benchmarks.fine_tuning --docs"


@pytest.mark.parametrize("name", METHODS)
def test_a_card_tells_what_was_measured(name: str) -> None:
    evidence = Evidence.read()
    means = [mean(evidence.accuracies("lenet300", sparsity, name)) for sparsity in (0.9, 0.95, 0.98, 0.99)]
    *first, last = [f"{accuracy:.1f}" for accuracy in means]
    card = " ".join((getattr(lightning_sparse, name).__doc__ or "").split())
    assert f"(4 epochs, mean of three seeds): {', '.join(first)} and {last} %;" in card
    assert on_cnns(evidence, name) in card


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no <!-- it: begin -->"):
        written("text", "it", "new")
