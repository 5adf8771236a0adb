"""Weight sharing: in a stage of equal blocks, later blocks reuse the convolutions of an earlier one.

Paper:  Li et al., "Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning", TMLR 2025,
        https://arxiv.org/abs/2411.13545
Code:   https://github.com/TensorStrike/ES2
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_sparse.arguments import check_globs, check_whole
from lightning_sparse.functional.stored import digest
from lightning_sparse.masks.schema import anything, check_fields, mapping_of, refuse, tensor, wrong_names
from lightning_sparse.schedules import as_number
from lightning_sparse.trainer import TrainerCallback, check_in_optimizer, copy_again, refuse_twins

__all__ = [
    "SharedConvolution",
    "WeightSharing",
    "share_weights",
    "shared_convolutions",
    "unshare_weights",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = {kind.forward for kind in _CONVOLUTIONS}
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@final
class SharedConvolution(nn.Module):
    r"""A convolution with the weights of another one, times a scalar of its own: :math:`W = s\, W_{source}`.

    Its only parameters are the scalar ``scale``, which begins uniformly random in (0, 1), and its own bias if it had
    one. In ``state_dict`` it is a plain convolution, with :math:`W` as ``weight``, so that a checkpoint loads into the
    network as it was before; loading finds the scalar that comes closest to the weights it is given.

    Args:
        convolution: The convolution that it stands for; stride, padding and the like are its own.
        source: The convolution whose weights it uses, of the same shape.

    Raises:
        ValueError: The two have weights of different shapes.

    Example:
        >>> from torch import nn
        >>> from lightning_sparse.modules import SharedConvolution
        >>> first, second = nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        >>> shared = SharedConvolution(second, first)
        >>> [name for name, _ in shared.named_parameters()]
        ['scale']
        >>> bool((shared.weight == shared.scale * first.weight).all())
        True
    """

    is_auxiliary: ClassVar[bool] = True

    def __init__(self, convolution: Convolution, source: Convolution) -> None:
        super().__init__()
        if convolution.weight.shape != source.weight.shape or convolution.groups != source.groups:
            raise ValueError(
                f"A convolution of {tuple(convolution.weight.shape)} cannot use the weights of one of"
                f" {tuple(source.weight.shape)}; they need equal shapes and groups."
            )
        self.scale = nn.Parameter(torch.rand((), dtype=source.weight.dtype, device=source.weight.device))
        self.bias = convolution.bias
        self._source = (source,)  # in a tuple, so that it is no child: its weight has one name
        plain = copy.copy(convolution)  # without the weights, which nobody needs
        plain._parameters = dict.fromkeys(convolution._parameters)  # pyright: ignore[reportPrivateUsage]
        self._convolution = (plain,)
        self.register_state_dict_post_hook(_save_as_plain)
        self.register_load_state_dict_pre_hook(_load_from_plain)

    @property
    def source(self) -> Convolution:
        """The convolution whose weights it uses."""
        return self._source[0]

    @property
    def borrowed_weight(self) -> Tensor:
        """The parameter of another module that it computes with, for the plan of what is masked."""
        return self._source[0].weight

    @property
    def weight(self) -> Tensor:
        """Its weights, computed at each access; of the shape of the source's."""
        return self.scale * self._source[0].weight

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve."""
        return self._convolution[0]._conv_forward(inputs, self.weight, self.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def unshared(self) -> Convolution:
        """A plain convolution that computes the same, with a copy of the weights."""
        convolution = self._convolution[0]
        convolution.weight = nn.Parameter(self.weight.clone())
        convolution.bias = self.bias
        return convolution.train(self.training)

    @override
    def extra_repr(self) -> str:
        return self._convolution[0].extra_repr()


def share_weights(
    module: nn.Module, *, own: int = 2, stages: Sequence[str] | None = None, seed: int = 0
) -> dict[str, str]:
    r"""Let the blocks of a stage from number ``own`` on reuse the convolutions of block ``own - 1``, in place.

    A stage is a :class:`~torch.nn.Sequential` or :class:`~torch.nn.ModuleList` of equal blocks with convolutions, the
    module itself or one inside. In block :math:`i \ge R` each convolution whose counterpart in block :math:`R - 1` has
    the same name and shape becomes a :class:`SharedConvolution`, :math:`W_i = s_i W_{R-1}`. Norms, activations and what
    has no counterpart, such as a convolution in a shortcut, stay the block's own. Convolutions that already share
    weights do not change.

    Args:
        module: Any module, for example a torchvision ResNet.
        own: Blocks of each stage that keep their weights, at least 1: :math:`R`. It is 2 in EAST, because the first
            block of a stage may change the number of channels.
        stages: Globs of the names of stages; None means all stages.
        seed: Seed of the scalars, which begin uniformly random in (0, 1). If a weight already is a multiple of the
            source's, as in a module that was loaded from the checkpoint of a shared one, the scalar is that multiple.

    Returns:
        For each convolution that now shares: its name, and the name of the one whose weights it uses.

    Raises:
        ValueError: ``own`` is below 1, or a glob matches no stage.

    Example:
        >>> from torchvision.models import resnet34
        >>> from lightning_sparse.modules import share_weights
        >>> shared = share_weights(resnet34())
        >>> len(shared), shared["layer3.5.conv2"]
        (16, 'layer3.1.conv2')

    References:
        Li et al., `Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning
        <https://arxiv.org/abs/2411.13545>`_, TMLR 2025.
    """
    own, stages = _checked_own(own), check_globs("stages", stages)
    found = dict(_stages(module, own))
    # In a module that shares already, a glob may name a stage that has nothing left to share.
    for pattern in () if stages is None or shared_convolutions(module) else stages:
        if not any(fnmatchcase(name, pattern) for name in found):
            known = ", ".join(name or "the module itself, which is '*'" for name in found)
            raise ValueError(
                f"stages={pattern!r} matches no stage of more than {own} equal blocks."
                f" The stages are {known or 'none'}."
            )
    chosen = [name for name in found if stages is None or any(fnmatchcase(name, pattern) for pattern in stages)]
    shared = {later: source for name in chosen for later, source in found[name].items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for later, source in shared.items():
            convolution: Any = module.get_submodule(later)
            source_convolution: Any = module.get_submodule(source)
            replacement = SharedConvolution(convolution, source_convolution)
            scale = _exact_scale(convolution.weight, source_convolution.weight)
            if scale is not None:
                replacement.scale.data.copy_(scale)
            module.set_submodule(later, replacement)
    return shared


def unshare_weights(module: nn.Module) -> list[str]:
    """Replace every :class:`SharedConvolution` in ``module`` by a plain convolution, in place, for export.

    Outputs stay the same. Each convolution stores all its weights again, with zeros where the shared weights are zero.

    Returns:
        The names of the convolutions.

    Example:
        >>> from torchvision.models import resnet34
        >>> from lightning_sparse.modules import share_weights, unshare_weights
        >>> network = resnet34()
        >>> _ = share_weights(network)
        >>> unshare_weights(network)[0], type(network.layer1[2].conv1).__name__
        ('layer1.2.conv1', 'Conv2d')
    """
    shared = shared_convolutions(module)
    for name, convolution in shared.items():
        module.set_submodule(name, convolution.unshared())
    return list(shared)


def shared_convolutions(module: nn.Module) -> dict[str, SharedConvolution]:
    """Every :class:`SharedConvolution` in a module by its name.

    Example:
        >>> from torch import nn
        >>> list(shared_convolutions(nn.Sequential(SharedConvolution(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)))))
        ['0']
    """
    return {name: child for name, child in module.named_modules() if isinstance(child, SharedConvolution)}


@final
class WeightSharing(TrainerCallback):
    r"""A callback that shares weights within residual stages during training; see :func:`share_weights`.

    The module changes when ``fit`` begins, before its optimizers are made, and its weights stay shared afterwards;
    :func:`unshare_weights` makes plain convolutions for export. ``validate``, ``test`` and ``predict`` do not change a
    module; a plain module that loads the checkpoint computes the same. A pruning method that is used together with this
    callback counts sparsity as if nothing were shared: at sparsity :math:`s`, the network stores the same number of
    active weights as without sharing, and they are denser in the shared convolutions.

    The optimizer's weight decay pulls the scalars towards 0 like any other parameter, as in the authors' code.

    Args:
        own: Number of blocks in each stage that keep their own weights, at least 1.
        stages: Globs of the names of stages within the LightningModule (``"network.layer*"``); None means all stages.
        seed: Seed of the scalars.

    Raises:
        ValueError: ``own`` is below 1, an argument is of another type, or a glob matches no stage.

    Example:
        >>> from lightning_sparse import FGGP
        >>> from lightning_sparse.modules import WeightSharing
        >>> callbacks = [WeightSharing(), FGGP(sparsity=0.99)]

    References:
        Li et al., `Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning
        <https://arxiv.org/abs/2411.13545>`_, TMLR 2025.
    """

    def __init__(self, *, own: int = 2, stages: Sequence[str] | None = None, seed: int = 0) -> None:
        self.own = _checked_own(own)
        self.stages = check_globs("stages", stages)
        self.seed = check_whole("seed", seed, least=0)
        self._convolutions: dict[str, SharedConvolution] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_twins(trainer, self, ("own", "stages"))
        fits = stage == "fit"
        shared = share_weights(pl_module, own=self.own, stages=self.stages, seed=self.seed) if fits else {}
        self._convolutions = shared_convolutions(pl_module)
        if shared:
            rank_zero_info(f"WeightSharing: {len(shared)} convolutions use the weights of another one.")
            copy_again(trainer, pl_module, self)
        elif fits and not self._convolutions:
            rank_zero_warn(
                f"WeightSharing: {type(pl_module).__name__} has no stage of more than {self.own} equal blocks with"
                " convolutions, so nothing is shared. A stage is an nn.Sequential or nn.ModuleList, built in"
                " __init__. With EAST, sharing=False avoids this warning."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scales = {name: [convolution.scale] for name, convolution in self._convolutions.items()}
        check_in_optimizer(trainer, scales, type(self))

    @override
    def state_dict(self) -> dict[str, Any]:
        scales = {name: convolution.scale.detach().cpu() for name, convolution in self._convolutions.items()}
        return {"scales": scales, "digest": digest(scales)}

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        scales = _checked_scales(state_dict, self._convolutions)
        for name, convolution in self._convolutions.items():
            if name in scales:  # exactly; what the module's state gave is rounded
                convolution.scale.copy_(scales[name])


def _checked_own(own: int) -> int:
    plain = as_number(own)
    if isinstance(plain, bool) or not isinstance(plain, int) or plain < 1:
        raise ValueError(
            f"own is {own!r}; give the number of blocks of a stage that keep their weights, an int of at least 1."
        )
    return plain


def _checked_scales(state: Any, shared: Collection[str]) -> dict[str, Tensor]:
    """The scalars that a checkpoint holds, exactly; none where it was written by a module that shared nothing."""
    whose = "The checkpoint's state of WeightSharing"
    check_fields(state, {"scales": mapping_of(tensor(dims=0)), "digest": anything}, whose)
    scales = state["scales"]
    if state["digest"] != digest(scales):
        refuse(f"{whose} is damaged: its digest does not match its contents")
    if scales and (fault := wrong_names(scales, shared)):
        refuse(f"{whose} belongs to other convolutions: its scales {fault}")
    return scales


def _stages(module: nn.Module, own: int, prefix: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """The outermost containers of equal blocks, with the convolutions that can share and those that they share with.

    The module itself may be one; its name is then empty.
    """
    pairs = _pairs(module, own) if isinstance(module, nn.Sequential | nn.ModuleList) else {}
    if pairs:
        yield prefix.removesuffix("."), {f"{prefix}{later}": f"{prefix}{source}" for later, source in pairs.items()}
        return
    for name, child in module.named_children():
        yield from _stages(child, own, f"{prefix}{name}.")


def _pairs(stage: nn.Module, own: int) -> dict[str, str]:
    blocks = [(name, block) for name, block in stage.named_children() if _is_block(block)]
    if len(blocks) <= own:
        return {}
    source_name, source_block = blocks[own - 1]
    sources = dict(source_block.named_modules())
    return {
        f"{name}.{local}": f"{source_name}.{local}"
        for name, block in blocks[own:]
        for local, child in block.named_modules()
        if type(block) is type(source_block) and _fits(child, sources.get(local))
    }


def _is_block(module: nn.Module) -> bool:
    """Whether it holds convolutions and is none."""
    kinds = (*_CONVOLUTIONS, SharedConvolution)
    return not isinstance(module, kinds) and any(isinstance(child, kinds) for child in module.modules())


def _fits(convolution: nn.Module, source: nn.Module | None) -> bool:
    return (
        isinstance(convolution, _CONVOLUTIONS)
        and type(convolution).forward in _FORWARDS  # a subclass may do something else with its weights
        and isinstance(source, _CONVOLUTIONS)
        and type(source) is type(convolution)
        and _has_weights(convolution)
        and _has_weights(source)
        and convolution.weight.shape == source.weight.shape
        and convolution.groups == source.groups
        and convolution.weight is not source.weight
    )


def _has_weights(convolution: Convolution) -> bool:
    weight = dict(convolution.named_parameters(recurse=False)).get("weight")  # none where it is computed from others
    return weight is not None and not nn.parameter.is_lazy(weight)


def _save_as_plain(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    assert isinstance(module, SharedConvolution)
    bias = state.pop(f"{prefix}bias", None)
    del state[f"{prefix}scale"]
    state[f"{prefix}weight"] = module.weight.detach()
    if bias is not None:
        state[f"{prefix}bias"] = bias  # in the order of a plain convolution


def _load_from_plain(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    r"""The scalar of least squares: :math:`s = \langle W, W_{source} \rangle / \lVert W_{source} \rVert^2`.

    Blocks are loaded in order, so the source has its weights by now.
    """
    assert isinstance(module, SharedConvolution)
    weight = state.pop(f"{prefix}weight", None)
    if weight is None:
        return  # reported as missing: the scalar
    scale = _closest_scale(weight, module.source.weight)
    state[f"{prefix}scale"] = (module.scale if scale is None else scale).detach().to(module.scale)


def _closest_scale(weight: Tensor, source: Tensor) -> Tensor | None:
    """The scalar of least squares; None where the source is all zero."""
    values = source.detach().double()
    squares = (values * values).sum()
    return (weight.detach().to(values) * values).sum() / squares if squares > 0 else None


def _exact_scale(weight: Tensor, source: Tensor) -> Tensor | None:
    """The scalar that makes ``weight`` of ``source``, but for rounding; None where none does."""
    scale = None if weight.is_meta else _closest_scale(weight, source)
    if scale is None:
        return None
    largest = weight.detach().abs().max()
    error = (weight.detach() - scale * source.detach()).abs().max()
    return scale if largest > 0 and error <= 4 * torch.finfo(weight.dtype).eps * largest else None
