"""States of callbacks, each wrong in one place: what a hand, a program or a disk may make of a checkpoint."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Mutation", "mutations_of", "sample"]

Mutation = tuple[str, Callable[[Any], Any]]
"""What is done, and a function from a whole state to a mutated copy of it."""

_HUGE = 10**6
_OF_NUMBERS = [-7, 10**12, True, "3", None, 2.5, math.nan, [], 1]


def mutations_of(state: Any) -> list[Mutation]:
    """Every mutation of a nested state that we think of."""
    return [
        (f"{'.'.join(map(str, path))} {what}", _at(path, replacement))
        for path, value in _nodes(state, ())
        for what, replacement in _replacements(value)
    ]


def sample(state: Any, number: int, seed: int = 0) -> list[Mutation]:
    """Some of them, spread over all fields."""
    every = mutations_of(state)
    return random.Random(seed).sample(every, min(number, len(every)))


def _nodes(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if path:
        yield path, value
    if isinstance(value, Mapping):
        for key in value:
            yield from _nodes(value[key], (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value[:2]):
            yield from _nodes(item, (*path, place))


_GONE = object()


def _replacements(value: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    yield "gone", lambda _: _GONE
    if isinstance(value, Tensor):
        yield from _of_tensors(value)
    elif isinstance(value, Mapping):
        yield "with a key more", lambda its: {**its, "bogus": 1}
        if value:
            yield "empty", lambda _: {}
        yield "is a list", lambda its: list(its)
        yield "is None", lambda _: None
    elif isinstance(value, list):
        yield "with bogus in it", lambda its: [*its, "bogus"]
        if value:
            yield "with its first twice", lambda its: [*its, *its[:1]]
            yield "empty", lambda _: []
        yield "is a string", lambda _: "bogus"
    elif isinstance(value, str):
        yield "is another string", lambda its: its[::-1] + "x"
        yield "is None", lambda _: None
    else:
        for other in _OF_NUMBERS:
            if other is not value:
                yield f"is {other!r}", lambda _, other=other: other


def _of_tensors(value: Tensor) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    yield "is None", lambda _: None
    yield "is a string", lambda _: "bogus"
    yield "cut short", lambda its: its.reshape(-1)[: its.numel() // 2].clone()
    yield "with a dimension more", lambda its: its[None].clone()
    yield "of another type", lambda its: its.to(torch.int32 if its.is_floating_point() else torch.float32)
    yield "claims terabytes", lambda its: its.new_zeros(1).expand(_HUGE, _HUGE)
    if value.numel():
        yield "with a bit flipped", _with_a_bit_flipped
        if value.is_floating_point():
            yield "with NaN", lambda its: torch.full_like(its, math.nan)


def _with_a_bit_flipped(tensor: Tensor) -> Tensor:
    flipped = tensor.clone().reshape(-1)
    flipped.view(torch.uint8)[flipped.nbytes // 2] ^= 1
    return flipped.reshape(tensor.shape)


def _at(path: tuple[Any, ...], replacement: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def mutate(state: Any) -> Any:
        mutated = copy.deepcopy(state)
        parent = mutated
        for key in path[:-1]:
            parent = parent[key]
        value = replacement(parent[path[-1]])
        if value is _GONE:
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
        return mutated

    return mutate
