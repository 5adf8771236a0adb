"""A sparse network is a plain dense module with zeros in it: whatever exports the one exports the other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import DST, FGGP, RigL
from tests.helpers import ConvToy, make_trainer

METHODS: dict[str, Any] = {
    "fggp": lambda: FGGP(0.8, update_every=1, stop=5),
    "rigl": lambda: RigL(0.8, update_every=2, stop=6),
    "dst": lambda: DST(alpha=0.1),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:DST. .* has collapsed to sparsity"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # torch 2.9 loads its own archives so
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
]


@pytest.fixture(scope="module", params=METHODS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Sequential:
    """A small CNN, trained for eight steps by a method of each family."""
    model = ConvToy()
    make_trainer(tmp_path_factory.mktemp("fit"), callbacks=[METHODS[request.param]()], max_epochs=1).fit(model)
    zeros = sum(int((weight == 0).sum()) for weight in model.parameters() if weight.dim() > 1)
    assert zeros > 100
    return model.network.eval()


@pytest.fixture
def inputs() -> Tensor:
    """Two images."""
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(3))


def same_zeros(exported: dict[str, Tensor], network: nn.Module) -> bool:
    return all(torch.equal(exported[name], value) for name, value in network.state_dict().items())


def test_it_has_the_parts_of_a_dense_one(network: nn.Sequential) -> None:
    dense = ConvToy().network
    assert [type(part) for part in network.modules()] == [type(part) for part in dense.modules()]
    assert network.state_dict().keys() == dense.state_dict().keys()
    assert all(type(parameter) is nn.Parameter for parameter in network.parameters())
    for part in network.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert "forward" not in vars(part)
    assert same_zeros(copy.deepcopy(network).state_dict(), network)


def test_torch_export(network: nn.Sequential, inputs: Tensor, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(network, (inputs,)), tmp_path / "network.pt2")
    program = torch.export.load(tmp_path / "network.pt2")
    torch.testing.assert_close(program.module()(inputs), network(inputs))
    assert same_zeros(program.state_dict, network)


@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript(how: str, network: nn.Sequential, inputs: Tensor, tmp_path: Path) -> None:
    scripted: Any = torch.jit.trace(network, inputs) if how == "trace" else torch.jit.script(network)
    torch.jit.save(scripted, tmp_path / "network.pt")
    loaded: Any = torch.jit.load(tmp_path / "network.pt")
    torch.testing.assert_close(loaded(inputs), network(inputs))
    assert same_zeros(loaded.state_dict(), network)


def test_onnx(network: nn.Sequential, inputs: Tensor, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "network.onnx"
    torch.onnx.export(network, (inputs,), path, dynamo=True, verbose=False, external_data=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), network(inputs), rtol=1e-4, atol=1e-5)
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
    linear = network.get_parameter("6.weight").detach().numpy()
    assert any(weight.shape == linear.shape and (weight == linear).all() for weight in weights.values())
