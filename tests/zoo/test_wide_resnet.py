from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_sparse.zoo import WideResNet
from lightning_sparse.zoo.wide_resnet import PreActivationBlock
from tests.zoo.test_networks import calls_per_relu, num_parameters


# Zagoruyko and Komodakis state 11.0, 36.5 and 8.9 million.
@pytest.mark.parametrize(
    ("depth", "widen_factor", "expected"),
    [(16, 8, 10_961_370), (28, 8, 23_354_842), (28, 10, 36_479_194), (40, 4, 8_949_210)],
)
def test_the_networks_have_the_papers_numbers_of_parameters(depth: int, widen_factor: int, expected: int) -> None:
    with torch.device("meta"):
        assert num_parameters(WideResNet(depth, widen_factor)) == expected


@pytest.mark.parametrize(("depth", "blocks"), [(10, 1), (16, 2), (28, 4)])
def test_the_depth_is_that_of_three_stages_of_blocks(depth: int, blocks: int) -> None:
    network = WideResNet(depth, widen_factor=1)
    stages = [module for name, module in network.named_children() if name.startswith("layer")]
    assert [len(list(stage.children())) for stage in stages] == [blocks] * 3
    assert calls_per_relu(network) == [1] * (6 * blocks + 1)


def test_images_become_one_logit_per_class() -> None:
    assert WideResNet(16, widen_factor=2, num_classes=7)(torch.zeros(3, 3, 32, 32)).shape == (3, 7)


@pytest.mark.parametrize("depth", [4, 15, 17])
def test_other_depths_are_an_error_that_names_some_that_exist(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth is {depth}; .* 10, 16, 22, 28"):
        WideResNet(depth)


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 1), (8, 2)])
def test_a_block_is_what_the_paper_draws(channels: int, stride: int) -> None:
    torch.manual_seed(0)
    block = PreActivationBlock(4, channels, stride)
    inputs = torch.randn(2, 4, 6, 6)
    activated = F.relu(F.batch_norm(inputs, None, None, training=True))
    hidden = F.relu(F.batch_norm(F.conv2d(activated, block.conv1.weight, None, stride, 1), None, None, training=True))
    residual = F.conv2d(hidden, block.conv2.weight, padding=1)
    shortcut = inputs if block.shortcut is None else F.conv2d(activated, block.shortcut.weight, None, stride)
    assert (block.shortcut is None) == (channels == 4)
    torch.testing.assert_close(block(inputs), residual + shortcut)


def test_a_stride_without_new_channels_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"stride is 2, but 4 channels come in and go out.*Give stride 1"):
        PreActivationBlock(4, 4, stride=2)
