"""Transformers: attention and its feed-forward part, with zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from lightning_sparse.execution import accelerate
from lightning_sparse.execution.accelerated import Recipe
from lightning_sparse.execution.attention import SparseSelfAttention, why_dense_attention
from lightning_sparse.execution.fuse import fuse
from lightning_sparse.execution.kernels import available_kernels
from lightning_sparse.execution.layers import InputSpec
from lightning_sparse.execution.linear import SparseLinear
from lightning_sparse.execution.tracing import trace
from tests.execution.networks import Untraceable, assert_close, in_float64, sparsify


@pytest.mark.parametrize("kernels", available_kernels())
@pytest.mark.parametrize("batch_first", [True, False])
def test_sparse_attention_is_dense_attention(batch_first: bool, kernels: str) -> None:
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    attention.in_proj_weight.data.mul_(torch.rand(36, 12) > 0.8)
    sparse = SparseSelfAttention(attention, kernels=kernels, threads=1)
    for shape in [(4, 7, 12), (1, 1, 12), (7, 12)]:
        x = torch.randn(shape)
        expected = copy.deepcopy(attention).double()(x.double(), x.double(), x.double())[0]
        assert_close(sparse(x, x, x, need_weights=False)[0], expected.detach())


def test_masks_other_keys_and_weights_are_left_to_dense_attention() -> None:
    attention = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    sparse = SparseSelfAttention(attention, kernels="torch_csr", threads=1)
    x, other, mask = torch.randn(2, 5, 12), torch.randn(2, 5, 12), torch.ones(5, 5).triu(1).bool()
    for args, kwargs in [
        ((x, x, x), {"attn_mask": mask, "need_weights": False}),
        ((x, other, other), {}),
        ((x, x, x), {}),
    ]:
        torch.testing.assert_close(sparse(*args, **kwargs), attention(*args, **kwargs), rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layers_of_torch_call_their_sparse_layers(activation: str) -> None:
    layer = sparsify(nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, activation=activation), 0.98)
    layer.self_attn.in_proj_weight.data.mul_(torch.rand(768, 256) > 0.98)
    recipe = Recipe(frozenset({"self_attn", "linear1", "linear2"}), False, available_kernels()[0], 1, (), {})
    x = torch.randn(3, 7, 256)
    assert_close(recipe.make(layer)(x), in_float64(layer, x))


def encoder(norm: nn.Module | None = None) -> nn.TransformerEncoder:
    """Two layers with zeros."""
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)
    return sparsify(nn.TransformerEncoder(layer, 2, norm), 0.98)


class Block(nn.Module):
    """A block of one's own, which calls attention of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(256, 4, batch_first=True)
        self.out = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("inside", [encoder, lambda: sparsify(Block(), 0.98)], ids=["encoder", "block"])
def test_in_a_graph_layers_are_sparse_inside_what_it_calls_as_one(inside: Any) -> None:
    network = nn.Sequential(nn.Linear(16, 256), inside(), nn.Linear(256, 8)).eval()
    layers = frozenset(
        name
        for name, part in network.named_modules()
        if type(part) in (nn.Linear, nn.MultiheadAttention) and name.startswith("1.")
    )
    x = torch.randn(3, 7, 16)
    fast = Recipe(layers, True, available_kernels()[0], 1, (InputSpec.of(x),), {}).make(network)
    attentions = sum(isinstance(part, SparseSelfAttention) for part in fast.modules())
    assert attentions == sum(isinstance(part, nn.MultiheadAttention) for part in network.modules())
    assert sum(isinstance(part, SparseLinear) for part in fast.modules()) == len(layers) + attentions
    with torch.no_grad():
        assert_close(fast(x), in_float64(network, x))


PADDED = torch.arange(7) >= torch.tensor([[7], [4], [1]])
SCATTERED = PADDED.flip(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(256)], ids=["no norm", "a norm"])
@pytest.mark.parametrize("hidden", [PADDED, SCATTERED, None], ids=["padded", "scattered", "nothing"])
def test_encoders_hide_what_torch_hides(hidden: Tensor | None, norm: nn.Module | None) -> None:
    network, x = encoder(norm), torch.randn(3, 7, 256)
    if network.norm is not None:
        network.norm.get_parameter("bias").data.fill_(3)
    layers = {f"layers.{number}.{part}" for number in range(2) for part in ("self_attn", "linear1", "linear2")}
    fast = Recipe(frozenset(layers), False, available_kernels()[0], 1, (), {}).make(network)
    masks = [hidden] if hidden is None else [hidden, torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)]
    for mask in masks:
        with torch.no_grad():
            assert_close(fast(x, src_key_padding_mask=mask), network(x, src_key_padding_mask=mask))
    assert network.use_nested_tensor


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_example_may_have_padding() -> None:
    x = torch.randn(3, 7, 256)
    fast = accelerate(encoder(), {"src": x, "src_key_padding_mask": PADDED}, threads=1, seconds=0.02)
    assert not any("One variant" in note for note in fast.report.notes)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_example_is_refused() -> None:
    with pytest.raises(ValueError, match="example_input is nested; give a plain tensor"):
        accelerate(encoder(), torch.nested.as_nested_tensor(torch.randn(3, 7, 256)))


@pytest.mark.parametrize("settings", [{"kdim": 4}, {"add_zero_attn": True}, {"add_bias_kv": True}], ids=str)
def test_other_attention_is_refused_in_words(settings: dict[str, Any]) -> None:
    attention = nn.MultiheadAttention(8, 2, **settings)
    assert why_dense_attention(attention)
    with pytest.raises(ValueError, match="Leave it dense"):
        SparseSelfAttention(attention, kernels="torch_csr", threads=1)


@pytest.mark.parametrize("kernels", available_kernels())
def test_a_gelu_is_fused_between_linear_layers(kernels: str) -> None:
    network = sparsify(nn.Sequential(nn.Linear(20, 37), nn.GELU(), nn.Linear(37, 20), nn.GELU()), 0.7)
    network.get_parameter("0.bias").data.mul_(20)
    x = torch.randn(3, 5, 20)
    graph = fuse(
        trace(copy.deepcopy(network).requires_grad_(False), (x,)), lambda name: True, kernels=kernels, threads=1
    )
    assert [type(child) for child in graph.children()] == [nn.GELU, SparseLinear] or [
        type(child) for child in graph.children()
    ] == [SparseLinear, nn.GELU]
    for shape in [(3, 5, 20), (1, 20), (70, 20)]:
        x = torch.randn(shape)
        assert_close(graph(x), in_float64(network, x))


def test_the_gelu_of_the_kernels_is_that_of_torch_everywhere() -> None:
    values = torch.cat([torch.linspace(-12, 12, 5000), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])])
    network = nn.Sequential(nn.Linear(1, 1), nn.GELU(), nn.Linear(1, 1)).requires_grad_(False)
    for parameter, value in zip(network.parameters(), (1.0, 0.0, 1.0, 0.0), strict=True):
        parameter.fill_(value)
    graph = fuse(trace(network, (values[:, None],)), lambda name: True, kernels="llvm", threads=1)
    actual, expected = graph(values[:, None])[:, 0], F.gelu(values.double())
    assert ((actual - expected).abs() / expected.abs().clamp_min(1)).max() < 1e-6
    assert torch.isnan(graph(torch.full((1, 1), float("nan")))).all()


def test_a_vision_transformer_is_accelerated_whole() -> None:
    network = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=5
    )
    nn.init.normal_(network.get_parameter("heads.head.weight"))
    network = sparsify(network, 0.98)
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.data.mul_(torch.rand_like(module.in_proj_weight) > 0.98)
    x = torch.randn(4, 3, 32, 32)
    fast = accelerate(network, x, threads=1, seconds=0.02)
    names = [layer.name for layer in fast.report.layers]
    assert "encoder.layers.encoder_layer_0.self_attention" in names
    x = torch.randn(2, 3, 32, 32)
    assert_close(fast(x), in_float64(network, x), 1e-4)


@pytest.mark.parametrize("wrap", [nn.Sequential, Untraceable])
def test_one_layer_alone_is_accelerated(wrap: type[nn.Module]) -> None:
    layer = sparsify(nn.Linear(1024, 1024), 0.99)
    for network in (layer, wrap(layer)):
        fast = accelerate(network, torch.randn(16, 1024), threads=1, seconds=0.02)
        assert fast.report.accelerated
        x = torch.randn(2, 1024)
        assert_close(fast(x), in_float64(layer, x))
