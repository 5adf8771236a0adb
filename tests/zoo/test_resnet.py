from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models import resnet as torchvision

from lightning_sparse.masks import select_weights
from lightning_sparse.zoo import ResNet20, ResNet34, ResNet50
from lightning_sparse.zoo.resnet import ZeroPaddedShortcut
from tests.zoo.test_networks import calls_per_relu, num_parameters

ResNet = ResNet20 | ResNet34 | ResNet50


# EAST counts the weights of ResNet-34 and ResNet-50 so; He et al. give ResNet-20 0.27 million parameters.
@pytest.mark.parametrize(
    ("build", "parameters", "weights"),
    [(ResNet20, 269_722, 268_336), (ResNet34, 21_282_112, 21_265_088), (ResNet50, 23_520_832, 23_467_712)],
)
def test_the_networks_have_the_papers_numbers_of_weights(build: type[ResNet], parameters: int, weights: int) -> None:
    network = build()
    assert num_parameters(network) == parameters
    assert sum(candidate.parameter.numel() for candidate in select_weights(network).masked) == weights


# The stem, and each block's two or three.
@pytest.mark.parametrize(("build", "relus"), [(ResNet20, 1 + 9 * 2), (ResNet34, 1 + 16 * 2), (ResNet50, 1 + 16 * 3)])
def test_every_activation_is_a_module_that_is_called_once(build: type[ResNet], relus: int) -> None:
    assert calls_per_relu(build(width=4)) == [1] * relus


@pytest.mark.parametrize(
    ("build", "depths"), [(ResNet20, [3, 3, 3]), (ResNet34, [3, 4, 6, 3]), (ResNet50, [3, 4, 6, 3])]
)
def test_stages_are_chains_of_blocks(build: type[ResNet], depths: list[int]) -> None:
    stages = [module for name, module in build(width=4).named_children() if name.startswith("layer")]
    assert all(type(stage) is nn.Sequential for stage in stages)
    assert [len(list(stage.children())) for stage in stages] == depths


@pytest.mark.parametrize("build", [ResNet20, ResNet34, ResNet50])
def test_images_become_one_logit_per_class(build: type[ResNet]) -> None:
    assert build(num_classes=7, width=4)(torch.zeros(3, 3, 32, 32)).shape == (3, 7)


@pytest.mark.parametrize(("build", "theirs"), [(ResNet34, torchvision.resnet34), (ResNet50, torchvision.resnet50)])
def test_torchvision_computes_the_same_with_the_same_weights(
    build: type[ResNet], theirs: Callable[[], torchvision.ResNet]
) -> None:
    torch.manual_seed(0)
    network, expected = build(), theirs()
    expected.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    expected.maxpool = nn.Identity()  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    expected.fc = nn.Linear(expected.fc.in_features, 10, bias=False)
    expected.load_state_dict(network.state_dict())
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(network(images), expected(images))


def test_shortcuts_of_resnet_20_have_no_parameters() -> None:
    network = ResNet20(width=4)
    shortcuts = [module for module in network.modules() if isinstance(module, ZeroPaddedShortcut)]
    assert len(shortcuts) == 2
    assert not any("downsample" in name for name in network.state_dict())


def test_a_shortcut_of_zeros_keeps_every_second_pixel() -> None:
    inputs = torch.randn(2, 3, 6, 8)
    outputs = ZeroPaddedShortcut(3, 5, stride=2)(inputs)
    for row in range(3):
        for column in range(4):
            torch.testing.assert_close(outputs[:, :3, row, column], inputs[:, :, 2 * row, 2 * column])
    assert outputs.shape == (2, 5, 3, 4)
    assert not outputs[:, 3:].any()


def test_a_shortcut_of_zeros_cannot_remove_channels() -> None:
    with pytest.raises(ValueError, match=r"out_channels is 2 and in_channels 3; .* Give at least as many"):
        ZeroPaddedShortcut(3, 2, stride=1)


def test_the_convolutions_of_resnet_20_begin_with_he_variance() -> None:
    torch.manual_seed(0)
    for module in ResNet20(width=32).modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 3:
            assert module.weight.var().item() == pytest.approx(2 / module.weight[0].numel(), rel=0.1)
