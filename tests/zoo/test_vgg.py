from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.vgg import cfgs, make_layers  # pyright: ignore[reportUnknownVariableType]

from lightning_sparse.masks import select_weights
from lightning_sparse.zoo import VGG16, VGG19
from tests.zoo.test_networks import calls_per_relu, num_parameters


@pytest.mark.parametrize(
    ("build", "parameters", "weights"), [(VGG16, 14_987_722, 14_977_728), (VGG19, 20_040_522, 20_024_000)]
)
def test_the_networks_have_the_papers_numbers_of_parameters(
    build: type[VGG16 | VGG19], parameters: int, weights: int
) -> None:
    network = build()
    assert num_parameters(network) == parameters
    assert sum(candidate.parameter.numel() for candidate in select_weights(network).masked) == weights


@pytest.mark.parametrize(("build", "relus"), [(VGG16, 14), (VGG19, 16)])
def test_every_activation_is_a_module_that_is_called_once(build: type[VGG16 | VGG19], relus: int) -> None:
    assert calls_per_relu(build(width=4)) == [1] * relus


@pytest.mark.parametrize("build", [VGG16, VGG19])
def test_images_become_one_logit_per_class(build: type[VGG16 | VGG19]) -> None:
    assert build(num_classes=7, width=4)(torch.zeros(3, 3, 32, 32)).shape == (3, 7)


def test_the_convolutions_of_vgg_19_are_torchvisions() -> None:
    expected = {name: value.shape for name, value in make_layers(cfgs["E"], batch_norm=True).state_dict().items()}
    assert {name: value.shape for name, value in VGG19().get_submodule("features").state_dict().items()} == expected


def test_the_convolutions_of_vgg_16_are_torchvisions_without_biases() -> None:
    theirs = make_layers(cfgs["D"], batch_norm=True)
    dense = {f"{index}.bias" for index, module in enumerate(theirs) if isinstance(module, nn.Conv2d)}
    expected = {name: value.shape for name, value in theirs.state_dict().items() if name not in dense}
    assert {name: value.shape for name, value in VGG16().get_submodule("features").state_dict().items()} == expected


def test_the_norms_of_vgg_16_begin_at_a_half_but_for_the_classifiers() -> None:
    network = VGG16(width=4)
    scales = [module.weight.unique().tolist() for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert scales == [[0.5]] * 13
    assert [module.weight.unique().tolist() for module in network.modules() if isinstance(module, nn.BatchNorm1d)] == [
        [1.0]
    ]


def test_the_convolutions_of_vgg_19_begin_with_he_variance() -> None:
    torch.manual_seed(0)
    convolutions = [module for module in VGG19(width=16).modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions[1:]:
        fan_in = convolution.weight[0].numel()
        assert convolution.weight.var().item() == pytest.approx(2 / fan_in, rel=0.1)
        assert convolution.bias is not None
        assert not convolution.bias.any()
