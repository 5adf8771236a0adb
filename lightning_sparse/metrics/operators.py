"""How many operations an operator of torch takes, and which of its arguments may be a weight.

torch has formulas for the commonest operators that multiply matrices, :data:`torch.utils.flop_counter.flop_registry`,
and those that a user registers there. Here are those that it lacks, by name, because versions of torch differ in what
operators they have; and how one knows by its name that an operator multiplies matrices, though nobody knows how many.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

__all__ = ["Uses", "has_formula", "multiplies_matrices", "operations", "tensors_in"]

Uses = list[tuple[int, Sequence[Tensor]]]
"""Operations, and the tensors among which their weight may be; attention has none."""

Formula = Callable[[Sequence[Any], Mapping[str, Any], Any], Uses]
"""From the arguments of a call, those by keyword, and its result."""


def operations(operator: object, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Uses | None:
    """What a call took: two operations for a multiplication and an addition, none where no matrices are multiplied.

    Args:
        operator: An operator without its overload, such as ``torch.ops.aten.mm``.
        args: The arguments of the call.
        kwargs: Those by keyword.
        result: What it returned.

    Returns:
        The operations with the tensors that may be their weight; ``None`` where matrices are multiplied and no formula
        says how many operations that takes.

    Example:
        >>> matrix, vector = torch.ones(3, 4), torch.ones(4)
        >>> uses = operations(torch.ops.aten.mv, (matrix, vector), {}, matrix @ vector)
        >>> [flops for flops, _ in uses]
        [24]
    """
    if not has_formula(operator):
        return None if multiplies_matrices(operator) else []
    if any(tensor.layout is not torch.strided for tensor in tensors_in(args)):
        return _of_sparse(_matrices(args), result)
    theirs, ours = _formula_of_torch(operator), _own_formula(operator)
    uses = None if theirs is None else _ask(theirs, args, kwargs, result)
    return _ask(ours, args, kwargs, result) if uses is None and ours is not None else uses


def has_formula(operator: object) -> bool:
    """Whether the operations of an operator are known, here or in torch.

    Example:
        >>> has_formula(torch.ops.aten.mm), has_formula(torch.ops.aten.einsum)
        (True, False)
    """
    return operator in flop_registry or _own_formula(operator) is not None


@cache
def multiplies_matrices(operator: object) -> bool:
    """Whether an operator multiplies matrices, as far as its name tells.

    Example:
        >>> [multiplies_matrices(name) for name in ("aten.addmm", "mylib.fused_linear", "aten.upsample_linear1d")]
        [True, True, False]
    """
    name = str(operator).rpartition(".")[2]
    return not _NO_PRODUCT.search(name) and not _WORDS.isdisjoint(re.split(r"[_\d]+", name))


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among ``values`` and in the lists among them."""
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    return [item for item in flat if isinstance(item, Tensor)]


# Names.

_WORDS = {
    *("mm", "bmm", "smm", "spmm", "hspmm", "sspaddmm", "addmm", "addbmm", "baddbmm", "gemm", "mv", "addmv", "matmul"),
    *("dot", "vdot", "vecdot", "tensordot", "einsum", "linear", "qlinear", "bilinear", "trilinear"),
    *("conv", "qconv", "convolution", "rnn", "lstm", "gru", "attention", "attn", "mha", "transformer"),
}
# What has such a word and multiplies nothing: interpolation, weights made ready, the gates of recurrent cells.
_NO_PRODUCT = re.compile(
    "upsample|linear_combination|prepack|fbgemm_pack|quantize_weight|reorder|flatten|search|thnn_fused"
)


# Formulas.


def _ask(formula: Formula, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Uses | None:
    try:
        return formula(args, kwargs, result)
    except Exception:  # it refuses what its operator has just done; to watch must not stop a training
        return None


def _matrices(args: Sequence[Any]) -> list[Tensor]:
    return [tensor for tensor in tensors_in(args) if tensor.dim() > 1]


def _tokens(inputs: Tensor) -> int:
    """How often a layer applies its weights to ``inputs``, which have their features in the last dimension."""
    return inputs.numel() // inputs.shape[-1]


def _product(first: int) -> Formula:
    """Each number of the result sums over the last dimension of argument ``first``; the other matrix comes after it."""

    def formula(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
        return [(2 * result.numel() * args[first].shape[-1], args[first : first + 2])]

    return formula


def _summed_products(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
    """Of ``addbmm``, which adds up the products of a batch."""
    return [(2 * args[1].numel() * args[2].shape[-1], args[1:3])]


def _products(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
    return [
        use for first, other, out in zip(*args[:2], result, strict=True) for use in _product(0)([first, other], {}, out)
    ]


def _grouped(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
    """Rows, columns or the inner dimension are split into groups, each with a matrix of its own."""
    first, other = args[:2]
    split_columns = first.dim() == 3 and other.dim() == 2
    return [(2 * (first.shape[-2] * other.numel() if split_columns else first.numel() * other.shape[-1]), args[:2])]


def _applied(which: slice) -> Formula:
    """The weights among the arguments ``which`` are applied to each of the inputs, the first argument."""

    def formula(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
        weights = _matrices(args[which])
        return [(2 * weight.numel() * _tokens(args[0]), [weight]) for weight in weights]

    return formula


def _convolution(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
    weight = args[1]
    return [(2 * result.numel() * weight.numel() // weight.shape[0], [weight])]


def _transposed_convolution(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
    weight = args[1]
    return [(2 * args[0].numel() * weight.numel() // weight.shape[0], [weight])]


def _convolution_in_time(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
    """Of ``conv_tbc``: (time, batch, channel) and a weight of shape (width, in, out)."""
    return [(2 * args[1].numel() * _tokens(result), [args[1]])]


def _attention(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
    """Scores, and the values that they choose. What a mask or causality leaves out counts, as it does in torch."""
    query, key, value = args[:3]
    return [(2 * _tokens(query) * key.shape[-2] * (query.shape[-1] + value.shape[-1]), [])]


def _attention_backward(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
    """Scores once more, and the gradients of scores, queries, keys and values."""
    _, query, key, value = args[:4]
    return [(2 * _tokens(query) * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1]), [])]


def _multi_head_attention(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
    query, key, value, width, _, packed, _, out = args[:8]
    tokens = sum(_tokens(inputs) for inputs in (query, key, value))
    return [
        (2 * width * width * tokens, [packed]),
        (2 * out.numel() * _tokens(query), [out]),
        *_attention([query, key, value], {}, None),
    ]


def _encoder_layer(args: Sequence[Any], _: Mapping[str, Any], result: Any) -> Uses:
    source, width, heads, packed, bias, out = args[:6]
    attention = _multi_head_attention([source, source, source, width, heads, packed, bias, out], {}, None)
    return attention + _applied(slice(14, 18))(args, {}, None)


def _of_sparse(matrices: Sequence[Tensor], result: Any) -> Uses | None:
    """Each stored value meets the columns, or the rows, of a dense matrix."""
    if len(matrices) < 2:
        return None
    first, other = matrices[-2:]
    if result.layout is not torch.strided or first.dim() != 2 or other.dim() != 2:
        return None
    if first.layout is torch.strided:
        return [(2 * _stored(other) * first.shape[0], [])]
    return [(2 * _stored(first) * other.shape[1], [other])]


def _stored(sparse: Tensor) -> int:
    return (sparse._values() if sparse.layout is torch.sparse_coo else sparse.values()).numel()


_FORMULAS: dict[str, Formula] = {
    name: formula
    for formula, names in (
        (_product(0), "mm bmm mv dot vdot _int_mm _scaled_mm _scaled_mm_v2 mkldnn_linear _mixed_dtypes_linear"),
        (_product(0), "_weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu _dyn_quant_matmul_4bit"),
        (_product(0), "_weight_int4pack_mm_with_scales_and_zeros"),
        (_product(1), "addmm baddbmm addmv _addmm_activation _sparse_addmm"),
        (_summed_products, "addbmm"),
        (_products, "_foreach_mm"),
        (_grouped, "_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2"),
        (_applied(slice(1, 2)), "linear _trilinear _cudnn_rnn miopen_rnn"),
        (_applied(slice(1, 3)), "mkldnn_rnn_layer"),
        (_applied(slice(2, 3)), "_lstm_mps"),
        (_convolution, "_slow_conv2d_forward slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d"),
        (_convolution, "_conv_depthwise2d conv_depthwise3d miopen_depthwise_convolution"),
        (_convolution, "cudnn_convolution cudnn_convolution_relu cudnn_convolution_add_relu"),
        (_convolution, "miopen_convolution miopen_convolution_relu miopen_convolution_add_relu"),
        (_convolution, "mkldnn_convolution _mps_convolution _nnpack_spatial_convolution"),
        (_transposed_convolution, "slow_conv_transpose2d slow_conv_transpose3d _mps_convolution_transpose"),
        (_transposed_convolution, "cudnn_convolution_transpose miopen_convolution_transpose"),
        (_convolution_in_time, "conv_tbc"),
        (_attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable"),
        (_attention, "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention"),
        (_attention, "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math_for_mps"),
        (_attention_backward, "_scaled_dot_product_flash_attention_for_cpu_backward"),
        (_attention_backward, "_scaled_dot_product_fused_attention_overrideable_backward"),
        (_multi_head_attention, "_native_multi_head_attention _triton_multi_head_attention"),
        (_encoder_layer, "_transformer_encoder_layer_fwd"),
    )
    for name in names.split()
}


def _own_formula(operator: object) -> Formula | None:
    """``aten.addmm_`` is ``addmm`` here; what is not torch's own keeps its full name."""
    return _FORMULAS.get(str(operator).removeprefix("aten.").rstrip("_"))


def _formula_of_torch(operator: object) -> Formula | None:
    """The formula that torch has, or that a user has given it."""
    formula = flop_registry.get(operator)
    if formula is None:
        return None
    of_attention = "attention" in str(operator)

    def uses(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Uses:
        return [(formula(*args, **kwargs, out_val=result), [] if of_attention else tensors_in(args))]

    return uses
