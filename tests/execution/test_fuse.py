"""Graphs with sparse layers compute what the network computes, whatever is joined to what."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_sparse.execution.conv import SparsePlanes
from lightning_sparse.execution.fuse import fuse
from lightning_sparse.execution.kernels import available_kernels
from lightning_sparse.execution.linear import SparseLinear
from lightning_sparse.execution.tracing import UntraceableError, trace
from lightning_sparse.zoo import LeNet5Caffe, ResNet20
from lightning_sparse.zoo.resnet import ResNet34, ResNet50
from lightning_sparse.zoo.vgg import VGG16
from lightning_sparse.zoo.wide_resnet import WideResNet
from tests.execution.networks import assert_close, in_float64, perceptron, residual_network, sparsify


def fused(
    network: nn.Module, x: Tensor, kernels: str = "llvm", threads: int = 1, dense: tuple[str, ...] = ()
) -> nn.Module:
    own = copy.deepcopy(network).eval().requires_grad_(False)
    return fuse(trace(own, (x,)), lambda name: name not in dense, kernels=kernels, threads=threads)


def check(network: nn.Module, shape: tuple[int, ...], tolerance: float = 1e-5) -> nn.Module:
    network = sparsify(network)
    graph = fused(network, torch.randn(shape))
    for batch in (shape[0], 1, 3):
        x = torch.randn(batch, *shape[1:])
        assert_close(graph(x), in_float64(network, x), tolerance)
    return graph


@pytest.mark.parametrize("threads", [1, 2])
def test_a_residual_network_is_one_part_and_one_linear_layer(threads: int) -> None:
    network = sparsify(residual_network())
    x = torch.randn(2, 3, 33, 40)
    graph = fused(network, x, threads=threads)
    assert [type(child) for child in graph.children() if not isinstance(child, nn.Flatten)] == [
        SparsePlanes,
        SparseLinear,
    ]
    for batch in (2, 1, 5):
        x = torch.randn(batch, 3, 33, 40)
        assert_close(graph(x), in_float64(network, x))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (LeNet5Caffe, (2, 1, 28, 28)),
        (lambda: ResNet20(width=4), (2, 3, 32, 32)),
        (lambda: ResNet34(width=4), (1, 3, 32, 32)),
        (lambda: ResNet50(width=4), (1, 3, 32, 32)),
        (lambda: VGG16(), (1, 3, 32, 32)),
        (lambda: WideResNet(), (1, 3, 32, 32)),
    ],
    ids=["lenet5", "resnet20", "resnet34", "resnet50", "vgg16", "wide_resnet"],
)
def test_networks_of_the_zoo(network: type[nn.Module], shape: tuple[int, ...]) -> None:
    check(network(), shape, 1e-4)


def test_a_resnet_of_torchvision_is_one_part() -> None:
    graph = check(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]), (1, 3, 64, 64), 1e-4)
    assert sum(isinstance(child, SparsePlanes) for child in graph.children()) == 1


@pytest.mark.parametrize("kernels", available_kernels())
def test_a_perceptron_is_one_call(kernels: str) -> None:
    network = sparsify(perceptron(784, 30, 20, 10))
    x = torch.randn(5, 1, 28, 28)
    graph = fused(network, x, kernels)
    assert [type(child) for child in graph.children()] == [SparseLinear]
    assert_close(graph(x), in_float64(network, x))


class Joins(nn.Module):
    """Every way in which values are read twice, added in both orders, clamped after being read, and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = self.a(x)
        rectified = torch.relu(a)  # a is read again below
        b = self.b(rectified)
        first = a + b
        second = b + first
        same = first + first
        normed = self.norm(second)
        return first, nn.functional.relu6(normed), same.relu(), x + normed, normed.mean((2, 3))


def test_values_read_twice_are_what_they_were() -> None:
    network = sparsify(Joins(), 0.5)
    x = torch.randn(2, 4, 6, 5)
    graph = fused(network, x)
    expected = copy.deepcopy(network).double()(x.double())
    for y, reference in zip(graph(x), expected, strict=True):
        assert_close(y, reference.detach())


@settings(max_examples=15)
@given(st.data())
def test_random_chains_of_convolutions(data: st.DataObject) -> None:
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(data.draw(st.integers(1, 4))):
        out, kernel = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 3]))
        padding, stride = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([1, 1, 2]))
        layers += [nn.Conv2d(channels, out, kernel, stride, padding, bias=data.draw(st.booleans()))]
        extra = data.draw(st.sampled_from(["norm", "relu", "norm relu", "relu norm", "pool", ""]))
        made = {"norm": nn.BatchNorm2d(out), "relu": nn.ReLU(), "pool": nn.MaxPool2d(3, 1, 0)}
        layers += [made[name] for name in extra.split()]
        channels = out
    network = sparsify(nn.Sequential(*layers), data.draw(st.sampled_from([0.0, 0.8, 1.0]))).double()
    size = data.draw(st.integers(16, 24))
    x = torch.randn(data.draw(st.integers(1, 4)), 3, size, size, dtype=torch.float64)
    assert_close(fused(network, x)(x), network(x).detach(), 1e-10)


def test_a_layer_that_shall_stay_dense_does() -> None:
    network = sparsify(residual_network())
    x = torch.randn(2, 3, 32, 32)
    graph = fused(network, x, dense=("4.conv2",))
    assert any(type(module) is nn.Conv2d for module in graph.modules())
    assert_close(graph(x), in_float64(network, x))


def test_batch_norm_is_folded_into_linear_layers_too() -> None:
    network = sparsify(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    x = torch.randn(5, 8)
    assert [type(child) for child in fused(network, x).children()] == [SparseLinear]
    assert_close(fused(network, x)(x), in_float64(network, x))


def test_batch_norm_without_a_scale_is_folded_too() -> None:
    network = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32, affine=False), nn.ReLU(), nn.Linear(32, 5))
    assert len(list(check(network, (4, 16)).children())) == 1


class Excites(nn.Module):
    """Weighs channels by what the mean of all pixels says, as squeeze-and-excitation does."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 8, 3)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.after = nn.Conv2d(8, 5, 3)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        weights = self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.after(x * torch.sigmoid(weights))


@pytest.mark.skipif("llvm" not in available_kernels(), reason="llvmlite is not installed")
def test_what_comes_after_a_mean_is_another_part() -> None:
    graph = check(Excites(), (2, 3, 9, 9))
    assert sum(isinstance(part, SparsePlanes) for part in graph.modules()) == 3


class ChangesInPlace(nn.Module):
    """Clamps the outputs of a convolution in place, at a bound that small inputs do not reach."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.relu6 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU6(inplace=True)
        self.change = change

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.change(y)
        return self.second(y) + y


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "a function": lambda y: F.hardtanh_(y, -6.0, 6.0),
    "a function told to": lambda y: F.relu6(y, inplace=True),
    "a function told to by position": lambda y: F.hardtanh(y, -6.0, 6.0, True),
    "a method": lambda y: y.clamp_(max=6.0),
    "a method that only some inputs see": lambda y: y.masked_fill_(y > 6.0, 0.0),
    "out=": lambda y: torch.clamp(y, max=6.0, out=y),
    "a view": lambda y: y.view(-1).clamp_(max=6.0),
    "a flat view": lambda y: F.hardtanh_(y.flatten(1), -6.0, 6.0),
    "a part": lambda y: y[:, 0].clamp_(max=6.0),
    "one of some parts": lambda y: y.chunk(2, 1)[1].clamp_(max=6.0),
    "detached": lambda y: y.detach().clamp_(max=6.0),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", CHANGES)
def test_what_is_changed_in_place_and_read_again_is_refused(how: str, inference: bool) -> None:
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(UntraceableError, match="in place"), torch.inference_mode(mode=inference):
        fused(ChangesInPlace(CHANGES[how]), x)


class ChangesItsWeight(nn.Module):
    """Keeps a weight within bounds as it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data.clamp_(-0.1, 0.1)
        return self.conv(x)


def test_a_graph_in_which_a_weight_is_changed_is_refused() -> None:
    with pytest.raises(UntraceableError, match="in place"):
        fused(ChangesItsWeight(), torch.randn(1, 3, 4, 4))


class ChangesWhatItReadsOnce(nn.Module):
    """Adds and clamps in place where nobody else looks, through a view too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 3)

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.second(y).add_(y).relu_()
        return self.linear(F.relu_(y.mean((2, 3)).view(-1, 4)))


def test_what_is_changed_in_place_where_nobody_else_reads_is_fused() -> None:
    graph = check(ChangesWhatItReadsOnce(), (2, 3, 9, 9))
    assert any(isinstance(part, SparsePlanes) for part in graph.modules())


def test_graphs_are_pickled_and_copied() -> None:
    network = sparsify(residual_network())
    x = torch.randn(2, 3, 32, 32)
    graph = fused(network, x)
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(other(x), graph(x))
