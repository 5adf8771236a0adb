"""Floating-point operations: counted where they run, and compared with those of dense training.

They are theoretical: those of an ideal sparse kernel. The masked dense kernels that run here save none.
The arithmetic is in :mod:`lightning_sparse.functional.flops`.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric
from typing_extensions import override

from lightning_sparse.functional.flops import sparse_flops, training_flops
from lightning_sparse.metrics.operators import Uses, has_formula, multiplies_matrices, operations, tensors_in

__all__ = ["ForwardFLOPs", "InferenceFLOPs", "TrainingFLOPs"]

aten = torch.ops.aten

_PLAIN = Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]

_COPIES = {aten._to_copy, aten.clone}


class ForwardFLOPs(TorchDispatchMode):
    """A context manager that counts the FLOPs of the code that runs in it, in total and for each parameter.

    An operation belongs to the parameter whose memory it reads, whatever module or function uses it. So the projections
    of an attention layer count for their weights, while attention itself, which has none, counts only in the total.
    Casts by autocast and products with a scalar are followed. Within ``torch.compile``, kernels that are called are
    counted, but generated kernels are not. If generated code has copied a weight, its operation counts for the first
    parameter of that shape without operations. The code itself runs unchanged.

    Args:
        parameters: The parameters by name; those with fewer than two dimensions have no operations of their own.

    Attributes:
        total: FLOPs in total, two for each multiply-add in matrix products, convolutions, attention and recurrent
            layers; other operations count as 0.
        by_parameter: FLOPs of each parameter with two or more dimensions.
        uncounted: Operators that multiply matrices, according to their names, but have no FLOP formula. They count as
            0, and a warning names them. Add a formula with :func:`torch.utils.flop_counter.register_flop_formula`.

    Example:
        >>> layer = torch.nn.Linear(4, 3)
        >>> with ForwardFLOPs(dict(layer.named_parameters())) as flops:
        ...     loss = layer(torch.ones(5, 4)).sum()
        >>> flops.total, flops.by_parameter
        (120, {'weight': 120})
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        weights = {name: parameter for name, parameter in parameters.items() if parameter.dim() > 1}
        self.total = 0
        self.by_parameter = dict.fromkeys(weights, 0)
        self.uncounted: set[str] = set()
        self._weights = weights
        self._memory: list[tuple[int, int, str]] = []  # start, end, name
        self._alive: list[Tensor] = []  # copies, whose memory must not be given to another tensor while we count

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run compiled; it would run eagerly while this mode is on."""
        return True

    @override
    def __enter__(self) -> ForwardFLOPs:
        self._memory.clear()
        for name, weight in self._weights.items():
            self._remember(weight, name)
        super().__enter__()
        return self

    @override
    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._alive.clear()
        if self.uncounted and exception[0] is None:
            warnings.warn(
                f"FLOPs leave out {', '.join(sorted(self.uncounted))}: their number of operations is unknown. State it"
                " with torch.utils.flop_counter.register_flop_formula.",
                stacklevel=2,
            )

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind.__torch_dispatch__ is not _PLAIN for kind in types):
            return NotImplemented  # a tensor subclass: let it unfold into operations on plain tensors
        operator = getattr(func, "overloadpacket", func)
        if multiplies_matrices(operator) and not has_formula(operator):
            result = self._in_parts(func, args, kwargs or {})
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if operator in _COPIES:
            self._follow(args[0], result)
        elif operator is aten.copy_:
            self._follow(args[1], args[0])
        elif operator is aten.mul:
            self._follow_scaled(tensors_in(args), result)
        else:
            self._count(operator, operations(operator, args, kwargs or {}, result))
        return result

    def _in_parts(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what is made of other operators one by one, as autograd does; in inference mode it would run as one."""
        decompose = getattr(func, "decompose", None)
        if decompose is None:
            return NotImplemented
        super().__enter__()
        try:
            return decompose(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def _count(self, operator: object, uses: Uses | None) -> None:
        if uses is None:
            self.uncounted.add(str(operator))
            return
        for flops, operands in uses:
            self.total += flops
            name = next((owner for owner in map(self._owner, operands) if owner), None) or self._adopt(operands)
            if name:
                self.by_parameter[name] += flops

    def _owner(self, tensor: Tensor) -> str | None:
        """The parameter whose memory ``tensor`` is, wholly or in part."""
        address = _address(tensor)
        index = bisect_right(self._memory, (address, float("inf"), "")) - 1
        if index < 0 or address >= self._memory[index][1]:
            return None
        return self._memory[index][2]

    def _adopt(self, operands: Sequence[Tensor]) -> str | None:
        """In compiled code, the first parameter without operations that has the shape of the last matrix."""
        matrices = [operand for operand in operands if operand.dim() > 1]
        if torch.is_grad_enabled() or not matrices:  # compiled code runs without, below autograd
            return None
        copy = matrices[-1]
        for name, weight in self._weights.items():
            if weight.shape in (copy.shape, copy.mT.shape) and not self.by_parameter[name]:
                self._follow(weight, copy)
                return name
        return None

    def _follow(self, source: Tensor, copy: Tensor) -> None:
        name = self._owner(source)
        if name:
            self._alive.append(copy)
            self._remember(copy, name)

    def _follow_scaled(self, factors: Sequence[Tensor], product: Tensor) -> None:
        """A weight times a scalar, as in a convolution that shares its weights, is still that weight."""
        if any(factor.dim() == 0 for factor in factors):
            for factor in factors:
                if factor.shape == product.shape:
                    self._follow(factor, product)

    def _remember(self, tensor: Tensor, name: str) -> None:
        start = _address(tensor)
        if start:
            insort(self._memory, (start, start + tensor.numel() * tensor.element_size(), name))


class InferenceFLOPs(Metric):
    """FLOPs of a forward pass relative to the dense network, in [0, 1].

    See :func:`~lightning_sparse.functional.flops.inference_flops`. Several updates add up the layers of one network.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = InferenceFLOPs()
        >>> metric.update([100.0], [0.9])
        >>> metric.update([], [], rest=100.0)
        >>> metric.compute()
        tensor(0.5500, dtype=torch.float64)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = False
    full_state_update: bool | None = False
    sparse: Tensor
    dense: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sparse", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("dense", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, dense: Sequence[float], sparsity: Sequence[float], rest: float = 0.0) -> None:
        """Add layers: their dense operations and sparsities, and the operations of what has no mask."""
        self.sparse += sparse_flops(dense, sparsity, rest)
        self.dense += sum(dense) + rest

    @override
    def compute(self) -> Tensor:
        return self.sparse / self.dense


class TrainingFLOPs(Metric):
    """FLOPs of training relative to dense training: the mean over steps.

    See :func:`~lightning_sparse.functional.flops.training_flops`; each update is one step.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = TrainingFLOPs()
        >>> metric.update(sparse=10.0, dense=100.0)
        >>> metric.update(sparse=10.0, dense=100.0, dense_gradients=90.0)
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = False
    full_state_update: bool | None = False
    spent: Tensor
    steps: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("spent", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("steps", default=torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, sparse: float, dense: float, dense_gradients: float = 0.0) -> None:
        """Add a step with the forward operations of the sparse and the dense network."""
        self.spent += training_flops(sparse, dense, dense_gradients)
        self.steps += 1

    @override
    def compute(self) -> Tensor:
        return self.spent / self.steps


def _address(tensor: Tensor) -> int:
    """Where the memory of ``tensor`` begins; 0 where it has none of its own."""
    return tensor.data_ptr() if tensor.layout is torch.strided else 0
