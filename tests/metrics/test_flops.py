from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_sparse.metrics import ForwardFLOPs, InferenceFLOPs, TrainingFLOPs


def count(module: nn.Module, *inputs: Tensor, forward: Callable[..., Any] | None = None) -> ForwardFLOPs:
    with ForwardFLOPs(dict(module.named_parameters())) as flops:
        (forward or module)(*inputs)
    return flops


class TestFormulas:
    """Two operations for each weight and each place where it is applied."""

    @pytest.mark.parametrize("batch", [(), (5,), (5, 7)])
    def test_linear(self, batch: tuple[int, ...]) -> None:
        flops = count(nn.Linear(4, 3), torch.ones(*batch, 4))
        assert flops.by_parameter == {"weight": 2 * 4 * 3 * torch.Size(batch).numel()}

    def test_convolution(self) -> None:
        flops = count(nn.Conv2d(3, 8, kernel_size=5, stride=2), torch.ones(4, 3, 11, 13))
        assert flops.by_parameter == {"weight": 2 * (8 * 3 * 5 * 5) * 4 * (4 * 5)}

    def test_grouped_convolution(self) -> None:
        flops = count(nn.Conv1d(6, 9, kernel_size=3, groups=3), torch.ones(4, 6, 10))
        assert flops.by_parameter == {"weight": 2 * (9 * 2 * 3) * 4 * 8}

    def test_transposed_convolution_applies_its_weights_at_every_input(self) -> None:
        flops = count(nn.ConvTranspose2d(6, 4, kernel_size=3, stride=2, groups=2), torch.ones(5, 6, 7, 8))
        assert flops.by_parameter == {"weight": 2 * (6 * 2 * 3 * 3) * 5 * (7 * 8)}

    def test_bilinear(self) -> None:
        flops = count(nn.Bilinear(4, 5, 3), torch.ones(7, 4), torch.ones(7, 5))
        assert flops.by_parameter == {"weight": 2 * (3 * 4 * 5) * 7}

    @pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
    @pytest.mark.parametrize("training", [True, False])
    def test_recurrent_layers_apply_every_weight_at_every_time(
        self, kind: Callable[..., nn.RNNBase], training: bool
    ) -> None:
        module = kind(6, 8, num_layers=2, bidirectional=True)
        with torch.set_grad_enabled(training):
            flops = count(module, torch.ones(7, 5, 6))
        assert flops.by_parameter == {
            name: 2 * weight.numel() * 7 * 5 for name, weight in module.named_parameters() if weight.dim() > 1
        }
        assert flops.total == sum(flops.by_parameter.values())

    @pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
    def test_a_projected_lstm(self) -> None:
        flops = count(nn.LSTM(6, 8, proj_size=4), torch.ones(7, 5, 6))
        assert flops.by_parameter["weight_hr_l0"] == 2 * (4 * 8) * 7 * 5

    def test_the_recurrent_kernel_of_cuda(self) -> None:
        meta = nn.LSTM(6, 8, device="meta")
        weights = [parameter.detach() for parameter in meta.parameters()]
        state = torch.empty(1, 5, 8, device="meta")
        with ForwardFLOPs(dict(meta.named_parameters())) as flops:
            torch.ops.aten._cudnn_rnn(
                *(torch.empty(7, 5, 6, device="meta"), weights, 4, None, state, state),
                *(2, 8, 0, 1, False, 0.0, True, False, [], None),
            )
        assert flops.total == 2 * (32 * 6 + 32 * 8) * 7 * 5

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_attention_counts_its_projections_for_their_weights_and_itself_in_the_total(
        self, need_weights: bool
    ) -> None:
        batch, time, width, heads = 3, 5, 8, 2
        module = nn.MultiheadAttention(width, heads, batch_first=True)
        inputs = torch.ones(batch, time, width)
        flops = count(module, inputs, forward=lambda x: module(x, x, x, need_weights=need_weights))
        tokens = batch * time
        assert flops.by_parameter == {
            "in_proj_weight": 2 * (3 * width * width) * tokens,
            "out_proj.weight": 2 * (width * width) * tokens,
        }
        attention = 2 * (2 * batch * heads * time * time * (width // heads))
        assert flops.total == sum(flops.by_parameter.values()) + attention

    def test_attention_to_other_tokens_splits_its_packed_weight(self) -> None:
        module = nn.MultiheadAttention(8, 2, batch_first=True)
        query, key = torch.ones(3, 5, 8), torch.ones(3, 4, 8)
        flops = count(module, query, key, key)
        assert flops.by_parameter["in_proj_weight"] == 2 * (8 * 8) * 3 * (5 + 4 + 4)

    def test_attention_with_widths_of_its_own(self) -> None:
        module = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
        flops = count(module, torch.ones(3, 5, 8), torch.ones(3, 4, 6), torch.ones(3, 4, 4))
        assert flops.by_parameter == {
            "q_proj_weight": 2 * (8 * 8) * 3 * 5,
            "k_proj_weight": 2 * (8 * 6) * 3 * 4,
            "v_proj_weight": 2 * (8 * 4) * 3 * 4,
            "out_proj.weight": 2 * (8 * 8) * 3 * 5,
        }


class Functional(nn.Module):
    """Uses one weight twice, without a layer of its own, and computes another before it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.ones(4, 4))
        self.scaled = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(x, self.shared), self.shared.t()), self.scaled * 2)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 5)
    )


IMAGES = torch.linspace(-1, 1, 3 * 2 * 6 * 6).view(3, 2, 6, 6)
EXPECTED = {"0.weight": 2 * 72 * 16 * 3, "4.weight": 2 * 320 * 3, "5.weight": 2 * 25 * 3}


class TestAttribution:
    def test_a_weight_counts_wherever_it_is_used(self) -> None:
        assert count(Functional(), torch.ones(3, 4)).by_parameter["shared"] == 2 * (2 * 16 * 3)

    def test_what_is_computed_from_a_weight_counts_as_dense(self) -> None:
        flops = count(Functional(), torch.ones(3, 4))
        assert flops.by_parameter["scaled"] == 0
        assert flops.total == 3 * (2 * 16 * 3)

    def test_the_total_is_that_of_torch(self) -> None:
        module = network()
        with FlopCounterMode(display=False) as reference:
            module(IMAGES)
        assert count(module, IMAGES).total == reference.get_total_flops() == sum(EXPECTED.values())

    def test_casts_of_autocast_are_followed(self) -> None:
        module = network()
        with torch.autocast("cpu", torch.bfloat16):
            assert count(module, IMAGES).by_parameter == EXPECTED

    def test_weights_in_another_order_of_memory(self) -> None:
        module = network().to(memory_format=torch.channels_last)
        assert count(module, IMAGES).by_parameter == EXPECTED

    def test_a_checkpointed_forward_counts_once(self) -> None:
        module = network()
        flops = count(module, IMAGES, forward=lambda x: checkpoint(module, x, use_reentrant=False))
        assert flops.by_parameter == EXPECTED

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled_layers_count_and_are_compiled_once(self, backend: str) -> None:
        torch.compiler.reset()
        graphs = torch._dynamo.utils.counters["stats"]
        graphs.clear()
        module = network()
        compiled = torch.compile(module, backend=backend)
        flops = count(module, IMAGES, forward=compiled)
        compiled(IMAGES)
        assert flops.by_parameter == EXPECTED
        assert graphs["unique_graphs"] == 1

    def test_a_copy_made_by_generated_code_counts_for_a_weight_of_its_shape(self) -> None:
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3))
        copy = torch.ones(4, 3)
        with ForwardFLOPs(dict(module.named_parameters())) as flops, torch.no_grad():
            module[0](torch.ones(2, 3))
            for _ in range(2):
                torch.mm(torch.ones(2, 4), copy)
        assert flops.by_parameter == {"0.weight": 48, "1.weight": 96, "2.weight": 0}

    def test_an_activation_of_the_same_shape_does_not_count_for_a_weight(self) -> None:
        module = nn.Linear(3, 3)
        with ForwardFLOPs(dict(module.named_parameters())) as flops:
            torch.mm(torch.ones(3, 3), torch.ones(3, 3))
        assert (flops.total, flops.by_parameter) == (54, {"weight": 0})


class TestWhatRunsIsUnchanged:
    def test_results_are_equal_bit_for_bit(self) -> None:
        module = network()
        with ForwardFLOPs(dict(module.named_parameters())):
            counted = module(IMAGES)
        assert torch.equal(counted, module(IMAGES))

    def test_the_random_state_moves_as_without(self) -> None:
        torch.manual_seed(0)
        F.dropout(IMAGES)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        with ForwardFLOPs({}):
            F.dropout(IMAGES)
        assert torch.equal(torch.get_rng_state(), state)

    def test_tensors_without_strides_pass(self) -> None:
        sparse = torch.eye(3).to_sparse()
        with ForwardFLOPs({"weight": torch.ones(3, 3)}) as flops:
            torch.sparse.mm(sparse, torch.ones(3, 3))
            sparse.clone()
        assert flops.total >= 0

    def test_tensor_subclasses_unfold(self) -> None:
        ragged = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
        flops = count(nn.Linear(4, 3), ragged)
        assert flops.by_parameter == {"weight": 2 * 4 * 3 * (2 + 3)}

    def test_tensor_subclasses_that_change_no_operation_pass(self) -> None:
        class Image(Tensor):
            pass

        weight = torch.ones(3, 3, requires_grad=True)
        with ForwardFLOPs({"weight": weight}) as flops:
            torch.relu(IMAGES.view(-1, 3).as_subclass(Image) @ weight)
        assert flops.by_parameter == {"weight": 2 * IMAGES.numel() * 3}

    def test_control_flow_operators_run(self) -> None:
        torch.compiler.reset()
        with ForwardFLOPs({}):
            result = torch.cond(torch.tensor(True), lambda x: x + 1, lambda x: x - 1, (torch.zeros(2),))
        assert torch.equal(result, torch.ones(2))


def test_inference_adds_up_layers() -> None:
    metric = InferenceFLOPs()
    metric.update([100.0], [0.9])
    metric.update([50.0], [0.4], rest=50.0)
    assert metric.compute().item() == pytest.approx((10 + 30 + 50) / 200)


def test_training_is_the_mean_over_steps() -> None:
    metric = TrainingFLOPs()
    metric.update(sparse=100.0, dense=100.0)
    metric.update(sparse=20.0, dense=100.0)
    metric.update(sparse=20.0, dense=100.0, dense_gradients=80.0)
    assert metric.compute().item() == pytest.approx((300 + 60 + 140) / 900)
