from __future__ import annotations

import copy
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet18, resnet34, resnet50

from lightning_sparse.modules import SharedConvolution, share_weights, unshare_weights
from lightning_sparse.zoo import ResNet20


class Block(nn.Module):
    def __init__(self, channels: int, *, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.norm(self.conv(inputs)).relu()


def stage(blocks: int = 4, *, bias: bool = False) -> Any:
    return nn.Sequential(nn.Sequential(*(Block(4, bias=bias) for _ in range(blocks))))


def test_resnet_34_shares_eight_of_sixteen_blocks() -> None:
    shared = share_weights(resnet34())
    assert {name.rsplit(".", 1)[0] for name in shared} == {
        "layer1.2", "layer2.2", "layer2.3", "layer3.2", "layer3.3", "layer3.4", "layer3.5", "layer4.2",
    }  # fmt: skip
    assert {shared[f"layer3.{block}.conv1"] for block in (2, 3, 4, 5)} == {"layer3.1.conv1"}


def test_resnet_18_has_nothing_to_share_and_50_shares_three_convolutions_a_block() -> None:
    assert share_weights(resnet18()) == {}
    assert len(share_weights(resnet50())) == 3 * 8


def test_outputs_and_gradients_are_those_of_scaled_weights() -> None:
    net = stage(3).double()
    with torch.no_grad():
        reference = copy.deepcopy(net)
    share_weights(net)
    scale = net[0][2].conv.scale
    assert 0.0 <= scale.item() < 1.0
    with torch.no_grad():
        reference[0][2].conv.weight.copy_(scale * net[0][1].conv.weight)
    inputs = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert_close(net(inputs), reference(inputs))
    net(inputs).square().sum().backward()
    reference(inputs).square().sum().backward()
    own, others = reference[0][1].conv.weight.grad, reference[0][2].conv.weight.grad
    assert_close(net[0][1].conv.weight.grad, own + scale.detach() * others)
    assert_close(scale.grad, (others * net[0][1].conv.weight).sum())


def test_its_state_is_that_of_the_plain_network() -> None:
    net, plain = stage(4, bias=True), stage(4, bias=True)
    share_weights(net)
    assert list(net.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    inputs = torch.randn(2, 4, 5, 5)
    assert_close(plain.eval()(inputs), net.eval()(inputs))


def test_loading_its_own_state_finds_the_scalars() -> None:
    net, other = stage(), stage()
    share_weights(net)
    share_weights(other)
    other.load_state_dict(net.state_dict())
    for block in (2, 3):
        assert_close(other[0][block].conv.scale, net[0][block].conv.scale)


def test_loading_where_the_source_is_all_zero_keeps_the_scalar() -> None:
    net = stage()
    share_weights(net)
    state = net.state_dict()
    state["0.1.conv.weight"] = torch.zeros(4, 4, 3, 3)
    before = net[0][2].conv.scale.item()
    net.load_state_dict(state)
    assert net[0][2].conv.scale.item() == before


def test_a_state_that_lacks_a_shared_weight_is_an_error() -> None:
    net = stage()
    share_weights(net)
    state = net.state_dict()
    del state["0.3.conv.weight"]
    with pytest.raises(RuntimeError, match=r"0\.3\.conv\.scale"):
        net.load_state_dict(state)


def test_unsharing_computes_the_same_with_plain_convolutions() -> None:
    net = stage(4, bias=True).eval()
    share_weights(net)
    inputs = torch.randn(2, 4, 5, 5)
    before = net(inputs)
    assert unshare_weights(net) == ["0.2.conv", "0.3.conv"]
    assert not any(isinstance(module, SharedConvolution) for module in net.modules())
    assert torch.equal(net(inputs), before)


def test_a_second_call_changes_nothing() -> None:
    net = stage()
    assert len(share_weights(net)) == 2
    scale = net[0][2].conv.scale
    assert share_weights(net) == {}
    assert net[0][2].conv.scale is scale


def test_a_copy_shares_within_itself() -> None:
    net = stage()
    share_weights(net)
    copied = copy.deepcopy(net)
    assert copied[0][2].conv.source is copied[0][1].conv


@pytest.mark.parametrize("own", [1, 2, 3])
def test_the_first_blocks_keep_their_weights(own: int) -> None:
    assert set(share_weights(stage(4), own=own)) == {f"0.{block}.conv" for block in range(own, 4)}


def test_blocks_that_differ_in_shape_are_not_shared() -> None:
    net = nn.Sequential(nn.Sequential(Block(4), Block(4), nn.Conv2d(4, 6, 1), Block(6)))
    assert share_weights(net) == {}


def test_stages_can_be_chosen_by_name_and_unknown_ones_are_named() -> None:
    net = resnet34()
    assert {name.split(".")[0] for name in share_weights(net, stages=["layer[34]"])} == {"layer3", "layer4"}
    with pytest.raises(
        ValueError,
        match=r"stages='block\*' matches no stage of more than 2 equal blocks.*layer1, layer2, layer3, layer4",
    ):
        share_weights(resnet34(), stages=["block*"])


def test_the_module_itself_may_be_a_stage() -> None:
    net = stage()[0]
    inputs = torch.randn(2, 4, 5, 5)
    assert share_weights(net, stages=["*"]) == {"2.conv": "1.conv", "3.conv": "1.conv"}
    assert net[3].conv.source is net[1].conv
    assert net(inputs).shape == inputs.shape
    assert share_weights(net) == {}
    with pytest.raises(ValueError, match=r"The stages are the module itself, which is '\*'\."):
        share_weights(stage()[0], stages=["layer1"])


def test_stages_within_a_chain_are_found() -> None:
    shared = share_weights(ResNet20())
    assert shared == {
        f"layer{stage}.2.conv{conv}": f"layer{stage}.1.conv{conv}" for stage in (1, 2, 3) for conv in (1, 2)
    }


class Rescaled(nn.Conv2d):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(inputs, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    "make", [lambda: Rescaled(2, 2, 1), lambda: nn.LazyConv2d(2, 1), lambda: nn.utils.weight_norm(nn.Conv2d(2, 2, 1))]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:Lazy modules")
def test_convolutions_that_compute_something_else_keep_their_weights(make: Any) -> None:
    network = nn.ModuleDict({"layer": nn.Sequential(*(nn.Sequential(make()) for _ in range(3)))})
    assert share_weights(network) == {}


def test_weights_that_are_not_needed_are_not_kept() -> None:
    network: Any = resnet34()
    weight = ref(network.layer1[2].conv1.weight)
    share_weights(network)
    assert weight() is None
