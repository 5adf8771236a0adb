from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_sparse.zoo import LeNet5Caffe, LeNet300100


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def calls_per_relu(network: nn.Module) -> list[int]:
    """How often each ``nn.ReLU`` of a network for 32 x 32 images is called in one forward."""
    relus = [module for module in network.modules() if isinstance(module, nn.ReLU)]
    calls: dict[nn.Module, int] = dict.fromkeys(relus, 0)

    def count(module: nn.Module, inputs: object, output: object) -> None:
        calls[module] += 1

    for relu in relus:
        relu.register_forward_hook(count)
    network(torch.zeros(2, 3, 32, 32))
    return list(calls.values())


@pytest.mark.parametrize(("network", "expected"), [(LeNet300100(), 266_610), (LeNet5Caffe(), 431_080)])
def test_networks_have_as_many_parameters_as_the_papers_state(network: nn.Module, expected: int) -> None:
    assert num_parameters(network) == expected


@pytest.mark.parametrize("network", [LeNet300100(num_classes=7), LeNet5Caffe(num_classes=7)])
def test_mnist_images_become_one_logit_per_class(network: nn.Module) -> None:
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 7)


def test_lenet_300_100_takes_images_of_another_size() -> None:
    assert LeNet300100(in_features=64)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(("network", "hidden"), [(LeNet300100(), 2), (LeNet5Caffe(), 3)])
def test_every_hidden_layer_has_a_relu(network: nn.Module, hidden: int) -> None:
    assert sum(isinstance(module, nn.ReLU) for module in network.modules()) == hidden
