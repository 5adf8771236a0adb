"""What accelerate and shrink work on: copies, in which layers of others are torch's own; or a refusal in words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers.pytorch_utils import Conv1D

from lightning_sparse import accelerate, shrink
from lightning_sparse.execution.copying import with_linear_layers
from tests.execution.networks import Untraceable, assert_close

QUICK = 0.02
MAKERS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "accelerate": lambda module, x: accelerate(module, x, threads=1, seconds=QUICK),
    "shrink": shrink,
}


def of_gpt2() -> nn.Sequential:
    """The two layers of a block of GPT-2, which store their weights the other way round."""
    network = nn.Sequential(Conv1D(1024, 256), nn.ReLU(), Conv1D(256, 1024)).eval()
    for name, weight in network.named_parameters():
        if name.endswith("weight"):
            weight.data.mul_(torch.rand_like(weight) > 0.98)
    return network


@pytest.mark.parametrize("wrap", [lambda network: network, Untraceable], ids=["a graph", "one by one"])
def test_layers_of_gpt2_gain_like_linear_ones(wrap: Callable[[nn.Module], nn.Module]) -> None:
    network, x = wrap(of_gpt2()), torch.randn(16, 256)
    before = copy.deepcopy(network.state_dict())
    fast = accelerate(network, x, threads=1, seconds=QUICK)
    assert [layer.sparse for layer in fast.report.layers] == [True, True]
    for rows in (x, x[:1], x[None]):
        with torch.no_grad():
            assert_close(fast(rows), network(rows))
    assert sum(isinstance(part, Conv1D) for part in network.modules()) == 2
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_layer_of_gpt2_that_is_used_twice_is_replaced_at_both_places() -> None:
    layer = Conv1D(8, 8)
    network = with_linear_layers(nn.Sequential(layer, nn.ReLU(), layer))
    assert network.get_submodule("0") is network.get_submodule("2")
    assert type(network.get_submodule("0")) is nn.Linear


def test_layers_without_a_sparse_form_are_named() -> None:
    network = nn.LSTM(8, 8).eval()
    network.get_parameter("weight_hh_l0").data[:, :4] = 0
    fast = accelerate(network, torch.randn(3, 2, 8), threads=1, seconds=QUICK)
    assert [layer.reason for layer in fast.report.layers] == ["LSTM has no sparse form"]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_wrapper_is_refused(make: Callable[[nn.Module, Any], nn.Module]) -> None:
    with pytest.raises(ValueError, match="DataParallel is a wrapper; give the module inside"):
        make(nn.DataParallel(nn.Linear(4, 3)), torch.randn(2, 4))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_compiled_module_is_refused(make: Callable[[nn.Module, Any], nn.Module]) -> None:
    compiled: Any = torch.compile(nn.Linear(4, 3), backend="eager")
    with pytest.raises(ValueError, match=r"comes from torch\.compile; give the one that was compiled"):
        make(compiled, torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch to")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_code_of_torchscript_is_refused(make: Callable[[nn.Module, Any], nn.Module]) -> None:
    traced: Any = torch.jit.trace(nn.Linear(4, 3), torch.randn(2, 4))
    network = nn.Sequential(traced, nn.ReLU())
    with pytest.raises(ValueError, match="is code of TorchScript, wholly or in part; give the module"):
        make(network, torch.randn(2, 4))


@pytest.fixture
def alone(tmp_path: Any) -> Any:
    """A group of this one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["fully_shard", "parallelize_module"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_sharded_module_is_refused(make: Callable[[nn.Module, Any], nn.Module], how: str, alone: Any) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    if how == "fully_shard":
        fully_shard(network, mesh=alone)
    else:
        parallelize_module(network, alone, {"0": ColwiseParallel()})
    before = [type(part) for part in network.modules()]
    with pytest.raises(ValueError, match="is sharded: each process holds a part of its weights"):
        make(network, torch.randn(2, 4))
    assert [type(part) for part in network.modules()] == before
