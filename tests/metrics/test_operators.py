"""Operators that multiply matrices: each counts, or is warned of by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_sparse.metrics import ForwardFLOPs
from lightning_sparse.metrics.operators import has_formula, multiplies_matrices, operations

aten = torch.ops.aten
ones = torch.ones


def total(run: Callable[[], Any]) -> int:
    with ForwardFLOPs({}) as flops:
        run()
    return flops.total


# Named as in torch 2.14 and, where they have gone since, in 2.6; another version has most of them.
COUNTED = """
    mm bmm addmm addmm_ baddbmm baddbmm_ addbmm addmv mv dot vdot linear _int_mm _scaled_mm _scaled_mm_v2 _foreach_mm
    _addmm_activation _grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2 _sparse_addmm mkldnn_linear _trilinear
    _mixed_dtypes_linear _weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu _dyn_quant_matmul_4bit
    _weight_int4pack_mm_with_scales_and_zeros convolution _convolution conv_tbc
    cudnn_convolution cudnn_convolution_relu cudnn_convolution_add_relu cudnn_convolution_transpose mkldnn_convolution
    miopen_convolution miopen_convolution_relu miopen_convolution_add_relu miopen_convolution_transpose
    miopen_depthwise_convolution _mps_convolution _mps_convolution_transpose _nnpack_spatial_convolution
    _conv_depthwise2d conv_depthwise3d _slow_conv2d_forward slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d
    slow_conv_transpose2d slow_conv_transpose3d convolution_backward mkldnn_rnn_layer _cudnn_rnn miopen_rnn _lstm_mps
    _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_fused_attention_overrideable_backward
    _scaled_dot_product_attention_math_for_mps _flash_attention_forward _efficient_attention_forward
    _native_multi_head_attention _triton_multi_head_attention _transformer_encoder_layer_fwd
"""
WARNED = """
    _cslt_sparse_mm _sparse_semi_structured_mm _sparse_semi_structured_addmm _sparse_semi_structured_linear hspmm
    sspaddmm _sparse_sparse_matmul _sparse_mm_reduce_impl sparse_sampled_addmm _triton_scaled_dot_attention
    _cudnn_attention_forward _cudnn_rnn_backward miopen_rnn_backward mkldnn_rnn_layer_backward matmul_backward
    linear_backward quantized_gru quantized_lstm
"""
IN_PARTS = """
    matmul linalg_matmul linalg_multi_dot linalg_vecdot chain_matmul tensordot einsum bilinear conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d _convolution_mode lstm gru rnn_tanh rnn_relu lstm_cell gru_cell
    rnn_tanh_cell rnn_relu_cell scaled_dot_product_attention _scaled_dot_product_attention_math _sparse_mm smm
"""
NO_PRODUCTS = """
    upsample_bilinear2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa _thnn_fused_lstm_cell
    _thnn_fused_gru_cell _cudnn_rnn_flatten_weight mkldnn_reorder_conv2d_weight fbgemm_linear_quantize_weight
    fbgemm_pack_gemm_matrix_fp16 _cslt_sparse_mm_search _wrapped_linear_prepack _compute_linear_combination
    lgamma cummin cummax hamming_window embedding_bag native_layer_norm _to_copy mul add softmax native_dropout
"""


def existing(names: str) -> list[object]:
    """Those of this version of torch."""
    return [getattr(aten, name) for name in names.split() if hasattr(aten, name)]


class TestNames:
    def test_what_has_a_formula(self) -> None:
        assert [str(operator) for operator in existing(COUNTED) if not has_formula(operator)] == []

    def test_what_torch_has_a_formula_for(self) -> None:
        assert all(map(has_formula, flop_registry))

    def test_what_is_warned_of(self) -> None:
        unknown = existing(WARNED)
        assert [str(operator) for operator in unknown if has_formula(operator)] == []
        assert [str(operator) for operator in unknown if not multiplies_matrices(operator)] == []

    def test_what_is_made_of_others(self) -> None:
        for operator in existing(IN_PARTS):
            assert multiplies_matrices(operator)
            assert not has_formula(operator)
            assert getattr(operator, getattr(operator, "overloads")()[0])._can_decompose()  # noqa: B009

    def test_what_multiplies_nothing(self) -> None:
        assert [str(operator) for operator in existing(NO_PRODUCTS) if multiplies_matrices(operator)] == []

    @pytest.mark.parametrize("word", ["mm", "matmul", "linear", "conv", "attention", "rnn", "lstm", "gru"])
    def test_an_operator_that_a_later_torch_brings_is_not_passed_over(self, word: str) -> None:
        assert all(
            multiplies_matrices(f"{space}.{name}") for space in ("aten", "fbgemm") for name in (word, f"_new_{word}_v3")
        )


A, B, BATCH, VECTOR = ones(3, 4), ones(4, 5), ones(2, 3, 4), ones(4)
QUERY, KEY, VALUE = ones(2, 4, 5, 8), ones(2, 4, 7, 8), ones(2, 4, 7, 8)
ATTENTION = 2 * (2 * 4 * 5 * 7) * (8 + 8)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: A @ VECTOR, 2 * 3 * 4),
        (lambda: VECTOR @ VECTOR, 2 * 4),
        (lambda: torch.addmv(ones(3), A, VECTOR), 2 * 3 * 4),
        (lambda: ones(3, 5).addmm_(A, B), 2 * 3 * 4 * 5),
        (lambda: ones(2, 3, 3).baddbmm_(BATCH, BATCH.mT), 2 * 2 * 3 * 4 * 3),
        (lambda: torch.addbmm(ones(3, 3), BATCH, BATCH.mT), 2 * 2 * 3 * 4 * 3),
        (lambda: torch.mm(A, B, out=ones(3, 5)), 2 * 3 * 4 * 5),
        (lambda: torch.einsum("bij,bkj->bik", BATCH, BATCH), 2 * 2 * 3 * 4 * 3),
        (lambda: aten._int_mm(ones(32, 16, dtype=torch.int8), ones(16, 8, dtype=torch.int8)), 2 * 32 * 16 * 8),
        (lambda: torch.conv_tbc(ones(9, 2, 4), ones(3, 4, 6), ones(6)), 2 * (3 * 4 * 6) * 2 * 7),
        (lambda: F.scaled_dot_product_attention(QUERY, KEY, VALUE), ATTENTION),
        (lambda: F.scaled_dot_product_attention(QUERY, KEY, VALUE, attn_mask=ones(5, 7)), ATTENTION),
        (lambda: F.scaled_dot_product_attention(QUERY, KEY[:, :2], VALUE[:, :2], enable_gqa=True), ATTENTION),
        (lambda: torch.eye(4).to_sparse() @ B, 2 * 4 * 5),
        (lambda: torch.sparse.mm(torch.eye(4).to_sparse_csr(), B), 2 * 4 * 5),
        (lambda: torch.sparse.addmm(ones(4, 5), torch.eye(4).to_sparse(), B), 2 * 4 * 5),
    ],
    ids=range(16),
)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_products(
    run: Callable[[], Tensor], expected: int, context: Callable[[], AbstractContextManager[None]]
) -> None:
    with context():
        assert total(run) == expected


@pytest.mark.parametrize(
    ("first", "other", "expected"),
    [
        (ones(6, 4), ones(2, 4, 5), 2 * 6 * 4 * 5),  # rows in groups: experts
        (ones(2, 3, 4), ones(4, 6), 2 * 3 * 4 * 6),  # columns in groups
        (ones(3, 8), ones(8, 5), 2 * 3 * 8 * 5),  # the inner dimension in groups: gradients of experts
        (ones(2, 3, 4), ones(2, 4, 5), 2 * 2 * 3 * 4 * 5),
    ],
)
def test_grouped_products(first: Tensor, other: Tensor, expected: int) -> None:
    uses = operations("aten._grouped_mm", (first, other), {}, None)
    assert uses == [(expected, (first, other))]


def test_a_list_of_products() -> None:
    uses = operations("aten._foreach_mm", ([A, A], [B, B.T.contiguous().T]), {}, [A @ B, A @ B])
    assert uses is not None
    assert [flops for flops, _ in uses] == [2 * 3 * 4 * 5] * 2


def test_experts_count_for_their_stack() -> None:
    stack = nn.Parameter(ones(2, 16, 32, dtype=torch.bfloat16))
    ends = torch.tensor([8, 24], dtype=torch.int32)
    with ForwardFLOPs({"experts": stack}) as flops:
        aten._grouped_mm(ones(24, 16, dtype=torch.bfloat16), stack, offs=ends)
    assert flops.by_parameter == {"experts": 2 * 24 * 16 * 32}


@pytest.mark.parametrize("name", ["slow_conv_transpose2d", "_conv_depthwise2d"])
def test_the_kernels_that_a_convolution_ends_in(name: str) -> None:
    image, weight = ones(2, 6, 9, 9), ones(6, 1, 3, 3)
    result = ones(2, 6, 7, 7)
    places = image if "transpose" in name else result
    assert operations(f"aten.{name}", (image, weight, [3, 3]), {}, result) == [(2 * places.numel() * 9, [weight])]


def test_the_gradient_of_attention_within_a_forward() -> None:
    query, key, value = (part.clone().requires_grad_() for part in (QUERY, KEY, VALUE))

    def forces() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(query, key, value).sum(), query)

    assert total(forces) == ATTENTION + 2 * (2 * 4 * 5 * 7) * 5 * 8


class TestFastPaths:
    """Without gradients torch runs some modules in one operator; what it takes is the same."""

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize(
        ("module", "inputs"),
        [
            (nn.Linear(4, 3), ones(5, 4)),
            (nn.Conv2d(2, 4, 3, groups=2), ones(3, 2, 6, 6)),
            (nn.ConvTranspose1d(2, 4, 3), ones(3, 2, 6)),
            (nn.LSTM(6, 8, num_layers=2), ones(7, 5, 6)),
            (nn.GRU(6, 8), ones(7, 5, 6)),
            (nn.LSTMCell(6, 8), ones(5, 6)),
            (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), ones(3, 5, 8)),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_count_as_with_gradients(
        self, module: nn.Module, inputs: Tensor, context: Callable[[], AbstractContextManager[None]]
    ) -> None:
        module.eval()
        with ForwardFLOPs(dict(module.named_parameters())) as expected:
            module(inputs)
        with context(), ForwardFLOPs(dict(module.named_parameters())) as flops:
            module(inputs)
        assert flops.total == expected.total > 0
        assert flops.by_parameter == expected.by_parameter

    def test_attention_to_other_tokens(self) -> None:
        module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        query, other = ones(3, 5, 8), ones(3, 4, 8)
        counts = [ForwardFLOPs(dict(module.named_parameters())) for _ in range(2)]
        for flops, context in zip(counts, (torch.enable_grad, torch.no_grad), strict=True):
            with context(), flops:
                module(query, other, other)
        assert counts[0].by_parameter == counts[1].by_parameter

    def test_what_runs_in_inference_mode_is_unchanged(self) -> None:
        module, inputs = nn.Sequential(nn.Conv1d(3, 4, 3), nn.GRU(6, 8)), torch.linspace(-1, 1, 24).view(3, 8)
        with torch.inference_mode():
            with ForwardFLOPs({}):
                counted, _ = module(inputs)
            assert torch.equal(counted, module(inputs)[0])


@custom_op("lightning_sparse_tests::fused_linear", mutates_args=())
def fused_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    return inputs @ weight.T


class TestUnknownOperators:
    def test_are_warned_of_by_name_and_once(self) -> None:
        def run() -> None:
            fused_linear(A, ones(5, 4))
            fused_linear(A, ones(5, 4))
            torch.mm(A, B)

        with pytest.warns(
            UserWarning, match=r"leave out lightning_sparse_tests\.fused_linear: .*register_flop"
        ) as caught:
            assert total(run) == 2 * 3 * 4 * 5
        assert len(caught) == 1

    def test_count_when_somebody_has_given_a_formula(self, monkeypatch: pytest.MonkeyPatch) -> None:
        operator = torch.ops.lightning_sparse_tests.fused_linear
        monkeypatch.setitem(flop_registry, operator, lambda *_, **__: 7)
        assert total(lambda: fused_linear(A, ones(5, 4))) == 7

    def test_a_formula_that_refuses_stops_nothing_and_is_warned_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> int:
            raise AssertionError("unknown shapes")

        monkeypatch.setitem(flop_registry, aten.convolution, refuse)
        with pytest.warns(UserWarning, match=r"leave out aten\.convolution:"):
            assert total(lambda: nn.Conv1d(2, 3, 3)(ones(2, 5))) == 0

    def test_an_error_in_the_forward_comes_out_alone(self) -> None:
        def run() -> None:
            fused_linear(A, ones(5, 4))
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):  # and no warning, which would be an error here
            total(run)

    def test_interpolation_and_dropout_are_not_warned_of(self) -> None:
        assert total(lambda: F.dropout(F.interpolate(ones(1, 2, 6, 6), scale_factor=2, mode="bilinear"))) == 0


def test_nothing_is_named_twice() -> None:
    names = [*chain.from_iterable(names.split() for names in (COUNTED, WARNED, IN_PARTS, NO_PRODUCTS))]
    assert len(names) == len(set(names))


def test_attention_counts_as_torch_counts_its_parts() -> None:
    with FlopCounterMode(display=False) as reference:
        torch.matmul(torch.softmax(QUERY @ KEY.mT, dim=-1), VALUE)
    assert total(lambda: F.scaled_dot_product_attention(QUERY, KEY, VALUE)) == reference.get_total_flops()
