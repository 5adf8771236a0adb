"""The state of a method in a checkpoint: what is in it, and whether it is whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.functional.stored import digest, tensors_in
from lightning_sparse.masks.checkpoint import STATE_VERSION, fault_of_seal
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.schema import (
    LARGEST_STEP,
    Check,
    any_of,
    anything,
    check_fields,
    list_of,
    mapping_of,
    names,
    nothing,
    packed_mask,
    record,
    refuse,
    tensor,
    text,
    whole,
)

__all__ = ["check_budgets", "check_digest", "check_state", "load_optimizer", "optimizer_state", "sealed"]

_MASK = {"budget": whole(), "updated_at": whole(-1), "uses": whole(1)}

_FIELDS: Mapping[str, Check] = {
    "version": anything,
    "step": whole(),
    "origin": whole(),
    "began_at": whole(),
    "masks": mapping_of(packed_mask({**_MASK, "budget": whole(0, 1 << 48)})),
    "dense": names,
    "frozen": names,
    "not_finite_for": list_of(whole(0, 1_000)),
    "digest": anything,
}

# Optional: states that were written before these fields existed have the same version.
_LATER: Mapping[str, Check] = {
    "settings": mapping_of(text),
    "total_steps": any_of(nothing, whole(-LARGEST_STEP)),
}


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the version of its format, and a digest by which damage is found."""
    return {"version": STATE_VERSION, **state, "digest": digest(state)}


def check_state(state: Any, owner: str, method: Mapping[str, Check] | None = None) -> Mapping[str, Any]:
    """Refuse a state that is of another version, cut short or damaged, field by field.

    Args:
        state: What a checkpoint holds.
        owner: Of which method, for the message.
        method: The fields that the method itself writes, as far as it says what they may be.

    Returns:
        The state.

    Raises:
        MisconfigurationException: It cannot be gone on from; the message says why.
    """
    whose = f"The checkpoint's state of {owner}"
    version = state.get("version", STATE_VERSION) if isinstance(state, Mapping) else STATE_VERSION
    if type(version) is not int or version != STATE_VERSION:
        raise MisconfigurationException(
            f"{whose} has version {printable(str(version))[:40]}, and this lightning_sparse reads version"
            f" {STATE_VERSION}. Resume with the version that wrote it; or load its weights with load_from_checkpoint,"
            " and keep their zeros with FixedMask."
        )
    later = {name: check for name, check in _LATER.items() if isinstance(state, Mapping) and name in state}
    check_fields(state, {**_FIELDS, **later, "method": record(method or {}, closed=method is not None)}, whose)
    if fault := _contradiction(state):
        refuse(f"{whose} is damaged: {fault}")
    return state


def check_digest(state: Mapping[str, Any], owner: str) -> None:
    """Refuse a state that is not what was written.

    Raises:
        MisconfigurationException: Its digest is another.
    """
    if fault := fault_of_seal(state):
        raise MisconfigurationException(
            f"The checkpoint's state of {owner} {fault}. Copy the file again, or resume from an earlier checkpoint."
        )


def check_budgets(groups: Iterable[MaskGroup], owner: str) -> None:
    """Refuse loaded masks that have more or fewer active weights than their budgets, of a method that meets these.

    Raises:
        MisconfigurationException: One has.
    """
    for weight in (weight for group in groups for weight in group):
        if weight.num_active != weight.budget:
            refuse(
                f"The checkpoint's state of {owner} is damaged: the mask of {printable(weight.name)} has"
                f" {weight.num_active:,} active weights, and its budget is {weight.budget:,}"
            )


def optimizer_state(value: Any) -> str:
    """What is wrong with the state of an optimizer, as the end of a sentence; empty where nothing is."""
    groups = list_of(record({"params": list_of(whole())}, closed=False))
    if fault := record({"state": anything, "param_groups": groups})(value):
        return fault
    known = {index for group in value["param_groups"] for index in group["params"]}
    if not (isinstance(value["state"], Mapping) and known.issuperset(value["state"])):
        return "is not an optimizer's state"
    if not all(isinstance(own, Mapping) for own in value["state"].values()):
        return "is no state of an optimizer"
    try:
        found = [tensor(floating=False)(each) for each in tensors_in(value)]
    except ValueError as error:
        return f"cannot be read: {error}"
    return next((f"has a tensor that {fault}" for fault in found if fault), "")


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an optimizer of vectors.

    Raises:
        MisconfigurationException: It is that of another optimizer, or of vectors of other sizes.
    """
    try:
        optimizer.load_state_dict(dict(state))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise MisconfigurationException(
            "The checkpoint's state of the optimizer of the parameters learned beside the weights does not fit this"
            f" {type(optimizer).__name__}: {error} Resume with the optimizers that wrote it, or from an earlier one."
        ) from error
    if not type(optimizer).__module__.startswith("torch.optim"):
        return  # others may keep tensors of any shape
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if isinstance(value, Tensor):
                shapes = f"has shape {tuple(value.shape)} for values of {tuple(parameter.shape)}"
                fault = shapes if value.numel() != 1 and value.shape != parameter.shape else ""
            else:  # torch's count steps by numbers or tensors, and SGD may have no momentum yet
                is_number = name == "step" and isinstance(value, int | float)
                is_missing = name == "momentum_buffer" and value is None
                fault = "" if is_number or is_missing else "is no tensor"
            if fault:
                refuse(
                    "The checkpoint's state of the optimizer of the parameters learned beside the weights is damaged:"
                    f" {printable(str(name))} {fault}"
                )


def _contradiction(state: Mapping[str, Any]) -> str:
    """What cannot be true of fields that are right each for itself."""
    step = state["step"]
    if state["origin"] > step:
        return f"origin is {state['origin']:,}, after step {step:,}"
    for name, mask in state["masks"].items():
        numel = 8 * mask["bits"].numel()
        if mask["updated_at"] > step:
            return f"the mask of {printable(name)} was updated at step {mask['updated_at']:,}, after step {step:,}"
        if mask["budget"] > numel:
            return f"the mask of {printable(name)} has a budget of {mask['budget']:,} of at most {numel:,} weights"
    for name in (*state["dense"], *state["frozen"]):
        if name in state["masks"]:
            return f"{printable(name)} has a mask, but is listed as dense too"
    return ""
