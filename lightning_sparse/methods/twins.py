"""Optimizers of parameters learned beside masked weights, with the class and settings of the weights' optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.layout import Layout

__all__ = ["descend", "saved_like", "saved_twin", "set_like_its_user", "taken_like", "taken_twin", "twin_optimizer"]


def twin_optimizer(
    name: str, group: MaskGroup, learned: Mapping[str, nn.Parameter], settings: Mapping[str, Any]
) -> Optimizer:
    """An optimizer like that of ``group``, over what is learned beside its weights.

    Args:
        name: Of the method, for the message of an error.
        group: The weights.
        learned: What is learned, by the name of the weight.
        settings: In what the twin differs.

    Returns:
        The optimizer, with one parameter group for each of the user's that holds masked weights.

    Raises:
        MisconfigurationException: An optimizer of that class does not take what is learned.
    """
    learned_of = {id(weight.parameter): learned[weight.name] for weight in group if weight.name in learned}
    param_groups = [
        {
            **user,
            **settings,
            "params": [learned_of[id(weight)] for weight in user["params"] if id(weight) in learned_of],
        }
        for user in _masked_param_groups(group)
    ]
    kind = type(group.optimizer)
    try:
        inspect.signature(kind.step).bind(None)  # TypeError for one that asks for a closure, which a twin has not
        return kind(param_groups, lr=param_groups[0]["lr"])  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"{name} steps its thresholds, which are vectors or numbers, with an optimizer like that of the weights,"
            f" but {kind.__name__} does not take them ({error}). Give the masked weights to SGD or Adam, for example."
        ) from error


def set_like_its_user(twin: Optimizer, group: MaskGroup, settings: Mapping[str, Any]) -> None:
    """Give ``twin`` the settings that the optimizer of ``group`` has now: learning rates follow their schedule."""
    for own, user in zip(twin.param_groups, _masked_param_groups(group), strict=True):
        own.update({key: value for key, value in user.items() if key != "params"})
        own.update(settings)


def descend(twin: Optimizer) -> None:
    """Step the parameters of ``twin`` down their gradients, without its help."""
    for settings in twin.param_groups:
        for parameter in settings["params"]:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=float(settings["lr"]))


def saved_like(value: Tensor, layout: Layout | None) -> Tensor:
    """What is learned, whole, for a checkpoint; a collective where processes hold parts of it.

    Args:
        value: Flat, what this process holds.
        layout: Where the rest is; None where this is all.
    """
    if layout is None:
        return value.detach().cpu().clone()
    return layout.saved(value.detach().view(layout.local_shape)).flatten().clone()


def taken_like(saved: Tensor, value: Tensor, layout: Layout | None) -> Tensor:
    """What this process holds of something saved, shaped like ``value``; as it is where it does not fit."""
    if layout is None or saved.numel() != layout.shape.numel():
        return saved
    return layout.take(saved.view(layout.shape)).reshape(value.shape)


def saved_twin(twin: Optimizer, layouts: Mapping[int, Layout]) -> dict[str, Any]:
    """The state of a twin with what it keeps for each entry whole.

    Args:
        twin: The optimizer.
        layouts: Of its parameters of which processes hold parts, by ``id``.
    """
    return _with_state(twin, twin.state_dict(), lambda value, own, layout: saved_like(value, layout), layouts)


def taken_twin(twin: Optimizer, state: Mapping[str, Any], layouts: Mapping[int, Layout]) -> Mapping[str, Any]:
    """The inverse of :func:`saved_twin`: of what is kept for each entry, what this process holds."""
    return _with_state(twin, state, taken_like, layouts)


def _with_state(
    twin: Optimizer,
    state: Mapping[str, Any],
    change: Callable[[Tensor, Tensor, Layout], Tensor],
    layouts: Mapping[int, Layout],
) -> dict[str, Any]:
    parameters = dict(enumerate(own for group in twin.param_groups for own in group["params"]))

    def changed(key: str, value: Any, number: int) -> Any:
        own = parameters.get(number)
        layout = None if own is None else layouts.get(id(own))
        is_of_entries = isinstance(value, Tensor) and value.dim() > 0 and key != "step"
        return change(value, own, layout) if layout is not None and own is not None and is_of_entries else value

    states = {
        number: {key: changed(key, value, number) for key, value in its.items()}
        for number, its in state["state"].items()
    }
    return {**state, "state": states}


def _masked_param_groups(group: MaskGroup) -> list[dict[str, Any]]:
    """The parameter groups of the optimizer that hold masked weights; those that a finetuning callback adds do not."""
    masked = {id(weight.parameter) for weight in group}
    return [user for user in group.optimizer.param_groups if any(id(weight) in masked for weight in user["params"])]
