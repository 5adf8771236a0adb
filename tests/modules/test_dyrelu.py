from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from lightning_sparse.modules import DyReLU, PhasedReLU


def network() -> Any:
    return nn.Sequential(nn.Linear(4, 8), PhasedReLU(nn.ReLU(), [8]), nn.Linear(8, 2))


def plain() -> Any:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(("channels", "reduction"), [(64, 4), (2048, 4), (64, 8)])
def test_the_hyper_function_is_as_large_as_its_formula_says(channels: int, reduction: int) -> None:
    size = sum(parameter.numel() for parameter in DyReLU(channels, reduction).parameters())
    assert size == 5 * channels**2 // reduction + 4 * channels + channels // reduction


def test_theta_is_what_the_paper_says() -> None:
    module = DyReLU(8).double()
    inputs = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    hidden = (inputs.mean(dim=(2, 3)) @ module.squeeze.weight.T + module.squeeze.bias).clamp(min=0)
    theta = (2 * torch.sigmoid(hidden @ module.excite.weight.T + module.excite.bias) - 1).view(3, 4, 8, 1, 1)
    first = (1 + theta[:, 0]) * inputs + 0.5 * theta[:, 2]
    second = theta[:, 1] * inputs + 0.5 * theta[:, 3]
    assert_close(module(inputs), torch.maximum(first, second))


def test_a_phased_out_site_is_relu_and_has_no_state() -> None:
    net, reference = network(), plain()
    net[1].phase_out()
    reference.load_state_dict(net.state_dict())  # strict
    inputs = torch.randn(5, 4)
    assert torch.equal(net(inputs), reference(inputs))


def test_a_state_without_its_parameters_phases_a_site_out() -> None:
    net = network()
    net.load_state_dict(plain().state_dict())
    assert net[1].is_phased_out
    assert net[1].beta == 0.0


def test_a_state_with_its_parameters_brings_it_back() -> None:
    net, saved = network(), network()
    saved[1].beta.fill_(0.25)
    net[1].phase_out()
    net.load_state_dict(saved.state_dict())
    inputs = torch.randn(5, 4)
    assert not net[1].is_phased_out
    assert torch.equal(net(inputs), saved(inputs))


def test_one_without_channels_learns_them_from_a_state() -> None:
    saved, net = network(), plain()
    net[1] = PhasedReLU(nn.ReLU(), [])
    inputs = torch.randn(5, 4)
    assert net[1].is_phased_out
    assert net(inputs).shape == (5, 2)
    net.load_state_dict(saved.state_dict())
    assert torch.equal(net(inputs), saved(inputs))


def test_half_a_state_is_an_error() -> None:
    state = network().state_dict()
    del state["1.dyrelu.8.squeeze.weight"]
    with pytest.raises(RuntimeError, match="squeeze"):
        network().load_state_dict(state)


def test_a_copy_is_phased_out_with_its_original() -> None:
    net = network()
    averaged = copy.deepcopy(net)
    net[1].phase_out()
    assert averaged[1].is_phased_out
    assert list(averaged.state_dict()) == list(plain().state_dict())


def test_it_can_be_pickled() -> None:
    net = network()
    inputs = torch.randn(5, 4)
    assert torch.equal(pickle.loads(pickle.dumps(net))(inputs), net(inputs))


def test_channels_that_were_not_expected_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(2, 6\) came to a ReLU that was prepared for 8 channels"):
        PhasedReLU(nn.ReLU(), [8])(torch.zeros(2, 6))


def test_one_site_takes_several_numbers_of_channels() -> None:
    site = PhasedReLU(nn.ReLU(), [4, 8])
    assert [site(torch.zeros(2, size, 3)).shape[1] for size in (4, 8)] == [4, 8]


def test_a_compiled_site_is_not_compiled_anew_when_beta_moves() -> None:
    net = network()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter)
    for beta in (1.0, 0.7, 0.3, 0.1):
        net[1].beta.fill_(beta)
        compiled(torch.randn(5, 4))
    assert counter.frame_count == 1
    net[1].phase_out()
    inputs = torch.randn(5, 4)
    assert_close(compiled(inputs), net(inputs))
