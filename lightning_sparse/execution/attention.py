"""Self-attention whose projections have zeros, with sparse layers for its two matrices, and encoders made of it."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_sparse.execution.linear import SparseLinear, linear_step
from lightning_sparse.execution.standing_in import StandIn

__all__ = [
    "SparseEncoder",
    "SparseSelfAttention",
    "is_plain_self_attention",
    "why_dense_attention",
    "with_sparse_encoders",
]


def why_dense_attention(attention: nn.MultiheadAttention) -> str | None:
    """Return why attention cannot be executed sparsely; ``None`` if it can.

    Example:
        >>> from torch import nn
        >>> why_dense_attention(nn.MultiheadAttention(8, 2, kdim=4))
        'its keys or values differ in size from the queries, which only torch computes'
    """
    joined: Any = attention.in_proj_weight
    if joined is None:
        return "its keys or values differ in size from the queries, which only torch computes"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it attends to constants (bias_k, add_zero_attn), which only torch computes"
    return None


@final
class SparseSelfAttention(StandIn):
    """Attention of a sequence to itself, for inference. With masks or other keys, the dense one works.

    Args:
        attention: The dense layer, which is kept.
        kernels: One of :func:`~lightning_sparse.execution.kernels.available_kernels`.
        threads: How many threads compute.

    Raises:
        ValueError: :func:`why_dense_attention` has an objection.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> sparse = SparseSelfAttention(attention, kernels="torch_csr", threads=1)
        >>> x = torch.randn(3, 5, 8)
        >>> torch.allclose(sparse(x, x, x, need_weights=False)[0], attention(x, x, x)[0], atol=1e-6)
        True
    """

    def __init__(self, attention: nn.MultiheadAttention, *, kernels: str, threads: int) -> None:
        super().__init__()
        if reason := why_dense_attention(attention):
            raise ValueError(f"{attention} cannot be executed sparsely: {reason}. Leave it dense.")
        self.dense = attention
        self.in_proj_bias = None  # which tells nn.TransformerEncoderLayer to call this, and not to read its weights
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.batch_first = attention.batch_first
        inward = linear_step(attention.in_proj_weight, attention.in_proj_bias)
        outward = linear_step(attention.out_proj.weight, attention.out_proj.bias)
        self.in_proj = SparseLinear([inward], kernels=kernels, threads=threads)
        self.out_proj = SparseLinear([outward], kernels=kernels, threads=threads)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return outputs, of the input's shape (batch, length, features) or as ``batch_first`` says, and no weights."""
        if not is_plain_self_attention(args, kwargs):
            return self.dense(*args, **kwargs)
        query: Tensor = args[0] if args else kwargs["query"]
        turned = not self.batch_first and query.dim() == 3
        heads = self.in_proj(query.transpose(0, 1) if turned else query).unflatten(
            -1, (3, self.num_heads, self.head_dim)
        )
        queries, keys, values = (part.transpose(-3, -2) for part in heads.unbind(-3))
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        y = self.out_proj(mixed.transpose(-3, -2).flatten(-2))
        return y.transpose(0, 1) if turned else y, None


def is_plain_self_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether ``nn.MultiheadAttention`` is called with one sequence, no masks, and asked for no weights."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    same = given.get("query") is given.get("key") is given.get("value")
    masks = (given.get(name) for name in ("key_padding_mask", "attn_mask", "is_causal"))
    plain = all(mask is None or mask is False for mask in masks)
    return same and plain and given.get("need_weights", True) is False


@final
class SparseEncoder(StandIn):
    """``nn.TransformerEncoder`` whose layers may be sparse, which take no nested tensors.

    Where ``src_key_padding_mask`` hides the ends of sequences, torch leaves them out by nesting, and has zeros in their
    place before the last normalisation. Here they are computed, and then set to zero.

    Args:
        encoder: In evaluation mode. It is changed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1).eval()
        >>> hidden = torch.tensor([[False, False, True]])
        >>> SparseEncoder(encoder)(torch.randn(1, 3, 8), src_key_padding_mask=hidden)[0, 2].count_nonzero()
        tensor(0)
    """

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.nests = encoder.use_nested_tensor
        self.norm: nn.Module | None = encoder.norm
        encoder.use_nested_tensor, encoder.norm = False, None
        self.encoder = encoder
        self.stand_for(encoder)

    @override
    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Return outputs, of the input's shape (batch, length, features) or as ``batch_first`` says."""
        y = self.encoder(src, mask, src_key_padding_mask, is_causal)
        if self.nests and mask is None and src_key_padding_mask is not None and src.dim() == 3:
            hidden = src_key_padding_mask.bool()  # of floats, which are added, all but zeros hide
            if not (hidden[:, :-1] & ~hidden[:, 1:]).any():
                y = y.masked_fill(hidden[..., None], 0)
        return y if self.norm is None else self.norm(y)


def with_sparse_encoders(root: nn.Module) -> nn.Module:
    """Let encoders take sparse layers: put :class:`SparseEncoder` in their place. Returns the module."""
    for name, part in list(root.named_modules()):
        if type(part) is nn.TransformerEncoder:
            if not name:
                return SparseEncoder(part)
            root.set_submodule(name, SparseEncoder(part))
    return root
