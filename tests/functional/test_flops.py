from __future__ import annotations

import pytest

from lightning_sparse.functional.flops import inference_flops, sparse_flops, training_flops


def test_a_layer_costs_its_share_of_active_weights_and_the_rest_stays_dense() -> None:
    #             100 · 0.1 + 50 · 0.6 + 7
    assert sparse_flops([100, 50], [0.9, 0.4], rest=7) == pytest.approx(47)


def test_inference_is_relative_to_the_whole_dense_network() -> None:
    assert inference_flops([100, 50], [0.9, 0.4], rest=50) == pytest.approx((10 + 30 + 50) / 200)


def test_a_dense_network_costs_what_a_dense_network_costs() -> None:
    assert inference_flops([3, 5], [0, 0], rest=2) == 1
    assert training_flops(10, 10) == 1


def test_backward_costs_twice_forward() -> None:
    sparse, dense = 20.0, 100.0
    assert training_flops(sparse, dense) == pytest.approx((sparse + 2 * sparse) / (dense + 2 * dense))


@pytest.mark.parametrize("interval", [1, 100])
def test_the_mean_over_an_update_interval_is_rigls_formula(interval: int) -> None:
    sparse, dense = 20.0, 100.0
    update = training_flops(sparse, dense, dense_gradients=dense - sparse)
    mean = (interval * training_flops(sparse, dense) + update) / (interval + 1)
    assert mean == pytest.approx((3 * sparse * interval + 2 * sparse + dense) / (interval + 1) / (3 * dense))


def test_layers_without_a_sparsity_are_refused() -> None:
    with pytest.raises(ValueError, match="2 layers and 1 sparsities"):
        sparse_flops([1, 2], [0.5])


def test_a_network_without_operations_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        inference_flops([], [])
