"""accelerate returns what computes the same, says what it chose, and changes nothing that is not its own."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from typing_extensions import override

from lightning_sparse import accelerate
from lightning_sparse.execution import AcceleratedModule, LayerChoice, StaleWeightsError
from lightning_sparse.execution import accelerate as _function_of_the_package
from lightning_sparse.execution.accelerated import Recipe
from lightning_sparse.execution.examples import Call
from lightning_sparse.execution.kernels import available_kernels
from lightning_sparse.execution.layers import InputSpec
from lightning_sparse.execution.report import AccelerationReport
from tests.execution.networks import Untraceable, assert_close, in_float64, perceptron, residual_network, sparsify

QUICK = 0.02


def wide_perceptron() -> nn.Sequential:
    """Large and sparse enough to gain on any machine."""
    return sparsify(perceptron(512, 1024, 512, 10), 0.98)


def made_sparse(module: nn.Module, x: Tensor, layers: set[str], *, traced: bool = True) -> AcceleratedModule:
    """Swap layers without asking how long they take."""
    recipe = Recipe(frozenset(layers), traced, available_kernels()[0], 1, (InputSpec.of(x),), {})
    return AcceleratedModule(module, recipe, AccelerationReport([], available_kernels()[0], 1, [tuple(x.shape)]))


@pytest.mark.parametrize("kernels", available_kernels())
def test_a_sparse_perceptron_is_faster_and_the_same(kernels: str) -> None:
    network = wide_perceptron()
    fast = accelerate(network, torch.randn(16, 512), threads=1, kernels=kernels, seconds=QUICK)
    assert fast.report.accelerated
    assert fast.report.gain > 1
    assert {layer.name for layer in fast.report.layers if layer.sparse} >= {"1", "3"}
    for batch in (1, 16, 33, 0):
        x = torch.randn(batch, 512)
        assert_close(fast(x), in_float64(network, x))


def test_a_convolutional_network_is_faster_and_the_same() -> None:
    network = sparsify(residual_network(32), 0.97)
    fast = accelerate(network, torch.randn(1, 3, 64, 64), threads=1, seconds=QUICK)
    assert fast.report.accelerated
    for shape in [(1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 40, 56)]:
        x = torch.randn(shape)
        assert_close(fast(x), in_float64(network, x))


def test_the_report_is_a_table_with_conditions_and_the_whole() -> None:
    report = accelerate(wide_perceptron(), torch.randn(16, 512), threads=1, seconds=QUICK).report
    text = str(report)
    assert text.startswith("input 16×512, 1 thread, kernels ")
    assert "| 1 " in text
    assert "times as fast" in text
    assert report.gain_range is not None
    assert report.gain_range[0] <= report.gain <= report.gain_range[1]


def test_the_report_says_why_a_layer_is_sparse_that_is_no_faster_alone() -> None:
    timed = LayerChoice("fc", (10, 20), 0.9, False, dense_seconds=2e-5, sparse_seconds=2e-5, reason="not as fast")
    assert _module("accelerate")._reason(timed, False) == "not as fast"
    beside = replace(timed, sparse=True, reason=_module("accelerate")._reason(timed, True))
    text = str(AccelerationReport([beside], "llvm", 1, [(1, 4)]))
    assert "sparse: no faster alone, but the network is" in text


@pytest.mark.skipif("llvm" not in available_kernels(), reason="llvmlite is not installed")
def test_of_several_threads_one_alone_is_tried_too() -> None:
    x = torch.randn(1, 512)
    module = _module("accelerate")
    trial = module._Acceleration(wide_perceptron(), Call.of(x), "llvm", 2, QUICK, "cpu")
    assert {recipe.threads for recipe in trial._recipes()} == {1, 2}
    network = wide_perceptron()
    fast = accelerate(network, x, threads=2, kernels="llvm", seconds=QUICK)
    assert fast.report.threads == 2
    assert_close(fast(x), in_float64(network, x))
    assert fast.recipe is not None
    assert (fast.recipe.threads == 1) == any("on one thread" in note for note in fast.report.notes)


def test_a_network_that_cannot_be_traced_is_replaced_layer_by_layer() -> None:
    network = Untraceable(wide_perceptron()).eval()
    fast = accelerate(network, torch.randn(16, 512), threads=1, seconds=QUICK)
    assert fast.report.accelerated
    assert any("one by one" in note for note in fast.report.notes)
    x = torch.randn(3, 512)
    assert_close(fast(x), in_float64(network, x))


@pytest.mark.filterwarnings("ignore:The module has no zeros")
@pytest.mark.parametrize("kind", [tuple, list])
def test_a_list_of_arguments_is_an_example_as_a_tuple_is(kind: type) -> None:
    report = accelerate(nn.Bilinear(8, 8, 4), kind([torch.randn(2, 8)] * 2), seconds=QUICK).report
    assert report.input_shapes == [(2, 8), (2, 8)]


class Terminal(io.StringIO):
    """A stream that says of itself that somebody looks at it, or not."""

    def __init__(self, looked_at: bool) -> None:
        super().__init__()
        self.looked_at = looked_at

    @override
    def isatty(self) -> bool:
        return self.looked_at


@pytest.mark.parametrize("looked_at", [True, False], ids=["terminal", "pipe"])
def test_on_a_terminal_alone_a_line_shows_how_far_it_is(looked_at: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream := Terminal(looked_at))
    monkeypatch.setenv("TERM", "xterm")
    accelerate(wide_perceptron(), torch.randn(16, 512), threads=1, seconds=QUICK)
    said = stream.getvalue()
    if looked_at:
        assert all(what in said for what in ("Timing layers", "Making variants", "Timing the module and"))
    else:
        assert said == ""


def test_keyword_arguments_are_an_example_too() -> None:
    network = wide_perceptron()
    fast = accelerate(network, {"input": torch.randn(16, 512)}, threads=1, seconds=QUICK)
    x = torch.randn(3, 512)
    assert_close(fast(input=x), in_float64(network, x))


def test_the_module_is_not_changed() -> None:
    network = sparsify(residual_network()).train()
    before = copy.deepcopy(network.state_dict())
    modules = {name: id(module) for name, module in network.named_modules()}
    accelerate(network, torch.randn(2, 3, 32, 32), threads=1, seconds=QUICK)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert {name: id(module) for name, module in network.named_modules()} == modules
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())


def test_a_network_in_training_is_executed_as_for_inference() -> None:
    network = sparsify(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.9))).train()
    fast = made_sparse(network, torch.randn(2, 64), {"0"})
    x = torch.randn(2, 64)
    assert_close(fast(x), in_float64(network[0], x))


def test_a_report_is_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    report = AccelerationReport([LayerChoice("fc", (3, 2), 0.5, sparse=True)], "llvm", 1, [(1, 2)])
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)  # rich displays there what it is to write
    assert "| fc " in str(report)


def test_a_module_without_zeros_is_returned_as_it_is() -> None:
    network = perceptron(16, 8).eval()
    with pytest.warns(UserWarning, match="no zeros"):
        fast = accelerate(network, torch.randn(2, 16))
    assert not fast.report.accelerated
    assert fast.executed is network
    assert list(fast.children()) == []
    assert fast.report.gain == 1


def test_a_network_too_small_to_gain_is_returned_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    network = sparsify(perceptron(4, 3))
    monkeypatch.setattr(_module("accelerate"), "LEAST_GAIN_OF_THE_WHOLE", 1e9)
    fast = accelerate(network, torch.randn(2, 4), seconds=QUICK)
    assert fast.executed is network
    assert "returned unchanged" in fast.report.notes[-1]
    assert not any(layer.sparse for layer in fast.report.layers)


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(f"lightning_sparse.execution.{name}")


class TestWeightsWrittenSince:
    def test_are_noticed_and_taken_by_refresh(self) -> None:
        network = wide_perceptron()
        x = torch.randn(2, 512)
        fast = made_sparse(network, x, {"1", "3"})
        with torch.no_grad():
            network.get_parameter("1.weight").mul_(2)
        with pytest.raises(StaleWeightsError, match=r"'1\.weight' .* refresh"):
            fast(x)
        with pytest.raises(StaleWeightsError, match="refresh"):
            copy.deepcopy(fast)
        assert_close(fast.refresh()(x), in_float64(network, x))

    def test_are_noticed_when_loaded_assigned_or_replaced(self) -> None:
        network = wide_perceptron()
        x = torch.randn(2, 512)
        fast = made_sparse(network, x, {"1"})

        def replaced() -> None:
            network[3].bias = nn.Parameter(torch.zeros(512))

        def assigned() -> None:
            network[3].bias.data = torch.ones(512)

        state = copy.deepcopy(network.state_dict())
        for change in (replaced, assigned, lambda: network.load_state_dict(state)):
            change()
            with pytest.raises(StaleWeightsError):
                fast(x)
            assert_close(fast.refresh()(x), in_float64(network, x))

    @pytest.mark.parametrize("traced", [False, True])
    def test_are_noticed_where_layers_are_others(self, traced: bool) -> None:
        network = wide_perceptron()
        outer = nn.Sequential(network, nn.ReLU()).eval()
        x = torch.randn(2, 512)
        fast = made_sparse(outer, x, {"0.1"}, traced=traced)

        def replaced() -> None:
            network[3] = sparsify(nn.Linear(1024, 512))

        def activated() -> None:
            outer[1] = nn.Tanh()

        changes = {
            "'0.3'": replaced,
            "'1'": activated,
            "'2'": lambda: outer.append(nn.ReLU()),
            "A layer": lambda: outer.pop(2),
        }
        for name, change in changes.items():
            change()
            with pytest.raises(StaleWeightsError, match=f"{name}.* of the original module.*refresh"):
                fast(x)
            with pytest.raises(StaleWeightsError, match="refresh"):
                copy.deepcopy(fast)
            assert_close(fast.refresh()(x), in_float64(outer, x))


class TestTheModuleReturned:
    def test_is_copied_pickled_and_saved(self) -> None:
        network = wide_perceptron()
        x = torch.randn(3, 512)
        fast = made_sparse(network, x, {"1", "3"})
        stream = io.BytesIO()
        torch.save(fast, stream)
        stream.seek(0)
        others = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(stream, weights_only=False)
        for other in others:
            assert torch.equal(other(x), fast(x))

    def test_has_the_dense_state_dict(self) -> None:
        network = wide_perceptron()
        fast = made_sparse(network, torch.randn(3, 512), {"1"})
        assert list(fast.state_dict()) == list(network.state_dict())
        with pytest.raises(ValueError, match="original module"):
            fast.load_state_dict(network.state_dict())

    def test_refuses_to_be_trained(self) -> None:
        fast = made_sparse(wide_perceptron(), torch.randn(3, 512), {"1"})
        assert fast.eval() is fast
        with pytest.raises(ValueError, match="inference"):
            fast.train()
        with pytest.raises(ValueError, match="gradient"):
            fast(torch.randn(3, 512, requires_grad=True))
        assert list(fast.parameters()) == []

    def test_stays_on_its_device_and_in_its_type(self) -> None:
        fast = made_sparse(wide_perceptron(), torch.randn(3, 512), {"1"})
        assert fast.to("cpu") is fast
        assert fast.float() is fast
        with pytest.raises(ValueError, match="stays on cpu"):
            fast.half()
        with pytest.raises(ValueError, match="stays on cpu"):
            fast.to("meta")

    def test_calls_hooks_that_are_registered_on_it(self) -> None:
        fast = made_sparse(wide_perceptron(), torch.randn(3, 512), {"1"})
        seen: list[int] = []
        fast.register_forward_hook(lambda *_: seen.append(1))
        fast(torch.randn(3, 512))
        assert seen == [1]

    def test_is_called_by_several_threads_at_once(self) -> None:
        network = sparsify(residual_network())
        x = torch.randn(2, 3, 32, 32)
        fast = made_sparse(network, x, {name for name, _ in network.named_modules()})
        expected = fast(x)
        wrong: list[bool] = []

        def call() -> None:
            wrong.extend(not torch.equal(fast(x), expected) for _ in range(20))

        workers = [threading.Thread(target=call) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert wrong == [False] * 60


def test_a_network_without_its_dead_units_takes_no_gradients_either() -> None:
    network = sparsify(residual_network())
    network.get_parameter("8.weight").data[:, :4] = 0
    x = torch.randn(2, 3, 32, 32)
    recipe = Recipe(frozenset({"8"}), True, available_kernels()[0], 1, (InputSpec.of(x),), {}, shrink=True)
    fast = recipe.make(network)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert_close(fast(x), in_float64(network, x))


def test_tied_weights_are_packed_for_each_layer() -> None:
    network = sparsify(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)))
    network[2].weight = network[0].weight
    fast = made_sparse(network, torch.randn(3, 128), {"0", "2"})
    x = torch.randn(3, 128)
    assert_close(fast(x), in_float64(network, x))


def left_dense(layer: nn.Module, x: Tensor) -> str:
    """Accelerate a network of a layer and one that gains, and return why the layer was left dense."""
    fast = accelerate(nn.Sequential(layer).eval(), x, threads=1, seconds=QUICK)
    return next(choice.reason for choice in fast.report.layers if not choice.sparse)


def test_parametrized_layers_are_left_dense_and_said_to_be() -> None:
    layer = nn.Linear(16, 16)
    layer.weight.data[0] = 0
    assert "parametrized" in left_dense(parametrizations.spectral_norm(layer), torch.randn(2, 16))


def test_other_types_are_left_dense_and_said_to_be() -> None:
    layer = sparsify(nn.Linear(16, 16)).to(torch.bfloat16)
    assert "bfloat16" in left_dense(layer, torch.randn(2, 16, dtype=torch.bfloat16))
    layer = sparsify(nn.Linear(16, 16, dtype=torch.complex64))
    assert "complex64" in left_dense(layer, torch.randn(2, 16, dtype=torch.complex64))


def test_layers_with_hooks_are_left_dense_and_said_to_be() -> None:
    layer = sparsify(nn.Linear(16, 16))
    layer.register_forward_hook(lambda *_: None)
    assert "hooks" in left_dense(layer, torch.randn(2, 16))


def test_quantised_layers_are_named(recwarn: pytest.WarningsRecorder) -> None:
    quantize: Any = vars(torch.ao.quantization).get("quantize_dynamic")  # deprecated, and what people have
    if quantize is None:
        pytest.skip("This torch quantises no layers.")
    network = quantize(perceptron(16, 8, 4).eval(), {nn.Linear}, dtype=torch.qint8)
    fast = accelerate(network, torch.randn(2, 16), seconds=QUICK)
    assert fast.executed is network
    assert "those of 1, 3 are not counted, because their weights are not plain tensors" in fast.report.notes[-1]


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = sparsify(perceptron(512, 512))
        self.register_buffer("calls", torch.zeros(()))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Count."""
        self.calls += 1
        return self.layer(x)


class Chance(Counting):
    """Depends on chance."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Add noise."""
        return self.layer(x) + torch.randn(1)


@pytest.mark.parametrize("kind", [Counting, Chance])
def test_a_module_whose_calls_differ_is_returned_as_it_is(kind: type[Counting]) -> None:
    network = kind().eval()
    fast = accelerate(network, torch.randn(16, 512), threads=1, seconds=QUICK)
    assert fast.executed is network
    assert "Two calls on the example differ" in fast.report.notes[-1]
    assert int(network.calls) == 0


class TakesAnotherTurn(nn.Module):
    """Gives another type to a graph, whose values are no tensors yet."""

    def __init__(self) -> None:
        super().__init__()
        self.network = wide_perceptron()

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        return y.bfloat16() if isinstance(x, Tensor) else y


def test_outputs_keep_their_type() -> None:
    x = torch.randn(16, 512)
    fast = accelerate(TakesAnotherTurn(), x, threads=1, seconds=QUICK)
    assert fast(x).dtype == torch.bfloat16
    assert any("another shape or type" in note for note in fast.report.notes)


class Widened(nn.Module):
    """Computes in one type, and returns fp64; a graph of it is off by ``excess``."""

    def __init__(self, dtype: torch.dtype, excess: float = 0.0) -> None:
        super().__init__()
        self.network = wide_perceptron().to(dtype)
        self.dtype, self.excess = dtype, excess

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x.to(self.dtype)).double()
        return y + self.excess * y if isinstance(x, Tensor) else y


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_outputs_in_fp64_of_sums_in_fp32_are_as_exact_as_these(given: torch.dtype) -> None:
    x = torch.randn(16, 512, dtype=given)
    network = Widened(torch.float32)
    fast = accelerate(network, x, threads=1, seconds=QUICK)
    assert fast.report.accelerated
    assert not any("dropped" in note for note in fast.report.notes)
    assert_close(fast(x).float(), in_float64(network.network, x))


@pytest.mark.parametrize(("dtype", "excess"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_outputs_that_are_wrong_for_the_type_that_computes_them_are_caught(dtype: torch.dtype, excess: float) -> None:
    x = torch.randn(16, 512, dtype=dtype)
    network = Widened(dtype, excess)
    fast = accelerate(network, x, threads=1, seconds=QUICK)
    assert any("its outputs differ by" in note for note in fast.report.notes)
    assert not fast.report.accelerated
    assert torch.equal(fast(x), network(x))


def _doubled(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize("where", ["", "0", "0.2", "1"], ids=["the whole", "a container", "an activation", "a norm"])
def test_hooks_are_called_wherever_they_are(where: str) -> None:
    network = nn.Sequential(wide_perceptron(), nn.BatchNorm1d(10), nn.Linear(10, 3)).eval()
    network.get_submodule(where).register_forward_hook(_doubled)
    x = torch.randn(3, 512)
    fast = accelerate(network, x, threads=1, seconds=QUICK)
    assert_close(fast(x), in_float64(network, x))
    seen: list[int] = []
    network.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    accelerate(network, x, threads=1, seconds=QUICK)
    seen.clear()
    accelerate(network, x, threads=1, seconds=QUICK)(x)
    assert seen


class Flagged(nn.Module):
    """Takes flags and a second tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([wide_perceptron(), wide_perceptron()])

    @override
    def forward(self, x: Tensor, y: Tensor | None = None, twice: bool = False, *, scale: float = 1.0) -> Tensor:
        """Compute what the flags say."""
        z = self.layers[0](x) * scale
        if y is not None:
            z = z + self.layers[1](y)
        return 2 * z if twice else z


class TestACallUnlikeTheExample:
    x = torch.randn(3, 512)

    def made(self, *example: Any) -> tuple[nn.Module, AcceleratedModule]:
        network = Flagged().eval()
        fast = accelerate(network, example, threads=1, seconds=QUICK)
        assert fast.recipe is not None
        assert fast.recipe.traced
        return network, fast

    def test_is_refused_in_words(self) -> None:
        _, fast = self.made(self.x)
        with pytest.raises(ValueError, match="in which y is its default, None; it was given a Tensor"):
            fast(self.x, self.x)
        with pytest.raises(ValueError, match="in which twice is its default, False; it was given True"):
            fast(self.x, twice=True)
        with pytest.raises(ValueError, match=r"in which scale is its default, 1\.0; it was given 3\.0"):
            fast(self.x, scale=3.0)
        with pytest.raises(ValueError, match="in which x is a tensor; it was given 'cat'"):
            fast("cat")
        with pytest.raises(TypeError, match="called otherwise"):
            fast()

    def test_may_name_its_arguments(self) -> None:
        network, fast = self.made(self.x)
        expected = in_float64(network, self.x)
        for output in (fast(x=self.x), fast(self.x, None, False, scale=1.0), fast(self.x, y=None)):
            assert_close(output, expected)

    def test_has_the_flags_of_the_example(self) -> None:
        network, fast = self.made(self.x, None, True)
        assert_close(fast(self.x, None, True), network(self.x, None, True))
        assert_close(fast(self.x, twice=True), network(self.x, None, True))
        with pytest.raises(ValueError, match="in which twice is True; it was given False"):
            fast(self.x)
        with pytest.raises(ValueError, match="in which y is None"):
            fast(self.x, self.x, True)

    def test_has_the_tensors_of_the_example(self) -> None:
        network, fast = self.made(self.x, self.x)
        assert_close(fast(self.x, y=2 * self.x), network(self.x, 2 * self.x))
        with pytest.raises(ValueError, match="in which y is a tensor; it was given None"):
            fast(self.x)

    def test_may_name_the_input_of_one_layer(self) -> None:
        layer = sparsify(nn.Linear(64, 64))
        fast = made_sparse(layer, torch.randn(3, 64), {""}, traced=False)
        x = torch.randn(2, 64)
        assert_close(fast(input=x), layer(x))
        with pytest.raises(ValueError, match="input is a tensor; it was given None"):
            fast(None)


class Reading(nn.Module):
    """Reads of its layers what they are, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = sparsify(nn.Linear(512, 512), 0.98)
        self.second = sparsify(nn.Linear(512, 512), 0.98)

    @override
    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """Convert, compute, and compute with a weight itself."""
        y = self.first(x.to(self.first.weight.dtype)).relu()
        return self.second(y) + nn.functional.linear(y[..., : self.second.in_features], self.first.weight)


class ReadingInAGraph(Reading):
    """Likewise, in a way that torch.fx follows."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Compute with a weight itself."""
        return self.second(self.first(x)) + nn.functional.linear(x, self.first.weight, self.first.bias)


@pytest.mark.parametrize("kind", [Reading, ReadingInAGraph])
def test_networks_may_read_of_layers_what_they_are(kind: type[Reading]) -> None:
    network = kind().eval()
    x = torch.randn(16, 512)
    fast = accelerate(network, x, threads=1, seconds=QUICK)
    assert fast.report.accelerated
    assert not any("variant failed" in note for note in fast.report.notes)
    assert_close(fast(x), in_float64(network, x))


def test_what_is_replaced_one_by_one_takes_no_memory_for_dense_weights() -> None:
    layer = sparsify(nn.Linear(64, 64))
    fast = made_sparse(layer, torch.randn(3, 64), {""}, traced=False)
    executed: Any = fast.executed
    assert executed.weight.data_ptr() == layer.weight.data_ptr()
    assert not executed.weight.requires_grad
    with pytest.raises(AttributeError, match="colour"):
        _ = executed.colour


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_takes_masks_that_the_example_had_not() -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 256, batch_first=True)
    network = sparsify(nn.TransformerEncoder(layer, 1))
    x = torch.randn(2, 12, 64)
    names = {"layers.0.self_attn", "layers.0.linear1", "layers.0.linear2"}
    fast = made_sparse(network, x, names, traced=False)
    padding = torch.arange(12).expand(2, 12) >= 9
    for settings in ({}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            assert_close(fast(x, **settings)[:, :9], network(x, **settings)[:, :9])


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv1d(16, 16, 3), (2, 16, 9)), (nn.Conv3d(4, 4, 3), (1, 4, 5, 5, 5))], ids=["1d", "3d"]
)
def test_one_layer_without_a_sparse_form_is_returned_as_it_is(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        layer.get_parameter("weight")[0] = 0
    fast = accelerate(layer.eval(), torch.randn(shape), threads=1, seconds=QUICK)
    assert fast.executed is layer
    assert "has no sparse form" in fast.report.layers[0].reason


def test_masks_of_torch_prune_are_to_be_made_permanent_first() -> None:
    layer = nn.Linear(16, 16)
    prune.l1_unstructured(layer, "weight", 0.9)  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"prune\.remove"):
        accelerate(layer, torch.randn(2, 16))
    prune.remove(layer, "weight")
    accelerate(layer, torch.randn(2, 16), seconds=QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example_input": torch.randn(2, 15)}, r"does not take the example, of shapes \(2, 15\)"),
        ({"example_input": "cat"}, "give a tensor"),
        ({"example_input": {}}, "give a tensor"),
        ({"example_input": torch.randn(0, 16)}, "empty"),
        ({"example_input": torch.randn(2, 16), "threads": 0}, "whole number"),
        ({"example_input": torch.randn(2, 16), "seconds": float("nan")}, "a number above 0"),
        ({"example_input": torch.randn(2, 16), "seconds": 0}, "a number above 0"),
        ({"example_input": torch.randn(2, 16), "kernels": "numba"}, "available are"),
        ({"module": torch.zeros(3), "example_input": torch.randn(2, 16)}, r"give a torch\.nn\.Module"),
        ({"module": nn.Linear(16, 3, device="meta"), "example_input": torch.randn(2, 16)}, "on meta"),
        ({"module": nn.LazyLinear(3), "example_input": torch.randn(2, 16)}, "weight has no values yet"),
    ],
    ids=[
        *("shape", "type", "nothing", "empty", "threads", "seconds: nan", "seconds: 0"),
        *("kernels", "module", "device", "lazy"),
    ],
)
def test_bad_input_is_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(arguments.pop("module", sparsify(nn.Linear(16, 3))), **arguments)


def test_without_llvmlite_one_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _module("kernels")
    monkeypatch.setattr(kernels, "available_kernels", lambda: ("torch_csr",))
    monkeypatch.setattr(kernels, "_TOLD", set())
    with pytest.warns(UserWarning, match=r"lightning-sparse\[fast\]"):
        assert kernels.default_kernels() == "torch_csr"
    assert kernels.default_kernels() == "torch_csr"


def test_what_is_accelerated_already_is_refused() -> None:
    fast = made_sparse(wide_perceptron(), torch.randn(3, 512), {"1"})
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(fast, torch.randn(3, 512))


def test_the_package_offers_it() -> None:
    assert accelerate is _function_of_the_package
