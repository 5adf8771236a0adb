"""What a user should know of a plan: each a sentence of what was found and one of what to do, over all layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lightning_sparse.masks.candidate import Candidate
from lightning_sparse.masks.layers import kind_of
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.selectors import NEVER, matches

__all__ = ["enumerated", "remarks_on"]

_LARGE_SHARE = 0.1
_SMALL_SHARE = 0.01
# Kinds of reasons for which a parameter stays dense that no pattern with a wildcard undoes.
_BY_RULE = NEVER | {
    "bias",
    "embedding",
    "norm",
    "parametrized",
    "transformed",
    "unknown module",
    "unknown parameter",
    "vector",
}


def remarks_on(candidates: Sequence[Candidate], include: Sequence[str] | None) -> tuple[str, ...]:
    """The sentences on a plan that ``include`` has led to; none where there is nothing to say."""
    sentences = (_on_unknown, _on_parametrized, _on_idle_patterns, _on_forwards, _on_directions)
    return tuple(sentence for make in sentences if (sentence := make(candidates, include)))


def enumerated(names: Iterable[str], most: int = 3) -> str:
    """Names for a sentence: the first ``most``, and how many more there are.

    Example:
        >>> enumerated(f"{number}.weight" for number in range(5))
        '0.weight, 1.weight, 2.weight and 2 more'
    """
    unique = list(dict.fromkeys(map(printable, names)))
    if len(unique) <= most + 1:
        return ", ".join(unique)
    return f"{', '.join(unique[:most])} and {len(unique) - most} more"


def _on_unknown(candidates: Sequence[Candidate], include: Sequence[str] | None) -> str:
    unknown = [candidate for candidate in _in_scope(candidates) if kind_of(candidate.reason).startswith("unknown")]
    dense, total = _entries(unknown), _entries(_in_scope(candidates))
    if dense <= _LARGE_SHARE * total:
        return ""
    names = _covering(unknown, candidates)
    advice = [*(include if include is not None else ["*"]), *names]
    return (
        f"{dense:,} of {total:,} weights in matrices ({dense / total:.0%}) stay dense, because their modules are"
        f" unknown: {enumerated(names)}. To mask them, write include=[{_list_of(advice)}]."
    )


def _on_parametrized(candidates: Sequence[Candidate], _include: Sequence[str] | None) -> str:
    kinds = ("parametrized", "transformed")
    computed = [candidate for candidate in _in_scope(candidates) if kind_of(candidate.reason) in kinds]
    computed.sort(key=lambda candidate: -candidate.numel)
    dense, total = _entries(computed), _entries(_in_scope(candidates))
    if dense <= _LARGE_SHARE * total:
        return ""
    return (
        f"{dense:,} of {total:,} weights in matrices ({dense / total:.0%}) stay dense because their layers compute with"
        f" other weights than they store: {enumerated(candidate.name for candidate in computed)}."
        " print(select_weights(module)) says what to do for each."
    )


def _on_idle_patterns(candidates: Sequence[Candidate], include: Sequence[str] | None) -> str:
    first_of = {id(candidate.parameter): candidate for candidate in reversed(candidates)}
    idle: list[str] = []
    for pattern in include or ():
        kinds = {
            kind_of(first_of[id(candidate.parameter)].reason) for candidate in candidates if matches(candidate, pattern)
        }
        if kinds and kinds <= _BY_RULE:
            idle.append(f"{pattern!r} ({', '.join(sorted(kinds))})")
    if not idle:
        return ""
    return (
        f"These patterns in include= mask nothing: {enumerated(idle)}. To mask what stays dense by default, give the"
        " full name of a weight of two or more dimensions. Or leave the pattern out."
    )


def _on_forwards(candidates: Sequence[Candidate], _include: Sequence[str] | None) -> str:
    masked = [candidate for candidate in candidates if not candidate.reason and candidate.keeps_zeros is not True]
    if not masked:
        return ""
    types = list(dict.fromkeys(candidate.module_type for candidate in masked))
    does = "computes" if all(candidate.keeps_zeros is False for candidate in masked) else "may compute"
    return (
        f"{enumerated(candidate.name for candidate in masked)}: the forward of {enumerated(types)} {does} with other"
        f" weights than it stores, so pruned ones may not be zero there. If so, write exclude=[{_list_of(types)}]."
    )


def _on_directions(candidates: Sequence[Candidate], _include: Sequence[str] | None) -> str:
    masked = [candidate.name for candidate in candidates if not candidate.reason and candidate.part == "direction"]
    if not masked:
        return ""
    return (
        f"{enumerated(masked)}: under weight norm, an output becomes NaN when all its weights are pruned, so a mask"
        " that does this stops training. Keep the sparsity low enough that each output keeps some, or remove the norm"
        " before fit."
    )


def _covering(unknown: Sequence[Candidate], candidates: Sequence[Candidate]) -> list[str]:
    """What to name to mask nearly all that is unknown: types of modules, and parameters of those that are known."""
    parts = {candidate.local_name for candidate in unknown if kind_of(candidate.reason) == "unknown parameter"}
    patterns = {name for name in parts if _is_of_several(f"*.{name}", candidates)}
    sizes: Counter[str] = Counter()
    for candidate in unknown:
        if kind_of(candidate.reason) == "unknown module":
            name = candidate.module_type
        else:
            name = f"*.{candidate.local_name}" if candidate.local_name in patterns else candidate.name
        sizes[name] += candidate.numel
    names: list[str] = []
    rest = sizes.total()
    for name, size in sizes.most_common():
        if rest <= _SMALL_SHARE * sizes.total():
            break
        names.append(name)
        rest -= size
    return names


def _is_of_several(pattern: str, candidates: Sequence[Candidate]) -> bool:
    """Whether a pattern matches several matrices, all of them unknown parts of known layers, and so admits them."""
    alike = [candidate for candidate in candidates if matches(candidate, pattern)]
    return len(alike) > 1 and all(kind_of(candidate.reason) == "unknown parameter" for candidate in alike)


def _in_scope(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The trained matrices that the patterns leave, each once."""
    out = NEVER | {"excluded", "not included", "tied"}
    return [
        candidate
        for candidate in candidates
        if candidate.is_matrix and candidate.parameter.requires_grad and kind_of(candidate.reason) not in out
    ]


def _entries(candidates: Iterable[Candidate]) -> int:
    return sum(candidate.numel for candidate in candidates)


def _list_of(names: Iterable[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(names)))
