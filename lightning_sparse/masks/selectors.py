"""The patterns of ``include=`` and ``exclude=``: globs over names, module types, and traits like ``"@depthwise"``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sparse.masks.candidate import Candidate
from lightning_sparse.masks.layers import kind_of
from lightning_sparse.masks.places import printable

__all__ = ["NEVER", "TRAITS", "Choice", "as_patterns", "matches", "names_near"]

TRAITS = {
    "@1x1": "convolutions with a kernel of one entry",
    "@depthwise": "convolutions in which each filter sees one channel",
    "@first": "the first weight that would be masked, in the order of the module's parameters",
    "@last": "the last of them",
}
"""The selectors by trait, and what each selects."""

NEVER = {"auxiliary", "empty", "not floating point", "8-bit floating point"}
"""The kinds of reasons that no pattern overrules."""
# What the name of its type in full admits, and what a pattern does that matches nothing else.
_BY_TYPE = {"embedding", "norm", "unknown module"}
_BY_WILDCARD = {"embedding", "unknown module", "unknown parameter"}


class Choice:
    """What ``include`` and ``exclude`` make of the parameters of a module.

    Args:
        candidates: All of them, each with the reason that the rules have to leave it dense.
        include: Patterns of what is masked; None for all that the rules mask.
        exclude: Patterns of what stays dense.

    Raises:
        MisconfigurationException: A pattern matches nothing.
    """

    def __init__(
        self, candidates: Sequence[Candidate], include: Sequence[str] | None, exclude: Sequence[str] | None
    ) -> None:
        self._include, self._exclude = include, exclude
        for argument, patterns in (("include", include), ("exclude", exclude)):
            for pattern in patterns or ():
                _check_matches_something(argument, pattern, candidates)
        self._admitting = [pattern for pattern in include or () if _admits_what_it_matches(pattern, candidates)]

    def reason(self, candidate: Candidate) -> str:
        """Why ``candidate`` stays dense; empty where it is masked."""
        if any(matches(candidate, pattern) for pattern in self._exclude or ()):
            return "excluded"
        if self._include is not None and not any(matches(candidate, pattern) for pattern in self._include):
            return "not included"
        return "" if self.admits(candidate) else candidate.reason

    def admits(self, candidate: Candidate) -> bool:
        """Whether ``include`` names, clearly enough, what the rules would leave dense."""
        can_be_masked = candidate.is_matrix and kind_of(candidate.reason) not in NEVER
        return can_be_masked and any(self._admits(pattern, candidate) for pattern in self._include or ())

    def _admits(self, pattern: str, candidate: Candidate) -> bool:
        kind = kind_of(candidate.reason)
        if pattern == candidate.name:
            return True
        if pattern in candidate.type_names:
            return kind in _BY_TYPE or (kind == "transformed" and pattern == candidate.module_type)
        return kind in _BY_WILDCARD and pattern in self._admitting and matches(candidate, pattern)


def matches(candidate: Candidate, pattern: str) -> bool:
    """Whether a pattern of ``include`` or ``exclude`` matches a parameter: its name, its module's type, or a trait."""
    if pattern.startswith("@"):
        return pattern in candidate.traits
    return candidate.name == pattern or any(
        fnmatchcase(name, pattern) for name in (candidate.name, *candidate.type_names)
    )


def as_patterns(argument: str, patterns: Iterable[str] | None) -> tuple[str, ...] | None:
    """The patterns of ``include`` or ``exclude`` as a tuple, those of a set in alphabetical order; None stays None.

    Raises:
        ValueError: They are no list, or one of them is no string or no known selector.

    Example:
        >>> from torch import nn
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
        _check_pattern(f"{argument}[{index}]", pattern)
    return names


def _check_pattern(argument: str, pattern: object) -> None:
    if isinstance(pattern, type):
        raise ValueError(f"{argument} is {_shown(pattern)}; give its name: {pattern.__name__!r}.")
    if not isinstance(pattern, str):
        raise ValueError(
            f"{argument} is {_shown(pattern)}; give parameter names, such as 'head.weight', or patterns of them, such"
            " as 'head.*'."
        )
    if pattern.startswith("@") and pattern not in TRAITS:
        known = "; ".join(f"{trait!r}, {meaning}" for trait, meaning in TRAITS.items())
        raise ValueError(f"{argument} is {pattern!r}, which is not a selector. The selectors are {known}.")


def names_near(unknown: Iterable[str], known: Sequence[str]) -> str:
    """Of the names that are known those like the unknown ones, or the first of all, for the message of an error.

    Example:
        >>> names_near(["fc.wieght"], ["conv.weight", "fc.bias", "fc.weight"])
        'fc.weight, conv.weight, fc.bias'
    """
    near = [name for each in unknown for name in difflib.get_close_matches(each, known, n=3, cutoff=0.4)]
    return ", ".join(map(printable, dict.fromkeys(near or known[:8])))


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def _admits_what_it_matches(pattern: str, candidates: Sequence[Candidate]) -> bool:
    """Whether a pattern with a wildcard names something, and matches nothing that the rules mask."""
    if not set("*?[") & set(pattern) or not pattern.strip("*?."):
        return False
    return all(candidate.reason for candidate in candidates if matches(candidate, pattern))


def _check_matches_something(argument: str, pattern: str, candidates: Sequence[Candidate]) -> None:
    if any(matches(candidate, pattern) for candidate in candidates):
        return
    if pattern.startswith("@"):
        raise MisconfigurationException(
            f"{argument}={pattern!r} matches nothing: the module has no {TRAITS[pattern]}. Leave it out."
        )
    holders = dict.fromkeys(holder for candidate in candidates for holder in _modules_around(candidate.name))
    meant = [holder for holder in holders if holder == pattern or holder.endswith(f".{pattern}")]
    if meant:
        raise MisconfigurationException(
            f"{argument}={pattern!r} matches no parameter name and no module type. {meant[0]!r} is a module; for its"
            f" parameters write '{printable(meant[0])}.*'."
        )
    known = sorted({candidate.name for candidate in candidates} | {candidate.module_type for candidate in candidates})
    raise MisconfigurationException(
        f"{argument}={pattern!r} matches no parameter name and no module type. Near it: {names_near([pattern], known)}."
        " Patterns are globs over parameter names ('encoder.*.weight') and module types ('Conv2d')."
    )


def _modules_around(name: str) -> Iterator[str]:
    """The names of the modules that a parameter is in, the outermost first."""
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))
