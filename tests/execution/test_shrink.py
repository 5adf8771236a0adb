from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from lightning_sparse import GMP
from lightning_sparse.execution import dead_units, shrink
from lightning_sparse.execution.shrinking.layers import LiveInputs
from lightning_sparse.zoo import VGG16, LeNet5Caffe, LeNet300100, ResNet20, ResNet34, ResNet50, RowLSTM, WideResNet
from tests.helpers import ToyModel, make_trainer


def randomise(module: nn.Module, sparsity: float, seed: int = 0) -> Any:
    """Double precision, random weights with zeros at random, whole rows of zeros, biases that are mostly not zero, and
    norms as after training; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    module.double().eval()
    for parameter in module.parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            value /= max(1.0, (1 - sparsity) * parameter[0].numel()) ** 0.5
            value[rand(*parameter.shape) < sparsity] = 0
            value[rand(len(parameter)) < sparsity / 2] = 0
        else:
            value[rand(*parameter.shape) < 0.3] = 0
        parameter.data.copy_(value)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(rand(*buffer.shape) + 0.5)
    return module


def check_equal(module: nn.Module, *inputs: Tensor, others: tuple[Tensor, ...] | None = None) -> Any:
    """Shrink, compare on the example and on inputs of another size, and return what is left."""
    before = copy.deepcopy(module.state_dict())
    small: Any = shrink(module, inputs)
    for example in (inputs, others or tuple(torch.cat([part, part.flip(0)]) for part in inputs)):
        with torch.no_grad():
            expected, got = module(*example), small(*example)
        if isinstance(expected, tuple):
            expected, got = expected[0], got[0]
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.state_dict().keys() == before.keys()
    return small


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


# By hand.


def test_a_neuron_without_inputs_is_folded_into_the_next_bias() -> None:
    module: Any = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))
        module[0].bias.copy_(torch.tensor([0.5, 3.0, -3.0]))
        module[2].weight.copy_(torch.tensor([[4.0, 5.0, 6.0]]))
        module[2].bias.fill_(7.0)
    small: Any = shrink(module, torch.ones(1, 2))
    assert small[0].weight.tolist() == [[1.0, 2.0]]
    assert small[2].weight.tolist() == [[4.0]]
    assert small[2].bias.tolist() == [7.0 + 5 * 3.0]  # relu(3) and relu(-3)


def test_a_neuron_that_nothing_reads_takes_along_what_only_it_reads() -> None:
    module: Any = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    with torch.no_grad():
        for layer in module:
            layer.weight.copy_(torch.eye(3))
        module[3].weight[:, 1:] = 0
    assert [tuple(layer.weight.shape) for layer in shrink(module, torch.ones(1, 3))] == [(1, 3), (1, 1), (1, 1), (3, 1)]


def test_a_constant_goes_through_norm_and_activation() -> None:
    module: Any = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0), nn.Tanh(), nn.Conv2d(2, 1, 3, bias=False)
    )
    module.eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
        module[1].running_mean.copy_(torch.tensor([0.0, 4.0]))
        module[1].running_var.fill_(4.0)
        module[1].weight.fill_(3.0)
        module[1].bias.fill_(1.0)
        module[3].weight.fill_(0.5)
    small: Any = shrink(module, torch.ones(1, 1, 5, 5))
    assert small[1].num_features == 1
    assert small[3].in_channels == 1
    constant = torch.tanh(torch.tensor((0.0 - 4.0) / 2 * 3 + 1))
    torch.testing.assert_close(small[3].bias, (9 * 0.5 * constant).view(1))


def padded(constants: list[float]) -> Any:
    module: Any = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)).double().eval()
    with torch.no_grad():
        module[0].weight[len(constants) * -1 :] = 0
        module[0].bias[len(constants) * -1 :] = torch.tensor(constants, dtype=torch.float64)
    return module


@pytest.mark.parametrize(
    ("constants", "left"), [([-1.0], 3), ([2.0], 4), ([1.0, 2.0], 3), ([1.0, -1.0, 2.0], 2), ([-1.0, -2.0, -3.0], 1)]
)
def test_of_constants_under_a_padded_convolution_one_stands_for_all(constants: list[float], left: int) -> None:
    small = check_equal(padded(constants), noise(2, 2, 6, 6), others=(noise(3, 2, 9, 5),))
    assert (small[0].out_channels, small[2].in_channels) == (left, left)


def test_other_paddings_have_no_border() -> None:
    for mode in ("circular", "reflect", "replicate"):
        module = padded([1.0, 2.0])
        module[2].padding_mode = mode
        module[2]._reversed_padding_repeated_twice = [1, 1, 1, 1]
        small = check_equal(module, noise(2, 2, 6, 6))
        assert small[2].in_channels == 2


def test_a_sum_keeps_a_filter_that_one_of_its_terms_needs() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            outer = torch.relu(self.stem(inputs))
            return self.head(torch.relu(outer + self.inner(outer)))

    module = randomise(Residual(), 0.0)
    with torch.no_grad():
        module.stem.weight[0] = module.inner.weight[1:, :] = 0  # 0 is constant in one term, 1 and 2 in the other
        module.stem.weight[1] = module.inner.weight[0, 0] = 0  # 1 is constant in both
    small = check_equal(module, noise(5, 2))
    assert [tuple(part.weight.shape) for part in (small.stem, small.inner, small.head)] == [(2, 2), (2, 2), (1, 2)]


def test_units_of_an_lstm_that_nothing_reads_or_that_stay_zero_go() -> None:
    module: Any = nn.LSTM(3, 4, batch_first=True)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = module, nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            states, _ = self.rnn(inputs)
            return self.head(states[:, -1])

    whole: Any = Last().double().eval()
    with torch.no_grad():
        whole.head.weight[:, 0] = module.weight_hh_l0[:, 0] = 0  # nothing reads unit 0
        for part in (module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0):
            part[8 + 1] = 0  # the candidate of unit 1 stays zero
        module.weight_ih_l0[8 + 2] = module.weight_hh_l0[8 + 2] = 0  # that of unit 2 has a bias: it changes
    small = check_equal(whole, noise(5, 7, 3), others=(noise(2, 9, 3),))
    assert small.rnn.hidden_size == 2


def test_a_layer_of_which_nothing_is_needed_keeps_one_unit() -> None:
    module: Any = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    nn.init.zeros_(module[2].weight)
    small = check_equal(module, noise(5, 4))
    assert (small[0].out_features, small[2].out_features) == (1, 1)


# Networks, with random zeros.


class Pooled(nn.Module):
    """Functions and methods in place of modules; a view; a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv3, self.head = nn.Conv2d(8, 6, 1, padding="same"), nn.Linear(6 * 4, 5)
        self.other = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.conv1(inputs)), 2, padding=1)
        features = F.avg_pool2d(torch.sigmoid(self.norm(self.conv2(features))), 2, stride=1, padding=1)
        features = F.adaptive_avg_pool2d(self.conv3(features).tanh(), (2, 2)) * 0.5 + 1
        return self.head(features.view(features.size(0), -1)) - self.other(features.mean((2, 3)))


class Gated(nn.Module):
    """A depthwise convolution and a gate for each channel, in an inverted residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, 3)
        self.slopes = nn.PReLU(12)

    def forward(self, inputs: Tensor) -> Tensor:
        stem = F.hardswish(self.stem(inputs))
        features = F.silu(self.norm(self.depthwise(self.slopes(self.expand(stem)))))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(features, 1)))))
        stem += self.project(features * gate)
        return self.head(stem.mean([2, 3]))


class Dense(nn.Module):
    """Concatenations, as in a DenseNet, and an upward path with a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(5 + 4 * index) for index in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(5 + 4 * index, 4, 3, padding=1) for index in range(3))
        self.up = nn.ConvTranspose2d(17, 6, 3, stride=2, bias=False)
        self.head = nn.Conv2d(6, 2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        features = [self.stem(inputs)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.head(F.leaky_relu(self.up(torch.cat(features, dim=1)), 0.2))


class Feedforward(nn.Module):
    """The part of a transformer's block that has no attention, with features on the last axis, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.enter, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.enter(self.embedding(tokens).relu())
        stream = stream + self.down(F.dropout(F.gelu(self.up(self.norm(stream))), 0.5, self.training))
        return self.head(stream.transpose(1, 2).contiguous().permute(0, 2, 1)[:, 0].unsqueeze(1).squeeze(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU | nn.RNN], layers: int, **options: Any) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 5)
        self.rnn = kind(5, 9, num_layers=layers, batch_first=True, **options)
        self.head = nn.Linear(9, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        if isinstance(self.rnn, nn.LSTM):
            outputs, (_, _) = self.rnn(self.enter(inputs))
        else:
            outputs, _ = self.rnn(self.enter(inputs))
        return self.head(outputs[:, -1, :])


class FinalState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 9), nn.Linear(9, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        _, (hidden, cell) = self.rnn(inputs)
        return self.head(hidden[-1] + cell.squeeze(0))


IMAGES, SEQUENCES = (2, 2, 9, 8), (4, 6, 3)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: LeNet300100(in_features=20), (4, 1, 4, 5)),
    "pooled": (Pooled, IMAGES),
    "gated": (Gated, IMAGES),
    "dense": (Dense, IMAGES),
    "lstm": (lambda: Recurrent(nn.LSTM, 1), SEQUENCES),
    "lstm of three layers": (lambda: Recurrent(nn.LSTM, 3, bias=False), SEQUENCES),
    "gru": (lambda: Recurrent(nn.GRU, 2), SEQUENCES),
    "rnn": (lambda: Recurrent(nn.RNN, 2, nonlinearity="relu"), SEQUENCES),
    "final state": (FinalState, SEQUENCES),
    "bidirectional": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4, bidirectional=True)), SEQUENCES),
}


@settings(max_examples=15)
@given(sparsity=st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 0.99]), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_equal_whatever_the_masks(name: str, sparsity: float, seed: int) -> None:
    make, shape = NETWORKS[name]
    module = randomise(make(), sparsity, seed)
    others = noise(3, *shape[1:-1], shape[-1]) if len(shape) == 3 else noise(3, *shape[1:])
    check_equal(module, noise(*shape), others=(others,))


@settings(max_examples=15)
@given(sparsity=st.sampled_from([0.5, 0.9, 0.95, 0.99]), seed=st.integers(0, 10**6))
def test_outputs_of_tokens_are_equal(sparsity: float, seed: int) -> None:
    module = randomise(Feedforward(), sparsity, seed)
    check_equal(module, torch.arange(10).view(2, 5), others=(torch.arange(8).view(4, 2),))


@pytest.mark.parametrize("sparsity", [0.9, 0.98, 0.995])
@pytest.mark.parametrize(
    ("make", "shape", "most"),
    [
        (lambda: ResNet20(width=8), (2, 3, 16, 16), 0.95),
        (lambda: ResNet34(width=8), (2, 3, 16, 16), 0.95),
        (lambda: ResNet50(width=4), (2, 3, 16, 16), 0.95),
        (lambda: torchvision.models.resnet18(num_classes=10), (1, 3, 48, 48), 0.95),
        (LeNet5Caffe, (2, 1, 28, 28), 0.8),
        (lambda: VGG16(width=8), (2, 3, 32, 32), 0.9),
        (lambda: WideResNet(depth=16, widen_factor=1), (2, 3, 16, 16), 0.95),
        (lambda: RowLSTM(32), (2, 1, 28, 28), 0.95),
        (lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25), (1, 3, 32, 32), 0.95),
        (lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 8), (1, 3, 48, 48), 0.95),
    ],
    ids=["resnet20", "resnet34", "resnet50", "resnet18", "lenet5", "vgg", "wrn", "lstm", "mobilenet", "densenet"],
)
def test_networks_that_are_known_stay_equal_and_get_smaller(
    make: Callable[[], nn.Module], shape: tuple[int, ...], most: float, sparsity: float
) -> None:
    module = randomise(make(), sparsity)
    small = check_equal(module, noise(*shape))
    assert size(small) <= (most if sparsity > 0.9 else 1.0) * size(module)


# Attention.


class Cross(nn.Module):
    """Queries of one kind, keys and values of another."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.queries, self.memory = nn.Linear(3, 8), nn.Linear(3, 8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True, **options), nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        memory = torch.relu(self.memory(inputs))
        attended, _ = self.attention(self.queries(inputs), memory, memory, need_weights=False)
        return self.head(attended)


@settings(max_examples=15)
@given(sparsity=st.sampled_from([0.0, 0.5, 0.8, 0.9]), seed=st.integers(0, 10**6), bias=st.booleans())
def test_features_that_no_key_and_value_reads_go(sparsity: float, seed: int, bias: bool) -> None:
    module = randomise(Cross(bias=bias), sparsity, seed)
    with torch.no_grad():
        module.attention.in_proj_weight[8:, :3] = 0  # read by no key and no value
        module.memory.weight[4] = 0  # constant
    small = check_equal(module, noise(*SEQUENCES), others=(noise(2, 9, 3),))
    assert small.attention.kdim == small.attention.vdim == small.memory.out_features <= 4
    assert small.queries.out_features == 8


def test_attention_to_itself_keeps_its_features() -> None:
    class Itself(Cross):
        def forward(self, inputs: Tensor) -> Tensor:
            memory = self.memory(inputs)
            return self.head(self.attention(memory, memory, memory)[0])

    assert quiet(Itself(), (noise(*SEQUENCES),)).memory.out_features == 8


@settings(max_examples=10)
@given(
    sparsity=st.sampled_from([0.5, 0.9, 0.95]), seed=st.integers(0, 10**6), activation=st.sampled_from(["relu", "gelu"])
)
def test_inner_neurons_of_torchs_transformers_go(sparsity: float, seed: int, activation: str) -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
    module: Any = nn.Sequential(
        nn.Linear(3, 8), nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(8, 2)
    )
    randomise(module, sparsity, seed)
    with torch.no_grad():
        module[1].layers[0].linear2.weight[:, :5] = 0
    small = check_equal(module, noise(*SEQUENCES), others=(noise(2, 9, 3),))
    assert small[1].layers[0].linear1.out_features <= 11
    assert dead_units(module, noise(*SEQUENCES)).dead >= 5


def test_a_vision_transformer_loses_inner_neurons() -> None:
    module = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5)
    small = check_equal(randomise(module, 0.9), noise(2, 3, 16, 16))
    assert small.encoder.layers[0].mlp[0].out_features < 32


# What is not known stays.


def quiet(module: nn.Module, example: Any) -> Any:
    return check_equal(randomise(module, 0.9), *example)


class Written(nn.Module):
    """Sizes that are written out, as tutorials do."""

    def __init__(self, size: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 16, 3)
        self.size = size

    def forward(self, inputs: Tensor) -> Tensor:
        features = torch.relu(self.inner(torch.relu(self.conv(inputs))))
        return self.head(features.view(*self.size(features)))


@pytest.mark.parametrize(
    ("view", "left"),
    [
        (lambda x: (-1, 128), False),
        (lambda x: (x.shape[0], -1), True),
        (lambda x: (x.size(0), x.size(1) * x.size(2) * x.size(3)), True),
    ],
)
def test_a_view_of_a_written_size_keeps_its_filters(view: Callable[[Tensor], Any], left: bool) -> None:
    small = quiet(Written(view), (noise(2, 2, 8, 8),))
    assert (small.inner.out_channels < 8) is left
    assert small.conv.out_channels < 8


class Odd(nn.Module):
    """One thing between two layers."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(self.between(self.up(inputs)))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.softmax(-1),
        lambda x: x / x.shape[-1],
        lambda x: x.flip(-1),
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x + torch.arange(8),
        lambda x: torch.cat([x[..., 4:], x[..., :4]], -1),
        lambda x: x.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8),
        lambda x: torch.stack([x, x]).sum(0),
        lambda x: x.cumsum(-1).detach().relu_(),
        lambda x: F.layer_norm(x, (8,)),
        lambda x: x * x.norm(),
        lambda x: x.view(torch.int64).view(torch.float64),
        lambda x: F.max_pool2d(x[:, :, None], (3, 1), 1, (1, 0)).squeeze(2),
        lambda x: F.avg_pool1d(x[None], 3, 1, 1)[0],
        lambda x: F.dropout(x, 0.0) + x.new_zeros(x.shape[-1:]),
    ],
)
def test_what_mixes_features_keeps_them(between: Callable[[Tensor], Tensor]) -> None:
    small = quiet(Odd(between), (noise(5, 6),))
    assert small.up.out_features == 8


@pytest.mark.parametrize(
    "between",
    [
        lambda x: torch.clamp(x, 0, 1).exp() ** 2,
        lambda x: (3 - x).unsqueeze(1).relu_().squeeze(1),
        lambda x: x[:, None, :].permute(2, 0, 1)[..., 0].transpose(0, 1),
        lambda x: torch.relu(x).add_(x) / 2,
        lambda x: torch.cat([x.unsqueeze(1), -x.unsqueeze(1)], 1).mean(1),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.interpolate(x[:, :, None], scale_factor=2).mean(-1),
        lambda x: F.interpolate(x[:, :, None, None], size=x[:, :, None, None].shape[2:], mode="bilinear").flatten(1),
        lambda x: x.view(x.shape[:2]),
    ],
)
def test_what_works_on_each_feature_does_not(between: Callable[[Tensor], Tensor]) -> None:
    small = quiet(Odd(between), (noise(5, 6),))
    assert small.up.out_features < 8


def test_what_was_written_in_place_is_read_as_it_is_now() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.relu = nn.Linear(6, 8), nn.Linear(8, 3), nn.ReLU(inplace=True)

        def forward(self, inputs: Tensor) -> Tensor:
            features = self.up(inputs)
            self.relu(features)
            return self.down(features)

    module = PreActivation().double().eval()
    nn.init.zeros_(module.up.weight)
    check_equal(module, noise(5, 6))


@pytest.mark.parametrize(
    "between", [lambda x: x.pow(x), lambda x: torch.clamp(x, max=x), lambda x: torch.clamp(x, max=0.1, out=x)]
)
def test_a_value_that_is_given_twice_keeps_its_features(between: Callable[[Tensor], Tensor]) -> None:
    small = quiet(Odd(lambda x: between(x.abs())), (noise(5, 6),))
    assert small.up.out_features == 8


def test_shared_layers_and_weights_stay() -> None:
    layer = nn.Linear(6, 6)
    tied: Any = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    tied[4].weight = tied[2].weight
    for module in (nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 2)), tied):
        small = quiet(module, (noise(5, 6),))
        assert [part.weight.shape for part in small.modules() if isinstance(part, nn.Linear)] == [
            part.weight.shape for part in module.modules() if isinstance(part, nn.Linear)
        ]


def test_a_forward_of_its_own_stays() -> None:
    module: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    layer = module[0]
    layer.forward = lambda inputs: F.linear(inputs, layer.weight, layer.bias).exp()
    assert shrink(randomise(module, 0.9).float(), torch.ones(1, 6))[0].out_features == 8


def test_hooks_and_parametrisations_stay() -> None:
    hooked: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    hooked[0].register_forward_hook(lambda module, inputs, output: output + 1)
    pruned: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    parametrised = copy.deepcopy(pruned)
    parametrizations.weight_norm(parametrised[0])
    for module in (hooked, parametrised):
        small = check_equal(randomise(module, 0.9 if module is hooked else 0.0), noise(5, 6))
        assert small[0].out_features == 8
    prune.l1_unstructured(pruned[0], "weight", amount=0.9)
    with pytest.raises(ValueError, match=r"torch\.nn\.utils\.prune.* make the zeros permanent with prune\.remove"):
        shrink(pruned, torch.ones(1, 6))


def test_few_inputs_are_picked_where_that_spares_much() -> None:
    module: Any = nn.Sequential(nn.Linear(800, 120), nn.ReLU(), nn.Linear(120, 3)).double().eval()
    with torch.no_grad():
        module[0].weight[:, 200:] = 0
    small = check_equal(module, noise(5, 800))
    assert isinstance(small[0], LiveInputs)
    assert small[0].layer.in_features == 200
    with torch.no_grad():
        module[0].weight[0] = 1
    assert type(shrink(module, noise(5, 800))[0]) is nn.Linear  # all are read
    with torch.no_grad():
        module[0].weight[:, 200:] = 0
        module[2].weight[:, 20:] = 0
    small = shrink(module, noise(5, 800))
    assert (small[0].in_features, small[0].out_features) == (800, 20)  # few are read, and that spares little


def test_a_network_that_was_trained_sparse_is_as_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ToyModel()
    make_trainer(tmp_path, max_epochs=3, callbacks=[GMP(sparsity=0.9)]).fit(model)
    inputs = model.train_data[:][0]
    small: Any = shrink(model, inputs[:1])
    with torch.no_grad():
        exact, got = copy.deepcopy(model).double().eval()(inputs.double()), small(inputs)
    assert size(small) < size(model)
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert type(small) is ToyModel


def test_single_precision_is_as_exact_as_it_can_be() -> None:
    module = randomise(ResNet34(width=8), 0.95).float()
    inputs = noise(4, 3, 16, 16)
    small: Any = shrink(module, inputs.float())
    with torch.no_grad():
        exact, got = copy.deepcopy(module).double()(inputs), small(inputs.float())
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype: torch.dtype) -> None:
    module = randomise(LeNet300100(in_features=20), 0.9).to(dtype)
    small: Any = shrink(module, noise(4, 20).to(dtype))
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert size(small) < size(module)


def test_frozen_weights_stay_frozen_and_the_copy_is_in_evaluation_mode() -> None:
    module = randomise(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), 0.9).train()
    module[0].weight.requires_grad_(False)
    small: Any = shrink(module, noise(5, 6))
    assert not small.training
    assert module.training
    assert not small[0].weight.requires_grad
    assert small[0].bias.requires_grad


# Bad input.


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) if inputs.sum() > 0 else inputs


class Loud(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(self.up(inputs)) + torch.rand(1)


def test_what_cannot_be_traced_is_a_copy_and_is_told() -> None:
    module = Deciding()
    with pytest.warns(UserWarning, match=r"^Deciding cannot be traced: .*returns a copy of it, unchanged"):
        small: Any = shrink(module, torch.ones(1, 3))
    assert small is not module
    assert torch.equal(small.layer.weight, module.layer.weight)
    assert "control flow" in dead_units(module, torch.ones(1, 3)).obstacle


def test_chance_is_a_copy_and_is_told() -> None:
    module = randomise(Loud(), 0.9).float()
    with pytest.warns(UserWarning, match=r"^Loud gives other outputs when it is shrunk"):
        small: Any = shrink(module, torch.ones(1, 3))
    assert size(small) == size(module)


def test_arguments_by_name_and_left_out() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, inputs: Tensor, shift: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
            features = self.up(inputs)
            if shift is not None:
                features = features + shift
            return self.down(features) * scale

    module = randomise(Optional(), 0.9)
    for example in (noise(5, 6), {"inputs": noise(5, 6)}, (noise(5, 6),), [noise(5, 6)]):
        assert shrink(module, example).up.out_features < 8
    for several in ((noise(5, 6), noise(5, 8)), [noise(5, 6), noise(5, 8)]):
        assert shrink(module, several).up.out_features == 8


def test_wrong_arguments_are_sentences() -> None:
    broken: Any = shrink
    with pytest.raises(TypeError, match=r"shrink takes a module and an example.*the module is a Tensor"):
        broken(torch.ones(1), nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"does not fit Linear\.forward\(input.*Give one tensor"):
        shrink(nn.Linear(2, 2), (torch.ones(1), torch.ones(1)))
    with pytest.raises(ValueError, match=r"Sequential does not take the example, of shapes .*Give one tensor"):
        shrink(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(5, 7))
    with pytest.raises(ValueError, match="does not take the example"):
        broken(nn.Sequential(nn.Linear(2, 2)), "cat")
    module: Any = nn.Sequential(nn.Linear(2, 2))
    module.held = torch.ones(1, requires_grad=True) * 2  # pyright: ignore
    with pytest.raises(ValueError, match=r"Sequential cannot be copied .*copy\.deepcopy takes"):
        shrink(module, torch.ones(1, 2))


def test_what_has_nothing_dead_is_a_copy() -> None:
    module: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small: Any = shrink(module, torch.ones(1, 4))
    assert small is not module
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in small.state_dict().items())


def test_dead_units_are_those_that_shrink_removes() -> None:
    module = randomise(Recurrent(nn.LSTM, 2), 0.95, seed=3)
    found = dead_units(module, noise(*SEQUENCES))
    small: Any = shrink(module, noise(*SEQUENCES))
    assert (found.parameters, found.parameters_left) == (size(module), size(small))
    assert [(layer.name, layer.units) for layer in found.layers] == [("enter", 5), ("rnn", 18), ("head", 2)]
    assert found.layers[0].dead == 5 - small.enter.out_features
    assert found.dead == sum(layer.dead for layer in found.layers) > 0
    assert found.units == 25
