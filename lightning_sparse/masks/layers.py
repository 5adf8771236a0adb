"""What a parameter is in its layer: a weight with a certain wiring, or something that stays dense, and why.

Layers are recognised by what they are, never by their class's name alone: by the torch classes that they inherit from,
or by the attributes that state their sizes, if the parameter has exactly these sizes. So a linear layer of PyTorch
Geometric (``in_channels``, ``out_channels``), Hugging Face's ``Conv1D`` (``nx``, ``nf``) and stacks of experts
(``num_experts``) are known without an import.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

import torch
from torch import nn

from lightning_sparse.masks.forwards import keeps_zeros
from lightning_sparse.masks.places import Part, Place

__all__ = ["Layer", "Wiring", "kind_of", "recognise"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (
    nn.modules.batchnorm._NormBase,  # pyright: ignore[reportPrivateUsage]  # of every batch and instance norm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
# Parameters that hold weights, by the class of torch that its layer comes from.
_WEIGHTS: dict[type[nn.Module] | tuple[type[nn.Module], ...], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    _CONVOLUTIONS: ("weight",),
    _TRANSPOSED: ("weight",),
    nn.RNNBase: ("weight_ih_l*", "weight_hh_l*", "weight_hr_l*"),
    nn.RNNCellBase: ("weight_ih", "weight_hh"),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
_KNOWN = (
    nn.Linear,
    nn.Bilinear,
    *_CONVOLUTIONS,
    *_TRANSPOSED,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    *_EMBEDDINGS,
    *_NORMS,
)
# Attributes in which linear layers of other libraries state their inputs and outputs.
_SIZES = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("input_size", "output_size"),
    ("in_feat", "out_feat"),
    ("in_size", "out_size"),
    ("in_dim", "out_dim"),
    ("input_dim", "output_dim"),
)
# What norms of other libraries call their parameters.
_OF_NORMS = ("weight", "gamma", "beta", "scale", "gain")
# The projections of a stack of experts: from the model's width into the expert, and out of it again.
_INTO_EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "v1")
_OUT_OF_EXPERTS = ("down_proj", "w2")

_REASONS: dict[Part, str] = {
    "direction": "parametrized: a row without weights is NaN under weight norm; remove the norm before fit, or give"
    " its full name in include= and keep some weights in each row",
    "magnitude": "parametrized: the magnitudes of a weight norm",
    "scaled": "parametrized: zeros stay zero under spectral norm; to mask it, give its full name in include=",
    "pruned": "parametrized: by torch.nn.utils.prune; to mask it, call prune.remove before fit",
    "other": (
        "parametrized: zeros here need not be zeros of the weight; to mask it, remove the parametrization before fit"
    ),
}
_UNKNOWN = "to mask it, give its full name in include=, with '*' for the rest"


@dataclass(frozen=True)
class Wiring:
    """How the entries of a weight feed outputs.

    Attributes:
        groups: Groups of a convolution.
        input_first: Whether a layer's dimension 0 counts inputs rather than outputs, as in a transposed convolution.
        copies: Layers of one shape that lie in the parameter, as the experts of a mixture.
        is_stack: Whether dimension 0 counts the copies; else their rows lie one below the other.
        traits: What selectors such as ``"@depthwise"`` ask for.
    """

    groups: int = 1
    input_first: bool = False
    copies: int = 1
    is_stack: bool = False
    traits: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Layer:
    """What a parameter is.

    Attributes:
        reason: Why it stays dense; empty for a weight that is masked.
        wiring: How it feeds outputs.
        keeps_zeros: Whether the layer computes with the zeros that are stored; None where that could not be found out.
    """

    reason: str = ""
    wiring: Wiring = field(default_factory=Wiring)
    keeps_zeros: bool | None = True


def kind_of(reason: str) -> str:
    """The first words of a reason, by which parameters are grouped.

    Example:
        >>> kind_of("tied: to encoder.weight")
        'tied'
    """
    return reason.split(":", maxsplit=1)[0]


def recognise(place: Place, tried: MutableMapping[Hashable, bool | None]) -> Layer:
    """What the parameter at ``place`` is.

    A module whose parameters are never to be masked says so by an attribute ``is_auxiliary``.

    Args:
        place: Where it is.
        tried: What trials of the module's other layers have found out; it is added to.

    Example:
        >>> from lightning_sparse.masks.places import places_of
        >>> [recognise(place, {}).reason for place in places_of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))]
        ['', 'bias', 'norm', 'norm']
    """
    if getattr(place.owner, "is_auxiliary", False) is True:
        return Layer("auxiliary: added by a callback")
    wiring = None if nn.parameter.is_lazy(place.parameter) else _wiring(place)
    if place.part != "whole":
        return Layer(_REASONS[place.part], wiring or Wiring())
    if wiring is None:
        return Layer(_reason(place))
    keeps = _keeps_zeros(place, tried)
    if keeps is False:
        does = f"{type(place.layer).__name__} computes with other weights than it stores"
        return Layer(f"transformed: {does}; to mask what it stores, give its full name in include=", wiring, keeps)
    return Layer("", wiring, keeps)


def _reason(place: Place) -> str:
    """Why a parameter that is no known weight stays dense."""
    is_known = isinstance(place.owner, _KNOWN)
    if isinstance(place.owner, _NORMS):
        return "norm"
    if "bias" in place.local_name:
        return "bias"
    if isinstance(place.owner, _EMBEDDINGS) and place.local_name == "weight":
        return "embedding"
    if nn.parameter.is_lazy(place.parameter):
        return "" if _will_be_weight(place) else f"unknown module: {_UNKNOWN}"
    if not is_known and type(place.owner).__name__.lower().endswith("norm") and place.local_name in _OF_NORMS:
        return "norm"
    if place.parameter.dim() < 2:
        return "vector"
    return f"unknown {'parameter' if is_known else 'module'}: {_UNKNOWN}"


def _is_weight_of_torch(place: Place) -> bool:
    return any(
        isinstance(place.layer, kinds) and any(fnmatchcase(place.weight_name, pattern) for pattern in patterns)
        for kinds, patterns in _WEIGHTS.items()
    )


def _will_be_weight(place: Place) -> bool:
    """Whether a lazy parameter becomes a weight with its first batch."""
    stated = any(hasattr(place.layer, name) for names in _SIZES for name in names)
    return _is_weight_of_torch(place) or (stated and place.weight_name == "weight")


def _wiring(place: Place) -> Wiring | None:
    """The wiring of a weight of a known layer; None where it is none."""
    if place.parameter.dim() < 2:
        return None
    if isinstance(place.layer, _KNOWN):
        return _of_torch(place) if _is_weight_of_torch(place) else None
    return _of_conv1d(place) or _of_linear(place) or _of_experts(place)


def _of_torch(place: Place) -> Wiring:
    layer, shape = place.layer, place.parameter.shape
    if isinstance(layer, nn.Linear):  # a subclass may store it the other way round
        stated = (layer.in_features, layer.out_features)
        return Wiring(input_first=tuple(shape) == stated and shape[0] != shape[1])
    if not isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return Wiring()
    transposed, groups = isinstance(layer, _TRANSPOSED), int(layer.groups)
    depthwise = groups > 1 and (shape[0] // groups if transposed else shape[1]) == 1
    traits = {"@depthwise": depthwise, "@1x1": all(size == 1 for size in shape[2:])}
    return Wiring(groups, transposed, traits=frozenset(trait for trait, has in traits.items() if has))


def _of_conv1d(place: Place) -> Wiring | None:
    """Hugging Face's Conv1D: a linear layer that stores (in, out)."""
    layer: Any = place.layer
    if place.weight_name != "weight" or place.parameter.dim() != 2:
        return None
    stated = (_size(layer, "nx"), _size(layer, "nf")) == tuple(place.parameter.shape)
    return Wiring(input_first=True) if stated or _is_conv1d(layer) else None


def _is_conv1d(layer: nn.Module) -> bool:
    kinds = type(layer).__mro__
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in kinds)


def _of_linear(place: Place) -> Wiring | None:
    """A linear layer, or a stack of them, that states its inputs and outputs; (out, in) where both are equal."""
    shape = tuple(place.parameter.shape)
    if place.weight_name != "weight" or len(shape) not in (2, 3):
        return None
    is_stack = len(shape) == 3
    copies = shape[0] if is_stack else 1
    if is_stack and all(size != copies for _, size in _counts(place.layer)):
        return None
    for names in _SIZES:
        inputs, outputs = (_size(place.layer, name) for name in names)
        if shape[-2:] == (outputs, inputs):
            return Wiring(copies=copies, is_stack=is_stack)
        if shape[-2:] == (inputs, outputs):
            return Wiring(input_first=True, copies=copies, is_stack=is_stack)
    return None


def _of_experts(place: Place) -> Wiring | None:
    """A projection of a stack of experts: (experts, out, in), or (experts, in, out), or all experts' rows together."""
    name, shape = place.weight_name, place.parameter.shape
    if name not in (*_INTO_EXPERTS, *_OUT_OF_EXPERTS):
        return None
    experts = [size for attribute, size in _counts(place.layer) if "expert" in attribute and size > 0]
    if len(shape) == 3 and shape[0] in experts:
        return Wiring(input_first=_is_input_first(place), copies=shape[0], is_stack=True)
    width = _size(place.layer, "ffn_hidden_size")  # DBRX: (experts · width, model), for all three
    copies = next((each for each in experts if width and len(shape) == 2 and shape[0] == each * width), None)
    return None if copies is None else Wiring(input_first=name in _OUT_OF_EXPERTS, copies=copies)


def _is_input_first(place: Place) -> bool:
    """Whether a stack of experts stores (experts, in, out): as it says itself, else as its sizes say."""
    layer: Any = place.layer
    said = getattr(layer, "is_transposed", None)
    if isinstance(said, bool):
        return said
    fused, down = (getattr(layer, name, None) for name in ("gate_up_proj", "down_proj"))
    if isinstance(fused, torch.Tensor) and isinstance(down, torch.Tensor) and fused.dim() == down.dim() == 3:
        return fused.shape[2] == 2 * down.shape[1] and fused.shape[1] == down.shape[2]
    width = next((size for name in ("dim", "hidden_size", "hidden_dim") if (size := _size(layer, name))), None)
    inner, outer = place.parameter.shape[1:]
    if width is None or inner == outer:
        return False
    return (inner if place.weight_name in _INTO_EXPERTS else outer) == width


def _counts(layer: nn.Module) -> Iterator[tuple[str, int]]:
    """The attributes in which a module says how many there are of something."""
    for name in vars(layer):
        size = _size(layer, name)
        if size is not None and ("num" in name.split("_") or name.startswith("n_") or "experts" in name):
            yield name, size


def _size(layer: nn.Module, name: str) -> int | None:
    value = getattr(layer, name, None)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _keeps_zeros(place: Place, tried: MutableMapping[Hashable, bool | None]) -> bool | None:
    """Whether a layer computes with the zeros that it stores; a layer of torch with torch's own forward does."""
    layer, kinds = place.layer, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
    is_torchs = isinstance(layer, _KNOWN)
    if place.weight_name != "weight" or (is_torchs and (not isinstance(layer, kinds) or _is_torchs_own(layer, kinds))):
        return True
    if not is_torchs and (place.parameter.dim() != 2 or _is_conv1d(layer)):
        return True
    # One trial for all layers of a class that have the same switches; a size of one may hide what a mean does.
    switches = tuple((name, value) for name, value in vars(layer).items() if isinstance(value, bool | str))
    key = type(layer), switches, tuple(min(size, 2) for size in place.parameter.shape)
    if key not in tried:
        tried[key] = keeps_zeros(layer, place.weight_name)
    # Another library's layer need not have the forward of torch's: what cannot be tried is as it says that it is.
    return tried[key] if is_torchs else tried[key] is not False


def _is_torchs_own(layer: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether what is called to compute is what torch wrote for one of ``kinds``."""
    methods = ("forward", "_conv_forward")
    return not any(name in vars(layer) for name in methods) and all(
        any(getattr(type(layer), name, None) is getattr(kind, name, None) for kind in kinds) for name in methods
    )
