"""Wanda: scores of trained weights from their size and from that of what they are multiplied by.

Paper:  Sun, Liu, Bair & Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
        https://arxiv.org/abs/2306.11695
Code:   https://github.com/locuslab/wanda
Differs from the paper and the authors' code:
    - All layers are looked at in the dense module; the authors' code prunes block by block, and what it prunes later
      sees the outputs of what was pruned before.
    - Convolutions are scored too, each weight by exactly the inputs that it meets; padding counts as zeros.
    - The budget of a layer is rounded down to whole weights of each output, as there, and is the same in each layer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lightning_sparse.masks.candidate import Candidate
from lightning_sparse.methods.probe import evaluating

__all__ = ["wanda_scores"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def wanda_scores(module: nn.Module, batches: Iterable[Any], candidates: Sequence[Candidate]) -> dict[str, Tensor]:
    r"""Compute :math:`S_{ij} = |W_{ij}| \cdot \lVert X_j \rVert_2` of linear layers and convolutions.

    :math:`X_j` is what weight :math:`j` of an output is multiplied by, over all batches, places and tokens. Each layer
    is linear in its weights, so the sum of squares is the gradient :math:`\partial \sum f(X^2; W) / \partial W`, which
    holds for groups, strides and padding alike.

    Args:
        module: Is called in evaluation mode without gradients, and left as it was.
        batches: What it is called with: tensors; mappings, as keyword arguments; or lists and tuples, of whose entries
            the first is taken, as of a loader's ``(inputs, targets)``.
        candidates: The weights that are asked for.

    Returns:
        The scores by name, ``float32`` or wider, shaped like the weights.

    Raises:
        ValueError: There is no batch, one is not what the module takes, or a weight belongs to no layer that is known
            to be linear in it, or saw no input.

    Example:
        >>> from lightning_sparse.masks.plan import judge_parameters
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0]]))
        >>> batch = torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 0.0]])  # columns of norm 5, 1 and 0
        >>> wanda_scores(layer, [batch], judge_parameters(layer).weights)
        {'weight': tensor([[5., 2., 0.]])}
    """
    _check_known(candidates)
    squares: dict[str, Tensor] = {}
    count = 0
    with _hooks(candidates, squares), evaluating(module), torch.no_grad():
        device = candidates[0].parameter.device
        for batch in batches:
            count += 1
            try:
                _call(module, move_data_to_device(batch, device))
            except Exception as error:  # whatever a user's code may raise
                raise ValueError(
                    f"{type(module).__name__} cannot compute on a calibration batch ({type(batch).__name__}): {error}"
                    " Give tensors, (inputs, targets), or mappings of keyword arguments."
                ) from error
    if not count:
        raise ValueError("batches is empty, but Wanda needs inputs; give about a hundred training samples.")
    unseen = [candidate.name for candidate in candidates if candidate.name not in squares]
    if unseen:
        raise ValueError(
            f"No input came to {', '.join(unseen)} in a call of its layer, so Wanda cannot score it. Leave it dense"
            " with exclude=, or prune it by magnitude."
        )
    return {
        candidate.name: candidate.parameter.detach().abs().mul(squares[candidate.name].sqrt())
        for candidate in candidates
    }


def _check_known(candidates: Sequence[Candidate]) -> None:
    unknown = [candidate.name for candidate in candidates if not _is_linear(candidate)]
    if unknown:
        raise ValueError(
            f"Wanda scores only weights of linear layers and convolutions, not {', '.join(unknown)}. Leave it dense"
            " with exclude=, or prune it by magnitude."
        )


def _is_linear(candidate: Candidate) -> bool:
    if candidate.part != "whole" or candidate.copies != 1 or candidate.local_name != "weight":
        return False
    # The last is the linear layer of transformers that stores (in, out).
    return isinstance(candidate.owner, (nn.Linear, *_CONVOLUTIONS)) or (
        candidate.input_first and candidate.parameter.dim() == 2
    )


def _square_inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str, squares: dict[str, Tensor]
) -> None:
    """Add the squares of what each weight is multiplied by in this call of its layer."""
    inputs: Tensor = (*args, *kwargs.values())[0]
    wide = torch.promote_types(layer.get_parameter("weight").dtype, torch.float32)
    own = {f"layer.{key}": its.detach().to(wide) for key, its in layer.named_parameters()}
    variable = own["layer.weight"] = own["layer.weight"].clone().requires_grad_()
    with torch.enable_grad(), torch.autocast(variable.device.type, enabled=False):
        outputs = functional_call(_Plain(layer), own, (inputs.detach().to(wide).square(),))
        (its,) = torch.autograd.grad(outputs.sum(), variable)
    squares[name] = squares[name].add_(its) if name in squares else its


class _Plain(nn.Module):
    """The forward of a layer without its hooks: others' would count this call, and ours would make it again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer.forward(inputs)


@contextmanager
def _hooks(candidates: Sequence[Candidate], squares: dict[str, Tensor]) -> Generator[None]:
    handles = [
        candidate.owner.register_forward_pre_hook(
            partial(_square_inputs, name=candidate.name, squares=squares), with_kwargs=True
        )
        for candidate in candidates
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(module: nn.Module, batch: Any) -> None:
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        module(**batch)
    else:
        module(batch)
