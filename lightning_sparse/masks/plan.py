"""Which weights of a module are masked, and why the others are not: the plan.

By default, the weights of linear, convolutional, recurrent and attention layers and of stacks of experts are masked.
These stay dense: biases, norms, embeddings, frozen and tied weights, weights of unknown modules, and weights of layers
that compute with other weights than they store. ``include`` and ``exclude`` narrow the choice. The full name of a
weight or a module type in ``include`` masks a weight that the rules leave dense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sparse.masks.candidate import Candidate
from lightning_sparse.masks.layers import kind_of, recognise
from lightning_sparse.masks.layout import is_sharded, obstacle_of_shards
from lightning_sparse.masks.memory import SHARED, overlapping
from lightning_sparse.masks.places import canonical_name, places_of, printable
from lightning_sparse.masks.remarks import enumerated, remarks_on
from lightning_sparse.masks.selectors import NEVER, Choice, as_patterns, names_near
from lightning_sparse.masks.wrappers import unwrapped

__all__ = [
    "Candidate",
    "Plan",
    "as_patterns",
    "canonical_name",
    "judge_parameters",
    "names_near",
    "select_weights",
    "uses_of",
]

# Reasons that refuse a weight which would be masked: what is wrong, and what to do.
_REFUSALS = {
    "no shape yet": "The shape of {names} of {types} is not known yet. Run one batch through the module before fit,"
    " replace the lazy layer by one with known sizes, or leave it out with exclude=.",
    "sharded": "The entries of {names} are divided in a way that masks cannot follow: by DeepSpeed, which hides the"
    " weights, or by FSDP2 and tensor parallelism together into unequal parts. Use"
    " ModelParallelStrategy, with numbers of processes that divide these dimensions, or strategy='ddp'.",
    "sparse gradients": "The gradients of {names} are sparse, and masks need dense ones. Build {types} with"
    " sparse=False, or leave it out of include=.",
    "shared memory": SHARED,
}
_OPEN = ("", "not included")  # what another use of the same weight may overrule
_FINAL = NEVER | {"excluded"}  # what nothing overrules
_LONGEST_SUMMARY = 200


class Plan(Sequence[Candidate]):
    """Every parameter of a module in order, each masked or with its reason; ``str(plan)`` is a table.

    Attributes:
        remarks: Warnings for the start of training, one sentence of each kind: a large share of the module stays dense
            because its layers are unknown; a pattern of ``include`` masks nothing; layers compute with other weights
            than they store.
    """

    def __init__(self, candidates: Iterable[Candidate], remarks: Iterable[str] = ()) -> None:
        self._candidates = tuple(candidates)
        self.remarks = tuple(remarks)

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

    @property
    def coverage(self) -> float:
        """Fraction, in [0, 1], of the entries of the module's weight matrices that are masked; 1 if it has none.

        A method's sparsity is that of masked weights: at coverage 0.7 and sparsity 0.9, 37 % of all stay active.
        """
        sizes = {id(candidate.parameter): candidate.numel for candidate in self if candidate.is_matrix}
        return sum(candidate.numel for candidate in self.masked) / sum(sizes.values()) if sizes else 1.0

    @property
    def refusal(self) -> str:
        """Why weights that would be masked cannot be, one sentence for each kind of reason; empty if all can be."""
        sentences: list[str] = []
        for kind, sentence in _REFUSALS.items():
            refused = [candidate for candidate in self if kind_of(candidate.reason) == kind]
            if refused:
                names, types = (enumerated(getattr(each, of) for each in refused) for of in ("name", "module_type"))
                sentences.append(sentence.format(names=names, types=types))
        return " ".join(sentences)

    def without(self, reasons: Mapping[str, str]) -> Plan:
        """This plan, but with the weights named in ``reasons`` left dense, each for its reason."""
        candidates = (
            replace(candidate, reason=reasons[candidate.name])
            if candidate.name in reasons and not candidate.reason
            else candidate
            for candidate in self
        )
        return Plan(candidates, self.remarks)

    @property
    def summary(self) -> str:
        """How much is masked, and why the rest is not, in one line of at most 200 characters."""
        masked = sum(candidate.numel for candidate in self.masked)
        total = sum({id(candidate.parameter): candidate.numel for candidate in self}.values())
        line = (
            f"{len(self.masked)} of {len(self)} parameters masked ({masked:,} of {total:,} entries,"
            f" {self.coverage:.0%} of those in matrices)"
        )
        reasons = Counter(kind_of(candidate.reason) for candidate in self if candidate.reason)
        named = {kind_of(candidate.reason): printable(candidate.name) for candidate in self}
        parts = [
            f"{count} {reason}" + (f" ({named[reason]})" if count == 1 and reason.startswith("unknown") else "")
            for reason, count in reasons.most_common()
        ]
        for shown in range(len(parts), -1, -1):
            rest = sum(reasons.values()) - sum(count for _, count in reasons.most_common(shown))
            others = [f"{rest} for other reasons"] if rest else []
            dense = ", ".join([*parts[:shown], *others])
            whole = f"{line}{f'; dense: {dense}' if dense else ''}."
            if len(whole) <= _LONGEST_SUMMARY:
                return whole
        return f"{line}."

    def __str__(self) -> str:
        names = [printable(candidate.name) for candidate in self]
        width = max(map(len, names), default=0)
        return "\n".join(
            f"{name:<{width}}  {candidate.module_type:<18} {_shape(candidate):<20} {candidate.reason or 'masked'}"
            for name, candidate in zip(names, self, strict=True)
        )


def select_weights(
    module: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    frozen: bool = False,
) -> Plan:
    """Decide for every parameter of ``module`` whether it is masked.

    Layers are not recognised by the names of their classes. Subclasses of torch's layers are masked like these layers.
    Linear layers and stacks of experts of other libraries are masked if attributes state their sizes (``in_channels``
    and ``out_channels``, ``num_experts``). A layer whose own ``forward`` computes with other weights than it stores,
    for example standardised ones, stays dense, because a pruned weight would not be zero there. A trial call of the
    layer finds this out. A layer that cannot be tried is masked, and :attr:`Plan.remarks` names it.

    Args:
        module: Any module; wrappers such as DDP are ignored.
        include: Patterns; if given, only weights that match one are masked. A pattern is a glob over the parameter's
            name (``"encoder.*"``), the name of its module's type (``"Conv2d"``; base classes match too), or a trait:
            ``"@depthwise"``, ``"@1x1"``, ``"@first"`` or ``"@last"``, the first or last weight that the rules mask, in
            the order of the module's parameters. Three patterns also mask weights that the rules leave dense: the full
            name of a parameter; the type of an embedding or an unknown module; and a pattern with a wildcard that
            matches no other weights. So ``["*", "Experts"]`` and ``["*", "*.experts.*"]`` mask experts and all others.
        exclude: Patterns of weights that stay dense; ``exclude`` takes precedence over ``include``.
        frozen: Whether to accept a plan whose weights are all frozen.

    Returns:
        The plan, one entry for each name of each parameter.

    Raises:
        MisconfigurationException: A pattern matches nothing, no weight is left to mask, or a weight cannot be masked:
            it has no shape yet, is sharded, has sparse gradients, or shares the memory of another parameter.
        ValueError: ``include`` or ``exclude`` is not a list of strings, or has an unknown selector.

    Example:
        >>> plan = select_weights(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))
        >>> [(candidate.name, candidate.reason) for candidate in plan]
        [('0.weight', ''), ('0.bias', 'bias'), ('1.weight', 'norm'), ('1.bias', 'norm')]
    """
    plan = judge_parameters(module, include=include, exclude=exclude)
    if plan.refusal:
        raise MisconfigurationException(plan.refusal)
    if not (plan.weights if frozen else plan.masked):
        raise MisconfigurationException(
            f"{type(module).__name__} has no weight to mask. Its parameters and the reasons:\n{plan}\nWeights of"
            " linear, convolution, recurrent and attention layers are masked. To mask another floating-point weight,"
            " give its full name in include=."
        )
    return plan


def judge_parameters(
    module: nn.Module, *, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> Plan:
    """The plan of :func:`select_weights`, even where it leaves nothing to mask or would be refused.

    Example:
        >>> plan = judge_parameters(nn.Linear(4, 3).requires_grad_(False))
        >>> plan.masked, [candidate.name for candidate in plan.weights]
        ([], ['weight'])
    """
    module = unwrapped(module)
    include, exclude = as_patterns("include", include), as_patterns("exclude", exclude)
    candidates = _first_and_last(_recognised(module))
    chosen = _joined(candidates, Choice(candidates, include, exclude))
    judged = _refused([replace(item, reason=reason) for item, reason in zip(candidates, chosen, strict=True)])
    return Plan(judged, remarks_on(judged, include))


def uses_of(module: nn.Module) -> dict[int, int]:
    """How often each weight that layers borrow is used, by its ``id``; those that are used once are not there.

    A module says by an attribute ``borrowed_weight`` which parameter of another module it computes with.

    Example:
        >>> from lightning_sparse.modules import SharedConvolution
        >>> first, second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        >>> uses_of(nn.Sequential(first, SharedConvolution(second, first))) == {id(first.weight): 2}
        True
    """
    borrowed = (getattr(child, "borrowed_weight", None) for child in module.modules())
    counts = Counter(id(weight) for weight in borrowed if weight is not None)
    return {weight: 1 + count for weight, count in counts.items()}


def _recognised(module: nn.Module) -> list[Candidate]:
    """Every parameter, with the reason that the rules have to leave it dense."""
    uses, tried = uses_of(module), dict[Hashable, bool | None]()
    candidates: list[Candidate] = []
    for place in places_of(module):
        layer = recognise(place, tried) if not (reason := _reason_of_tensor(place.parameter)) else None
        candidate = Candidate(place.name, place.parameter, place.owner, place.local_name, reason, part=place.part)
        if layer is not None:
            wiring = layer.wiring
            candidate = replace(
                candidate, reason=layer.reason, wiring=wiring, traits=wiring.traits, keeps_zeros=layer.keeps_zeros
            )
        candidates.append(replace(candidate, uses=uses.get(id(place.parameter), 1)))
    return candidates


def _reason_of_tensor(parameter: nn.Parameter) -> str:
    """Why no parameter like this can be masked, whatever its module is."""
    if not parameter.is_floating_point():
        return f"not floating point: {parameter.dtype}"
    if parameter.dtype.itemsize == 1:
        return f"8-bit floating point: {parameter.dtype}"
    if not nn.parameter.is_lazy(parameter) and parameter.numel() == 0 and not hasattr(parameter, "ds_shape"):
        return "empty"
    return ""


def _first_and_last(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with the traits that depend on their order, among those that the rules mask."""
    dense = {id(candidate.parameter) for candidate in candidates if candidate.reason}
    maskable = [candidate for candidate in candidates if id(candidate.parameter) not in dense]
    once = list({id(candidate.parameter): candidate for candidate in reversed(maskable)}.values())
    ends = {"@first": once[-1], "@last": once[0]} if once else {}
    return [
        replace(
            candidate, traits=candidate.traits | {trait for trait, end in ends.items() if end.name == candidate.name}
        )
        for candidate in candidates
    ]


def _joined(candidates: Sequence[Candidate], choice: Choice) -> Iterator[str]:
    """The reason of each: a weight under several names is masked under its first."""
    uses: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        uses.setdefault(id(candidate.parameter), []).append(candidate)
    for candidate in candidates:
        owner, *others = uses[id(candidate.parameter)]
        yield _reason_of_all(owner, others, choice) if owner is candidate else f"tied: to {printable(owner.name)}"


def _reason_of_all(owner: Candidate, others: Sequence[Candidate], choice: Choice) -> str:
    """The reason of a weight with several uses: one must want it masked, and none forbid it.

    Naming it in full under any of its names overrules what the rules say of the others.
    """
    reasons = [choice.reason(use) for use in (owner, *others)]
    if any(choice.admits(use) for use in (owner, *others)):
        reasons = [reason if kind_of(reason) in _FINAL else "" for reason in reasons]
    own, *rest = reasons
    if own not in _OPEN:
        return own
    for reason, other in zip(rest, others, strict=True):
        if reason not in _OPEN:
            return f"tied: {reason} (as {printable(other.name)})"
    return "" if "" in reasons else own


def _refused(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, those with the reason of a refusal that would be masked and cannot be, and those frozen."""
    sparse = {id(candidate.parameter) for candidate in candidates if _has_sparse_gradients(candidate.owner)}
    trained = [candidate for candidate in candidates if _is_trained(candidate)]
    shared = {
        trained[place].name
        for pair in overlapping([candidate.parameter.detach() for candidate in trained])
        if any(not trained[place].reason for place in pair)
        for place in pair
    }
    return [
        replace(candidate, reason="shared memory")
        if candidate.name in shared
        else replace(candidate, reason=candidate.reason or _refusal(candidate, sparse))
        for candidate in candidates
    ]


def _refusal(candidate: Candidate, sparse: Container[int]) -> str:
    parameter = candidate.parameter
    if nn.parameter.is_lazy(parameter):
        return "no shape yet"
    if hasattr(parameter, "ds_shape"):
        return "sharded: by DeepSpeed"
    if obstacle := obstacle_of_shards(parameter):
        return f"sharded: {obstacle}"
    if id(parameter) in sparse:
        return "sparse gradients"
    return "" if parameter.requires_grad else "frozen"


def _is_trained(candidate: Candidate) -> bool:
    """Whether an optimizer may write to a parameter, under its first name."""
    parameter = candidate.parameter
    plain = candidate.numel > 0 and not is_sharded(parameter)
    return plain and parameter.requires_grad and not candidate.reason.startswith("tied: to")


def _has_sparse_gradients(owner: nn.Module) -> bool:
    return isinstance(owner, nn.Embedding | nn.EmbeddingBag) and owner.sparse


def _shape(candidate: Candidate) -> str:
    return "no shape yet" if nn.parameter.is_lazy(candidate.parameter) else str(tuple(candidate.parameter.shape))
