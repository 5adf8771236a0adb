"""Sparse layers read plain tensors in memory, and refuse all others in words: tracers would record wrong addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_sparse.execution import SparseConv2d, SparseLinear
from lightning_sparse.execution.kernels import available_kernels
from tests.execution.networks import assert_close, sparsify

Call = Callable[[Tensor], Any]


def on_a_fake(call: Call, x: Tensor) -> Any:
    """Call with a tensor that has a shape alone."""
    with FakeTensorMode() as mode:
        return call(mode.from_tensor(x))


WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "torch.jit.trace": torch.jit.trace,
    "torch.export": lambda call, x: torch.export.export(call, (x,)),
    "torch.func.vmap": lambda call, x: torch.func.vmap(call)(x[None]),
    "a fake tensor": on_a_fake,
    "a sparse tensor": lambda call, x: call(x.to_sparse()),
    "a nested tensor": lambda call, x: call(torch.nested.as_nested_tensor(x)),
}


@pytest.mark.filterwarnings("ignore")  # what of these is new or old, torch says itself
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernels", available_kernels())
def test_a_linear_layer_refuses_what_is_no_plain_tensor(kernels: str, way: str) -> None:
    if way == "a fake tensor" and kernels == "torch_csr":
        pytest.skip("torch refuses its own fakes.")
    layer = SparseLinear.of(sparsify(nn.Linear(32, 16)), kernels=kernels)
    with pytest.raises(ValueError, match="reads plain tensors alone"):
        WAYS[way](layer, torch.randn(4, 32))


@pytest.mark.skipif("llvm" not in available_kernels(), reason="llvmlite is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"a nested tensor"}))
def test_a_convolution_refuses_what_is_no_plain_tensor(way: str) -> None:
    layer = SparseConv2d(sparsify(nn.Conv2d(4, 8, 3)))
    with pytest.raises(ValueError, match="reads plain tensors alone"):
        WAYS[way](layer, torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("kernels", available_kernels())
def test_any_way_to_lie_in_memory_is_read(kernels: str) -> None:
    dense = sparsify(nn.Linear(32, 16))
    layer = SparseLinear.of(dense, kernels=kernels)
    turned, spread, negated = torch.randn(32, 4).t(), torch.randn(1, 32).expand(4, 32), torch.randn(4, 32)
    every_other = torch.randn(4, 64)[:, ::2]
    imaginary = torch.complex(negated, negated).conj().imag  # torch negates it when it is read
    for x in (turned, spread, every_other, imaginary, negated[0], negated[None], negated[:0]):
        with torch.no_grad():
            assert_close(layer(x), dense(x))
