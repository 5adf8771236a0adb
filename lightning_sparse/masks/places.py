"""Where the parameters of a module are: which module holds each, and of which layer's tensor it is a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["Part", "Place", "canonical_name", "places_of", "printable"]

Part = Literal["whole", "direction", "magnitude", "scaled", "pruned", "other"]
"""Which part of a layer's weight a parameter is: all of it, v or g of a weight norm, the tensor that a spectral norm
scales, the one that ``torch.nn.utils.prune`` masks, or one from which another parametrization computes the weight."""


_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_forward_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class Place:
    """A parameter, and where it is.

    Attributes:
        name: Name in the plain module, without the prefixes of wrappers.
        parameter: The parameter itself.
        owner: The module that holds it.
        local_name: Its name in that module.
        layer: The module that computes with it: the owner, or the layer that a parametrization belongs to.
        weight_name: The name of the layer's tensor that it is, or is a part of.
        part: Which part of that tensor it is.
    """

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    local_name: str
    layer: nn.Module
    weight_name: str
    part: Part = "whole"


def places_of(module: nn.Module) -> list[Place]:
    """Every parameter of ``module`` under each of its names, in order.

    Example:
        >>> [place.name for place in places_of(nn.Sequential(nn.Linear(2, 2), nn.PReLU()))]
        ['0.weight', '0.bias', '1.weight']
    """
    modules = dict(module.named_modules())
    return [
        _place(prefix, local_name, parameter, owner, modules)
        for prefix, owner in modules.items()
        for local_name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
    ]


def canonical_name(name: str) -> str:
    """The name of a parameter in the plain module, without what ``torch.compile``, Fabric and checkpoint wrappers add.

    Example:
        >>> canonical_name("encoder._orig_mod.0.weight")
        'encoder.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def printable(name: str) -> str:
    r"""``name`` with control characters escaped, so that a terminal can show it safely.

    Example:
        >>> print(printable("head\x1b[31m.weight"))
        head\x1b[31m.weight
    """
    if name.isprintable():
        return name
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)


def _place(
    prefix: str, local_name: str, parameter: nn.Parameter, owner: nn.Module, modules: Mapping[str, nn.Module]
) -> Place:
    name = canonical_name(f"{prefix}.{local_name}".lstrip("."))
    if isinstance(owner, ParametrizationList):
        path, _, weight_name = prefix.rpartition(".")
        layer = modules[path.removesuffix("parametrizations").removesuffix(".")]
        return Place(name, parameter, owner, local_name, layer, weight_name, _part_of_list(owner, local_name))
    weight_name, part = _part_of_hooks(owner, local_name)
    return Place(name, parameter, owner, local_name, owner, weight_name, part)


def _part_of_list(owner: ParametrizationList, local_name: str) -> Part:
    """Which part of its weight a parameter is under :mod:`torch.nn.utils.parametrize`."""
    kinds = [type(parametrization) for parametrization in owner]
    if kinds == [parametrizations._WeightNorm]:  # pyright: ignore[reportPrivateUsage]
        return "direction" if local_name == "original1" else "magnitude"
    if kinds == [parametrizations._SpectralNorm]:  # pyright: ignore[reportPrivateUsage]
        return "scaled"
    return "other"


def _part_of_hooks(owner: nn.Module, local_name: str) -> tuple[str, Part]:
    """The tensor that torch's older functions compute from a parameter in a hook, and its part; else the parameter."""
    weight_name, _, ending = local_name.rpartition("_")
    names = {name for name, _ in owner.named_parameters(recurse=False, remove_duplicate=False)}
    if not weight_name or weight_name in names or not hasattr(owner, weight_name):
        return local_name, "whole"
    if ending in ("g", "v") and {f"{weight_name}_g", f"{weight_name}_v"} <= names:
        return weight_name, "direction" if ending == "v" else "magnitude"
    if ending != "orig":
        return local_name, "whole"
    buffers = {name for name, _ in owner.named_buffers(recurse=False)}
    return weight_name, (
        "pruned" if f"{weight_name}_mask" in buffers else "scaled" if f"{weight_name}_u" in buffers else "other"
    )
