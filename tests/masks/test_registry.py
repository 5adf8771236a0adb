from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sparse.masks import MaskGroup, MaskRegistry, select_weights


def two_layers() -> nn.ModuleDict:
    return nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 2)})


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for module in modules for parameter in module.parameters()], lr=0.1)


def claim(module: nn.Module, owner: str = "method", **patterns: Any) -> MaskGroup:
    (group,) = MaskRegistry.of(module).claim(owner, select_weights(module, **patterns).masked, [sgd(module)])
    return group


def randomize(group: MaskGroup, seed: int = 0) -> None:
    group.mask.copy_(torch.rand(group.numel, generator=torch.Generator().manual_seed(seed)) < 0.5)
    group.recount()


# One registry a module


def test_a_module_has_one_registry() -> None:
    module = two_layers()
    assert MaskRegistry.of(module) is MaskRegistry.of(module)
    assert MaskRegistry.of(module) is not MaskRegistry.of(two_layers())


def test_a_forgotten_registry_stays_with_those_who_hold_it() -> None:
    module = two_layers()
    claim(module)
    old = MaskRegistry.of(module)
    MaskRegistry.forget(module)
    assert list(old) == ["a.weight", "b.weight"]
    assert not MaskRegistry.of(module)


def test_a_registry_goes_with_its_module() -> None:
    module = two_layers()
    claim(module)
    registry, weight = weakref.ref(MaskRegistry.of(module)), weakref.ref(module["a"])
    del module
    gc.collect()
    assert registry() is None
    assert weight() is None


# What a registry says


def test_a_registry_is_a_mapping_from_names_in_the_order_of_the_module() -> None:
    module = two_layers()
    claim(module)
    registry = MaskRegistry.of(module)
    assert list(registry) == ["a.weight", "b.weight"]
    assert [weight.parameter for weight in registry.values()] == [module["a"].weight, module["b"].weight]
    assert len(registry) == 2
    assert "a.bias" not in registry


def test_an_empty_registry_is_dense() -> None:
    registry = MaskRegistry()
    assert (registry.sparsity, registry.num_active, registry.numel, len(registry)) == (0.0, 0, 0, 0)


def test_counts_are_exact_integers_of_all_weights_and_of_each() -> None:
    module = two_layers()
    group = claim(module)
    registry = MaskRegistry.of(module)
    group.mask[:5] = False  # 5 of the 12 of a
    group.recount()
    assert (registry.num_active, registry.numel) == (13, 18)
    assert registry.sparsity == pytest.approx(5 / 18)
    assert (registry["a.weight"].num_active, registry["b.weight"].num_active) == (7, 6)
    assert isinstance(registry["a.weight"].num_active, int)


def test_a_weight_says_its_name_shape_and_sparsity() -> None:
    module = two_layers()
    group = claim(module)
    group.mask[:3] = False
    group.recount()
    assert repr(group[0]) == "MaskedWeight(a.weight, (3, 4), sparsity=0.2500)"
    assert repr(MaskRegistry.of(module)) == "MaskRegistry(2 weights, sparsity=0.1667)"


# Claims


def test_claims_begin_all_active_with_a_full_budget() -> None:
    group = claim(two_layers())
    assert group.mask.all()
    assert [(weight.budget, weight.num_active) for weight in group] == [(12, 12), (6, 6)]
    assert group.updated_at == -1


def test_two_methods_divide_a_module() -> None:
    module = two_layers()
    first, second = claim(module, "first", include=["a.*"]), claim(module, "second", exclude=["a.*"])
    assert [weight.name for weight in (*first, *second)] == list(MaskRegistry.of(module)) == ["a.weight", "b.weight"]


def test_a_weight_claimed_by_two_methods_is_refused_naming_the_weight_and_both() -> None:
    module = two_layers()
    claim(module, "first", include=["b.*"])
    with pytest.raises(MisconfigurationException, match=r"second claims 'b\.weight' which first already masks"):
        claim(module, "second")


def test_a_refused_claim_leaves_nothing_behind() -> None:
    module = two_layers()
    claim(module, "first", include=["b.*"])
    with pytest.raises(MisconfigurationException):
        claim(module, "second")
    assert list(MaskRegistry.of(module)) == ["b.weight"]


def test_a_tied_weight_claimed_under_two_names_is_refused_naming_both() -> None:
    module = two_layers()
    other = nn.ModuleDict({"other_name": nn.Linear(4, 3)})
    other["other_name"].weight = module["a"].weight
    registry = MaskRegistry.of(module)
    claim(module, "first")
    with pytest.raises(MisconfigurationException, match=r"'other_name\.weight', tied to 'a\.weight'.* first "):
        registry.claim("second", select_weights(other).masked, [sgd(other)])


def test_claiming_again_begins_anew() -> None:
    module = two_layers()
    randomize(claim(module))
    assert claim(module).mask.all()
    assert list(MaskRegistry.of(module)) == ["a.weight", "b.weight"]


def test_released_weights_can_be_claimed_by_another_method() -> None:
    module = two_layers()
    claim(module, "first")
    MaskRegistry.of(module).release("first")
    assert not MaskRegistry.of(module)
    assert len(claim(module, "second")) == 2


def test_releasing_one_method_leaves_the_other() -> None:
    module = two_layers()
    claim(module, "first", include=["a.*"])
    claim(module, "second", include=["b.*"])
    MaskRegistry.of(module).release("first")
    assert list(MaskRegistry.of(module)) == ["b.weight"]


# Optimizers


def test_weights_of_two_optimizers_are_two_groups() -> None:
    module = two_layers()
    optimizers = [sgd(module["b"]), sgd(module["a"])]
    groups = MaskRegistry.of(module).claim("method", select_weights(module).masked, optimizers)
    assert [(group.optimizer, [weight.name for weight in group]) for group in groups] == [
        (optimizers[0], ["b.weight"]),
        (optimizers[1], ["a.weight"]),
    ]


def test_an_optimizer_without_masked_weights_has_no_group() -> None:
    module = two_layers()
    candidates = select_weights(module, include=["a.*"]).masked
    assert len(MaskRegistry.of(module).claim("method", candidates, [sgd(module["a"]), sgd(module["b"])])) == 1


def test_a_weight_that_no_optimizer_steps_is_refused_by_name_with_the_remedies() -> None:
    module = two_layers()
    with pytest.raises(MisconfigurationException, match=r"b\.weight.*configure_optimizers.*exclude=") as raised:
        MaskRegistry.of(module).claim("method", select_weights(module).masked, [sgd(module["a"])])
    assert "a.weight" not in str(raised.value)


def test_a_weight_that_two_optimizers_step_is_refused_by_name() -> None:
    module = two_layers()
    with pytest.raises(MisconfigurationException, match=r"a\.weight"):
        MaskRegistry.of(module).claim("method", select_weights(module).masked, [sgd(module), sgd(module["a"])])


# Masks are views of one flat tensor


class Layouts(nn.Module):
    """Weights whose order in memory is not that of their indices."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.conv = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4).to(memory_format=torch.channels_last)
        self.transposed = nn.Linear(2, 6)
        self.transposed.weight = nn.Parameter(torch.randn(2, 6).t())
        self.pointwise = nn.Conv2d(3, 5, 1).to(memory_format=torch.channels_last)


def test_a_mask_has_the_shape_of_its_weight_and_aliases_the_flat_mask() -> None:
    group = claim(Layouts())
    group.mask.zero_()
    for weight in group:
        assert weight.mask.shape == weight.parameter.shape
        weight.mask.fill_(True)
        assert int(group.mask.sum()) == weight.numel
        weight.mask.fill_(False)


def test_a_mask_has_the_strides_of_its_dense_weight() -> None:
    for weight in claim(Layouts(), exclude=["depthwise.weight", "pointwise.weight"]):  # strides of size 1 are any
        assert weight.mask.stride() == weight.parameter.stride()


def test_single_entries_written_to_a_mask_are_found_at_their_place_in_the_flat_mask() -> None:
    group = claim(Layouts())
    randomize(group)
    assert torch.equal(group.flatten([weight.mask for weight in group]), group.mask)


def test_flattening_orders_weights_as_the_flat_mask_orders_their_masks() -> None:
    group = claim(Layouts())
    flat = group.flatten([weight.parameter.detach() for weight in group])
    flat_again = torch.cat([weight.flatten(view) for weight, view in zip(group, group.split(flat), strict=True)])
    assert torch.equal(flat, flat_again)
    for weight, part in zip(group, group.split(flat), strict=True):
        assert torch.equal(part, weight.parameter)


def test_unflatten_is_the_inverse_of_flatten_as_a_view() -> None:
    for weight in claim(Layouts()):
        flat = weight.flatten(weight.parameter.detach()).clone()
        view = weight.unflatten(flat)
        assert torch.equal(view, weight.parameter)
        assert view.data_ptr() == flat.data_ptr()


def test_applying_masks_zeroes_the_pruned_weights_of_every_layout_and_no_other() -> None:
    group = claim(Layouts())
    randomize(group)
    before = [weight.parameter.detach().clone() for weight in group]
    group.apply_()
    for weight, dense in zip(group, before, strict=True):
        assert torch.equal(weight.parameter, dense.where(weight.mask, 0.0))


def test_masks_of_weights_that_are_slices_of_a_larger_tensor_work() -> None:
    module = nn.Linear(4, 3, bias=False)
    whole = torch.ones(3, 8)
    module.weight = nn.Parameter(whole[:, ::2])
    group = claim(module)
    randomize(group)
    group.apply_()
    assert torch.equal(module.weight, group[0].mask.float())
    assert (whole[:, 1::2] == 1).all()


def test_a_weight_without_a_gradient_has_a_gradient_of_zeros() -> None:
    module = two_layers()
    group = claim(module)
    assert torch.equal(group[0].grad, torch.zeros(3, 4))
    module["a"].weight.grad = torch.ones(3, 4)
    assert group[0].grad is module["a"].weight.grad


def test_rows_of_a_weight_are_those_of_its_layer() -> None:
    module = nn.ConvTranspose2d(4, 6, 3, groups=2)
    (weight,) = claim(module)
    assert weight.rows(weight.mask).shape == (6, 18)


# Checkpoints


def test_packed_masks_load_into_another_copy_of_the_module() -> None:
    group, other = claim(Layouts()), claim(Layouts())
    randomize(group)
    group[0].budget, group.updated_at = 7, 42
    other.load_(group.packed())
    assert all(torch.equal(old.mask, new.mask) for old, new in zip(group, other, strict=True))
    assert other.updated_at == 42
    assert other[0].budget == 7
    assert [weight.num_active for weight in other] == [weight.num_active for weight in group]


def test_packed_masks_do_not_depend_on_the_order_in_memory() -> None:
    plain, last = nn.Conv2d(3, 5, 2), nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
    group, other = claim(plain), claim(last)
    randomize(group)
    other.load_(group.packed())
    assert torch.equal(group[0].mask, other[0].mask)


def test_loading_keeps_the_masks_views_of_the_flat_mask() -> None:
    group, other = claim(two_layers()), claim(two_layers())
    randomize(group)
    other.load_(group.packed())
    assert torch.equal(other.mask, group.mask)


def test_packed_masks_load_as_weights_only(tmp_path: Path) -> None:
    group = claim(two_layers())
    randomize(group)
    torch.save(group.packed(), tmp_path / "masks.pt")
    loaded = torch.load(tmp_path / "masks.pt", weights_only=True)
    other = claim(two_layers())
    other.load_(loaded)
    assert torch.equal(other.mask, group.mask)


def test_a_packed_mask_takes_one_bit_a_weight() -> None:
    group = claim(nn.Linear(64, 64, bias=False))
    assert group.packed()["weight"]["bits"].untyped_storage().nbytes() == 64 * 64 // 8


def test_packed_masks_do_not_change_with_the_masks() -> None:
    group = claim(two_layers())
    packed = group.packed()
    group.mask.zero_()
    assert packed["a.weight"]["bits"].tolist() == [255, 15]


Packed = dict[str, Any]


def without_name(packed: Packed) -> None:
    del packed["b.weight"]


def of_another_shape(packed: Packed) -> None:
    packed["b.weight"]["shape"] = [3, 2]


def cut_bits(packed: Packed) -> None:
    packed["b.weight"]["bits"] = torch.zeros(0, dtype=torch.uint8)


def bits_of_another_dtype(packed: Packed) -> None:
    packed["b.weight"]["bits"] = packed["b.weight"]["bits"].float()


def no_bits(packed: Packed) -> None:
    packed["b.weight"]["bits"] = None


def without(key: str) -> Callable[[Packed], None]:
    def spoil(packed: Packed) -> None:
        del packed["b.weight"][key]

    spoil.__name__ = f"without_{key}"
    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        without_name,
        of_another_shape,
        cut_bits,
        bits_of_another_dtype,
        no_bits,
        without("shape"),
        without("bits"),
        without("budget"),
        without("updated_at"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_name_and_none_is_taken(spoil: Callable[[Packed], None]) -> None:
    group, other = claim(two_layers()), claim(two_layers())
    randomize(group)
    packed: Packed = group.packed()
    spoil(packed)
    with pytest.raises(MisconfigurationException, match=r"b\.weight"):
        other.load_(packed)
    assert other.mask.all()
    assert (other[0].budget, other.updated_at) == (12, -1)


def test_a_checkpoint_of_more_masks_than_asked_for_is_taken() -> None:
    module = two_layers()
    group, other = claim(module), claim(two_layers(), include=["a.*"])
    randomize(group)
    other.load_(group.packed())
    assert torch.equal(other[0].mask, group[0].mask)


def trained(module: nn.Linear) -> nn.Linear:
    """The module as a training leaves it: the first of its two weights is pruned, and the registry forgotten."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (group,) = MaskRegistry.of(module).claim("method", select_weights(module).masked, [optimizer])
    group.mask[0] = False
    group.apply_()
    MaskRegistry.forget(module)
    return module


def test_a_module_is_found_to_have_a_registry_only_in_training() -> None:
    module = nn.Linear(2, 1)
    assert MaskRegistry.find(module) is None
    registry = MaskRegistry.of(module)
    assert MaskRegistry.find(module) is registry
    MaskRegistry.forget(module)
    assert MaskRegistry.find(module) is None


def test_the_masks_that_a_training_has_left_are_remembered() -> None:
    module = trained(nn.Linear(2, 1))
    MaskRegistry.of(module)
    MaskRegistry.forget(module)  # a training that was refused had no masks, and left none
    assert {name: mask.tolist() for name, mask in MaskRegistry.left_in(module).items()} == {"weight": [[False, True]]}
    assert MaskRegistry.left_in(nn.Linear(2, 1)) == {}


def test_masks_are_no_longer_those_of_a_module_whose_pruned_weights_have_moved() -> None:
    module = trained(nn.Linear(2, 1))
    with torch.no_grad():
        module.weight[0, 0] = 1.0
    assert MaskRegistry.left_in(module) == {}


def test_masks_are_no_longer_those_of_a_module_whose_layer_was_replaced() -> None:
    module = trained(nn.Linear(2, 1))
    module.weight = nn.Parameter(torch.zeros(1, 20))
    assert MaskRegistry.left_in(module) == {}
