"""Which weights of a module are masked, and why the others are not: the plan.

Masked are the weights of linear, convolution, recurrent and attention layers. Left dense are biases, norms,
embeddings, frozen and tied weights, parametrized weights, and those of modules that are not known here; ``include``
and ``exclude`` narrow the choice, and naming a weight or a module type in full admits one that the rules leave out.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_sparse.modules.dyrelu import HyperLinear
from lightning_sparse.modules.weight_sharing import SharedConvolution, uses_of

__all__ = ["Candidate", "Plan", "as_patterns", "canonical_name", "judge_parameters", "names_near", "select_weights"]

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
# Parameters that hold weights, by the module type that owns them.
_WEIGHTS: dict[type[nn.Module] | tuple[type[nn.Module], ...], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    _CONVOLUTIONS: ("weight",),
    _TRANSPOSED: ("weight",),
    nn.RNNBase: ("weight_ih_l*", "weight_hh_l*", "weight_hr_l*"),
    nn.RNNCellBase: ("weight_ih", "weight_hh"),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
# Hugging Face transformers' Conv1D is a linear layer whose weight is stored as (in, out); known by name, not imported.
_LINEAR_IN_OUT = "Conv1D"
# What torch's older reparametrisations (weight_norm, spectral_norm, prune) register beside or instead of a weight.
_PARTS_OF_A_WEIGHT = ("_g", "_v", "_orig", "_mask", "_u")


@dataclass(frozen=True)
class Candidate:
    """A parameter of the module, and whether it is masked.

    Attributes:
        name: Name in the plain module, without the prefixes of wrappers.
        parameter: The parameter itself.
        module_type: Name of the class of the module that owns it.
        reason: Why it is left dense; empty where it is masked.
        groups: Groups of a convolution.
        input_first: Whether dimension 0 counts inputs rather than outputs, as in a transposed convolution.
        uses: How many convolutions use it, where :class:`~lightning_sparse.modules.WeightSharing` lets several.
    """

    name: str
    parameter: nn.Parameter
    module_type: str
    reason: str = ""
    groups: int = 1
    input_first: bool = False
    uses: int = 1

    def rows(self, tensor: Tensor) -> Tensor:
        """``tensor``, shaped like the weight, as one row of inputs for each output neuron or filter.

        Returns:
            Shape ``(outputs, fan-in)``.
        """
        if not self.input_first:
            return tensor.reshape(tensor.shape[0], -1)
        inputs, outputs = tensor.shape[0] // self.groups, tensor.shape[1]
        grouped = tensor.reshape(self.groups, inputs, outputs, -1)
        return grouped.transpose(1, 2).reshape(self.groups * outputs, -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        shape = self.parameter.shape
        if not self.input_first:
            return rows.reshape(shape)
        inputs, outputs = shape[0] // self.groups, shape[1]
        grouped = rows.reshape(self.groups, outputs, inputs, -1)
        return grouped.transpose(1, 2).reshape(shape)


class Plan(Sequence[Candidate]):
    """Every parameter of a module in order, each masked or with its reason; ``str(plan)`` is a table."""

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self._candidates = tuple(candidates)

    def __getitem__(self, index: int) -> Candidate:  # type: ignore[override]
        return self._candidates[index]

    def __len__(self) -> int:
        return len(self._candidates)

    @property
    def masked(self) -> list[Candidate]:
        """The parameters that are masked."""
        return [candidate for candidate in self if not candidate.reason]

    @property
    def weights(self) -> list[Candidate]:
        """The parameters that are masked, and those that would be if they were not frozen."""
        return [candidate for candidate in self if candidate.reason in ("", "frozen")]

    def without(self, names: Iterable[str]) -> Plan:
        """This plan with ``names`` left dense, as they were in the run that is being resumed."""
        dense = set(names)
        reason = "dense in the run that is resumed"
        return Plan(
            replace(candidate, reason=reason) if candidate.name in dense and not candidate.reason else candidate
            for candidate in self
        )

    @property
    def summary(self) -> str:
        """One line: how much is masked, and why the rest is not."""
        masked = sum(candidate.parameter.numel() for candidate in self.masked)
        total = sum({id(candidate.parameter): candidate.parameter.numel() for candidate in self}.values())
        reasons = Counter(candidate.reason.split(":")[0] for candidate in self if candidate.reason)
        dense = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        return (
            f"{len(self.masked)} of {len(self)} parameters masked ({masked:,} of {total:,} weights)"
            f"{f'; dense: {dense}' if dense else ''}."
        )

    def __str__(self) -> str:
        width = max((len(candidate.name) for candidate in self), default=0)
        return "\n".join(
            f"{candidate.name:<{width}}  {candidate.module_type:<18} {tuple(candidate.parameter.shape)!s:<20} "
            f"{candidate.reason or 'masked'}"
            for candidate in self
        )


def canonical_name(name: str) -> str:
    """The name of a parameter in the plain module: without what ``torch.compile`` and checkpoint wrappers add.

    Example:
        >>> canonical_name("encoder._orig_mod.0.weight")
        'encoder.0.weight'
    """
    wrappers = {"_orig_mod", "_checkpoint_wrapped_module"}
    return ".".join(part for part in name.split(".") if part not in wrappers)


def as_patterns(argument: str, patterns: Iterable[str] | None) -> tuple[str, ...] | None:
    """The patterns of ``include`` or ``exclude`` as a tuple, those of a set in alphabetical order; None stays None.

    Raises:
        ValueError: They are no list, or one of them is no string.

    Example:
        >>> as_patterns("exclude", [nn.Linear])
        Traceback (most recent call last):
            ...
        ValueError: exclude[0] is the class Linear; give its name: 'Linear'.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str):
        raise ValueError(f"{argument} is the string {patterns!r}; give a list of patterns: [{patterns!r}].")
    if not isinstance(patterns, Iterable):
        raise ValueError(f"{argument} is {_shown(patterns)}; give a list of names or patterns, such as ['head.*'].")
    # the order of a set is another in each process, and a method is known by its patterns in its checkpoints
    names = tuple(sorted(patterns, key=str) if isinstance(patterns, set | frozenset) else patterns)
    for index, pattern in enumerate(names):
        if isinstance(pattern, type):
            raise ValueError(f"{argument}[{index}] is {_shown(pattern)}; give its name: {pattern.__name__!r}.")
        if not isinstance(pattern, str):
            raise ValueError(
                f"{argument}[{index}] is {_shown(pattern)}; give parameter names, such as 'head.weight', or patterns of"
                " them, such as 'head.*'."
            )
    return names


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def names_near(unknown: Iterable[str], known: Sequence[str]) -> str:
    """Of the names that are known those like the unknown ones, or the first of all, for the message of an error.

    Example:
        >>> names_near(["fc.wieght"], ["conv.weight", "fc.bias", "fc.weight"])
        'fc.weight, conv.weight, fc.bias'
    """
    near = [name for each in unknown for name in difflib.get_close_matches(each, known, n=3, cutoff=0.4)]
    return ", ".join(dict.fromkeys(near or known[:8]))


def select_weights(
    module: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    frozen: bool = False,
) -> Plan:
    """Decide for every parameter of ``module`` whether it is masked.

    Args:
        module: Any module.
        include: Patterns; where given, only what matches one is masked. A pattern is a glob over the parameter's name
            (``"encoder.*"``) or the name of its module's type (``"Conv2d"``, base classes count). One without a
            wildcard that names a parameter or a type in full also admits an embedding or a weight of an unknown module;
            ``["*", "MixtralExperts"]`` masks those beside all others.
        exclude: Patterns of what stays dense; it wins over ``include``.
        frozen: Whether a plan will do whose weights are all frozen yet.

    Returns:
        The plan, one entry for each name of each parameter.

    Raises:
        MisconfigurationException: A pattern matches nothing, nothing is left to mask, or a layer is not materialised.
        ValueError: ``include`` or ``exclude`` is no list of strings.

    Example:
        >>> plan = select_weights(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))
        >>> [(candidate.name, candidate.reason) for candidate in plan]
        [('0.weight', ''), ('0.bias', 'bias'), ('1.weight', 'norm'), ('1.bias', 'norm')]
    """
    plan = judge_parameters(module, include=include, exclude=exclude)
    if not (plan.weights if frozen else plan.masked):
        raise MisconfigurationException(
            f"{type(module).__name__} has no weight to mask. Its parameters and the reasons:\n{plan}\n"
            "Masked are weights of linear, convolution, recurrent and attention layers; to mask another floating-point"
            " weight, name it in full in include=."
        )
    return plan


def judge_parameters(
    module: nn.Module, *, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> Plan:
    """The plan of :func:`select_weights`, even where it leaves nothing to mask, as for a frozen module.

    Example:
        >>> plan = judge_parameters(nn.Linear(4, 3).requires_grad_(False))
        >>> plan.masked, [candidate.name for candidate in plan.weights]
        ([], ['weight'])
    """
    include, exclude = as_patterns("include", include), as_patterns("exclude", exclude)
    owned = list(_owned_parameters(module))
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            _check_matches_something(argument, pattern, owned)
    uses = uses_of(module)
    return Plan(_without_ties([_judge(item, include, exclude, uses.get(id(item.parameter), 1)) for item in owned]))


@dataclass(frozen=True)
class _Owned:
    name: str
    parameter: nn.Parameter
    module: nn.Module
    local_name: str

    def matches(self, pattern: str) -> bool:
        return fnmatchcase(self.name, pattern) or any(fnmatchcase(name, pattern) for name in self.type_names)

    @property
    def type_names(self) -> list[str]:
        """Names of the module's class and of the classes that it comes from, below ``nn.Module``."""
        kinds = type(self.module).__mro__
        return [kind.__name__ for kind in kinds if issubclass(kind, nn.Module) and kind is not nn.Module]


def _owned_parameters(module: nn.Module) -> Iterator[_Owned]:
    for prefix, owner in module.named_modules(remove_duplicate=True):
        for local_name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            name = canonical_name(f"{prefix}.{local_name}".lstrip("."))
            if nn.parameter.is_lazy(parameter):
                raise MisconfigurationException(
                    f"{name} of {type(owner).__name__} has no shape yet. Run one batch through the module before fit,"
                    " or replace the lazy layer by one with stated sizes."
                )
            if isinstance(parameter, DTensor) or parameter.numel() == 0:
                raise MisconfigurationException(
                    f"{name} is sharded over processes or empty (shape {tuple(parameter.shape)}), and masks need whole"
                    " weights. Use strategy='ddp' or a single device."
                )
            yield _Owned(name, parameter, owner, local_name)


def _check_matches_something(argument: str, pattern: str, owned: Sequence[_Owned]) -> None:
    if any(item.matches(pattern) for item in owned):
        return
    holders = dict.fromkeys(holder for item in owned for holder in _modules_around(item.name))
    meant = [holder for holder in holders if holder == pattern or holder.endswith(f".{pattern}")]
    if meant:
        raise MisconfigurationException(
            f"{argument}={pattern!r} matches no parameter name and no module type. {meant[0]!r} is a module; for its"
            f" parameters write '{meant[0]}.*'."
        )
    known = sorted({item.name for item in owned} | {type(item.module).__name__ for item in owned})
    raise MisconfigurationException(
        f"{argument}={pattern!r} matches no parameter name and no module type. Near it: {names_near([pattern], known)}."
        " Patterns are globs over parameter names ('encoder.*.weight') and module types ('Conv2d')."
    )


def _modules_around(name: str) -> Iterator[str]:
    """The names of the modules that a parameter is in, the outermost first."""
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


def _judge(item: _Owned, include: Sequence[str] | None, exclude: Sequence[str] | None, uses: int) -> Candidate:
    transposed = isinstance(item.module, _TRANSPOSED)
    groups = item.module.groups if isinstance(item.module, _CONVOLUTIONS + _TRANSPOSED) else 1
    return Candidate(
        name=item.name,
        parameter=item.parameter,
        module_type=type(item.module).__name__,
        reason=_reason(item, include, exclude),
        groups=groups,
        input_first=transposed or type(item.module).__name__ == _LINEAR_IN_OUT,
        uses=uses,
    )


def _reason(item: _Owned, include: Sequence[str] | None, exclude: Sequence[str] | None) -> str:
    """Why ``item`` stays dense; empty where it is masked."""
    if not item.parameter.is_floating_point():
        return f"not floating point: {item.parameter.dtype}"
    if exclude and any(item.matches(pattern) for pattern in exclude):
        return "excluded"
    if include is not None and not any(item.matches(pattern) for pattern in include):
        return "not included"
    reason = _reason_of_rules(item)
    admitted = any(
        pattern == item.name or (pattern in item.type_names and reason != "bias") for pattern in include or ()
    )
    if admitted and item.parameter.dim() > 1:
        reason = ""
    return reason or ("" if item.parameter.requires_grad else "frozen")


def _reason_of_rules(item: _Owned) -> str:
    if isinstance(item.module, HyperLinear | SharedConvolution):
        return "auxiliary: added by a callback"
    if isinstance(item.module, _NORMS) or type(item.module).__name__.lower().endswith("norm"):
        return "norm"
    if "bias" in item.local_name:
        return "bias"
    if item.local_name.endswith(_PARTS_OF_A_WEIGHT):
        return "parametrized"
    if isinstance(item.module, _EMBEDDINGS):
        return "embedding"
    for kind, patterns in _WEIGHTS.items():
        if isinstance(item.module, kind) and any(fnmatchcase(item.local_name, pattern) for pattern in patterns):
            return ""
    if type(item.module).__name__ == _LINEAR_IN_OUT and item.local_name == "weight" and item.parameter.dim() == 2:
        return ""
    if isinstance(item.module, nn.utils.parametrize.ParametrizationList):
        return "parametrized"
    return "unknown module: name it in full in include= to mask it, beside '*' to mask the rest too"


def _without_ties(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """A weight under several names is masked under its first, if one of its uses wants it and none forbids it."""
    uses: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        uses.setdefault(id(candidate.parameter), []).append(candidate)
    for candidate in candidates:
        owner, *others = uses[id(candidate.parameter)]
        if owner is candidate:
            yield replace(candidate, reason=_reason_of_all(owner, others))
        else:
            yield replace(candidate, reason=f"tied: to {owner.name}")


def _reason_of_all(owner: Candidate, others: Sequence[Candidate]) -> str:
    if owner.reason not in ("", "not included"):
        return owner.reason
    forbidden = next((other for other in others if other.reason not in ("", "not included")), None)
    if forbidden is not None:
        return f"tied: {forbidden.reason} (as {forbidden.name})"
    return "" if any(not use.reason for use in (owner, *others)) else owner.reason
