from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sparse.functional import kth_smallest, largest, masks, pack, smallest, unpack, zero_pruned_
from lightning_sparse.functional import selection as selecting
from lightning_sparse.functional.masks import awake, row_counts

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BYTE_FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2]
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Few distinct values, so that ties are the rule; each is exact in every dtype.
SCORE = st.sampled_from([-math.inf, -300.0, -1.0, -0.0, 0.0, 2.0**-14, 0.5, 1.0, 256.0, math.inf])


def choose_by_sorting(scores: Tensor, k: int, among: Tensor, sign: int = 1) -> list[int]:
    flat, eligible = scores.flatten().tolist(), among.flatten().tolist()
    return sorted(sorted((i for i in range(len(flat)) if eligible[i]), key=lambda i: (sign * flat[i], i))[:k])


def indices(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().squeeze(1).tolist()


def everything(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


@st.composite
def selections(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Scores, the eligible ones, and how many to choose."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    size = rows * columns
    scores = torch.tensor(draw(st.lists(SCORE, min_size=size, max_size=size)), dtype=draw(st.sampled_from(FLOATS)))
    among = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    k = draw(st.integers(0, int(among.sum())))
    return scores.view(rows, columns), among.view(rows, columns), k


@given(selections())
def test_smallest_is_what_sorting_by_score_and_index_chooses(selection: tuple[Tensor, Tensor, int]) -> None:
    scores, among, k = selection
    chosen = smallest(scores, k, among)
    assert (chosen.dtype, chosen.shape) == (torch.bool, scores.shape)
    assert indices(chosen) == choose_by_sorting(scores, k, among)


@given(selections())
def test_largest_is_what_sorting_by_falling_score_and_index_chooses(selection: tuple[Tensor, Tensor, int]) -> None:
    scores, among, k = selection
    assert indices(largest(scores, k, among)) == choose_by_sorting(scores, k, among, sign=-1)


@pytest.fixture
def _in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a handful of entries as a large tensor is treated: sampled, and looked at four at a time."""
    for name, value in (("_LARGE", 0), ("_CHUNK", 4), ("_SAMPLE", 6)):
        monkeypatch.setattr(selecting, name, value)


@pytest.mark.usefixtures("_in_parts")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(selections())
def test_a_selection_in_parts_is_what_sorting_chooses(selection: tuple[Tensor, Tensor, int]) -> None:
    scores, among, k = selection
    assert indices(smallest(scores, k, among)) == choose_by_sorting(scores, k, among)
    assert indices(largest(scores, k, among)) == choose_by_sorting(scores, k, among, sign=-1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share_of_them", [0.0001, 0.3, 0.9, 1.0])
def test_a_selection_among_many_is_that_without_a_sample(
    dtype: torch.dtype, share_of_them: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(400_000, generator=generator).to(dtype)  # a half has many ties here
    scores[::1000] = torch.nan
    scores[1::1000] = -torch.inf
    among = torch.rand(400_000, generator=generator) < 0.4
    k = int(share_of_them * int((among & ~scores.isnan()).sum()))
    in_parts = smallest(scores, k, among), smallest(scores, k, among, key=torch.abs)
    monkeypatch.setattr(selecting, "_LARGE", 1 << 40)
    assert torch.equal(in_parts[0], smallest(scores, k, among))
    assert torch.equal(in_parts[1], smallest(scores.abs(), k, among))


@pytest.mark.parametrize("in_pieces", [False, True])
@given(selections(), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_several_tensors_are_ranked_as_one(
    in_pieces: bool, selection: tuple[Tensor, Tensor, int], data: st.DataObject
) -> None:
    scores, among, k = selection[0].flatten(), selection[1].flatten(), selection[2]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(scores)), max_size=6)))
    parts = [scores[first:last] for first, last in pairwise([0, *cuts, len(scores)])]
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (("_LARGE", 0), ("_CHUNK", 4), ("_SAMPLE", 6)) if in_pieces else ():
            patched.setattr(selecting, name, value)
        assert indices(smallest(parts, k, among)) == choose_by_sorting(scores, k, among)
        assert indices(largest(parts, k, among)) == choose_by_sorting(scores, k, among, sign=-1)


@pytest.mark.parametrize("eligible", [0.9, 0.05])
def test_many_tensors_of_all_sizes_are_ranked_as_one(eligible: float) -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(900_000, generator=generator).mul(1000).round()
    among = torch.rand(900_000, generator=generator) < eligible
    parts = scores.split([1, 70_000, 50_000, 10, 300_000, 0, 131_072, 131_073, 65_536, 65_537, 86_771])
    k = int(among.sum()) // 3
    assert torch.equal(smallest(parts, k, among, key=torch.abs), smallest(scores, k, among, key=torch.abs))


def test_a_sample_that_misleads_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "_bracket", lambda *_, **__: (5.0, 6.0))
    scores = torch.arange(400_000.0)
    assert torch.equal(smallest(scores, 1000, scores >= 0), scores < 1000)


@given(selections())
def test_selection_leaves_its_arguments_as_they_were(selection: tuple[Tensor, Tensor, int]) -> None:
    scores, among, k = selection
    before = scores.clone(), among.clone()
    smallest(scores, k, among)
    assert torch.equal(scores, before[0])
    assert torch.equal(among, before[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 500, 4_999])
def test_exactly_k_of_thousands_are_chosen_in_every_dtype(dtype: torch.dtype, k: int) -> None:
    scores = torch.randn(5_000, generator=torch.Generator().manual_seed(k)).to(dtype)  # a half has many ties here
    assert int(smallest(scores, k, everything(scores)).sum()) == k


def test_equal_scores_are_taken_in_the_order_of_indices() -> None:
    assert indices(smallest(torch.zeros(3, 4), 5, everything(torch.zeros(3, 4)))) == [0, 1, 2, 3, 4]


def test_order_of_ties_is_that_of_indices_whatever_the_strides() -> None:
    scores = torch.zeros(3, 4).t()
    assert indices(smallest(scores, 4, everything(scores))) == [0, 1, 2, 3]


def test_infinite_scores_of_eligible_entries_are_chosen_before_ineligible_ones() -> None:
    scores = torch.tensor([math.inf, 1.0, math.inf])
    assert indices(smallest(scores, 2, torch.tensor([False, True, True]))) == [1, 2]


def test_scores_that_require_grad_can_be_ranked() -> None:
    scores = torch.tensor([2.0, 1.0], requires_grad=True)
    assert indices(smallest(scores, 1, everything(scores))) == [1]


@pytest.mark.parametrize("select", [smallest, largest])
def test_choosing_none_gives_an_empty_mask(select: Callable[[Tensor, int, Tensor], Tensor]) -> None:
    assert not select(torch.ones(2, 3), 0, everything(torch.ones(2, 3))).any()


@pytest.mark.parametrize("select", [smallest, largest])
def test_choosing_all_gives_the_eligible_ones(select: Callable[[Tensor, int, Tensor], Tensor]) -> None:
    among = torch.tensor([True, False, True])
    assert torch.equal(select(torch.tensor([1.0, 2.0, 3.0]), 2, among), among)


@pytest.mark.parametrize(("k", "eligible"), [(3, 2), (4, 2), (1, 0), (100, 4)])
def test_choosing_more_than_are_eligible_says_how_many_there_are(k: int, eligible: int) -> None:
    among = torch.arange(4) < eligible
    with pytest.raises(ValueError, match=f"Cannot choose {k} entries: only {eligible} are eligible"):
        smallest(torch.zeros(4), k, among)


def test_choosing_from_nothing_says_that_none_is_eligible() -> None:
    with pytest.raises(ValueError, match="Cannot choose 1 entries: only 0 are eligible"):
        smallest(torch.zeros(0), 1, torch.zeros(0, dtype=torch.bool))


def test_nan_scores_are_the_last_to_be_chosen() -> None:
    scores = torch.tensor([math.nan, 1.0, math.nan, 0.0])
    assert indices(smallest(scores, 2, everything(scores))) == [1, 3]


def test_choosing_more_than_have_a_score_says_that_the_others_are_nan() -> None:
    scores = torch.tensor([1.0, math.nan, math.nan])
    with pytest.raises(ValueError, match="NaN"):
        smallest(scores, 2, everything(scores))


@pytest.mark.parametrize("k", [-1, -7])
def test_a_negative_number_of_choices_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"{k}.*at least 0"):
        smallest(torch.zeros(4), k, everything(torch.zeros(4)))


@given(st.lists(SCORE, min_size=1, max_size=30), st.data())
def test_kth_smallest_is_the_kth_of_the_sorted_values(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    kth = kth_smallest(torch.tensor(values), k)
    assert kth.shape == ()
    assert kth.item() == sorted(values)[k - 1]


def test_kth_smallest_leaves_its_values_in_their_order() -> None:
    values = torch.tensor([3.0, 1.0, 2.0])
    kth_smallest(values, 1)
    assert values.tolist() == [3.0, 1.0, 2.0]


def test_kth_smallest_counts_nan_as_larger_than_everything() -> None:
    values = torch.tensor([math.nan, math.inf, 0.0])
    assert [kth_smallest(values, k).item() for k in (1, 2)] == [0.0, math.inf]
    assert kth_smallest(values, 3).isnan()


@pytest.mark.parametrize("k", [0, -1, 4])
def test_a_rank_that_does_not_exist_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, .* ranks 1 to 3"):
        kth_smallest(torch.zeros(3), k)


# zero_pruned_: every bit pattern of a float, in every layout.


def plain(bits: Tensor) -> Tensor:
    return bits.clone()


def channels_last(bits: Tensor) -> Tensor:
    return bits.contiguous(memory_format=torch.channels_last)


def transposed(bits: Tensor) -> Tensor:
    return bits.transpose(0, 1).contiguous().transpose(0, 1)


def with_gaps(bits: Tensor) -> Tensor:
    return torch.stack([bits, torch.full_like(bits, 7)], dim=-1)[..., 0]


LAYOUTS: list[Callable[[Tensor], Tensor]] = [plain, channels_last, transposed, with_gaps]
SMALL, LARGE = (6, 4, 3, 3), (150, 100, 3, 3)  # 216 and 135,000 entries: below and above a chunk of 131,072


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Integers whose bits, read as ``dtype``, are any float: NaN with payloads, inf, -0.0, denormals."""
    integer = INTEGER[dtype.itemsize]
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, shape, generator=generator, dtype=integer)
    special = torch.tensor([0.0, -0.0, math.nan, 1.0]).to(dtype).view(integer)
    bits.flatten()[: len(special)] = special
    return bits


def random_mask(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.fixture
def _counted_as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_MANY", 0)
    monkeypatch.setattr(masks, "_NARROW", 8)
    monkeypatch.setattr(masks, "_WIDE", 5_000)


@pytest.mark.usefixtures("_counted_as_if_large")
@pytest.mark.parametrize("width", [0, 1, 7, 8, 9, 2040, 2041, 2048, 5003])
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_counts_of_rows_are_their_sums_wherever_they_lie(rows: int, width: int, density: float) -> None:
    memory = torch.rand(rows * width + 3, generator=torch.Generator().manual_seed(0)) < density
    for start in (0, 1, 3):
        mask = memory[start : start + rows * width].view(rows, width)
        one = memory[:1].expand(rows, 24)
        for view in (mask, mask.t(), mask.t()[:1], mask[:, ::2], mask[:, 1:], mask[::2], one):
            assert row_counts(view).equal(view.sum(dim=1))


def test_counts_of_rows_of_large_masks_are_their_sums() -> None:
    for shape in ((2_000, 300), (5_000, 64), (30, 10_000), (20_000, 20)):
        mask = random_mask(shape)
        assert row_counts(mask).equal(mask.sum(dim=1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_awake_is_pruned_and_not_zero(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, -0.0], [math.nan, math.nan, -math.inf, 1e-7]], dtype=dtype)
    mask = torch.tensor([[True, False, True, False], [True, False, False, False]])
    expected = torch.tensor([[False, True, False, False], [False, True, True, True]])
    assert awake(weight, mask).equal(expected)
    assert awake(weight.t(), mask.t()).equal(expected.t())
    assert awake(weight[1, 1], mask[1, 1])
    assert awake(weight[:, :0], mask[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [*FLOATS, *BYTE_FLOATS])
def test_pruned_entries_become_zero_and_active_ones_keep_every_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    bits, mask = random_bits(shape, dtype), random_mask(shape)
    tensor = bits.clone().view(dtype)
    assert zero_pruned_(tensor, mask) is tensor
    assert torch.equal(tensor.view(bits.dtype), bits.where(mask, 0))


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("of_mask", LAYOUTS)
@pytest.mark.parametrize("of_tensor", LAYOUTS)
def test_zeroing_is_the_same_for_all_strides_of_tensor_and_mask(
    of_tensor: Callable[[Tensor], Tensor], of_mask: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    bits, mask = random_bits(shape, torch.float32), random_mask(shape)
    tensor = of_tensor(bits).view(torch.float32)
    zero_pruned_(tensor, of_mask(mask))
    assert torch.equal(tensor.view(torch.int32), bits.where(mask, 0))


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_zeroing_a_slice_leaves_what_lies_between_alone(shape: tuple[int, ...]) -> None:
    whole = torch.full((*shape, 2), 7.0)
    zero_pruned_(whole[..., 0], torch.zeros(shape, dtype=torch.bool))
    assert not whole[..., 0].any()
    assert (whole[..., 1] == 7.0).all()


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_zeroing_a_slice_of_rows_leaves_the_other_rows_alone(shape: tuple[int, ...]) -> None:
    whole = torch.full((shape[0] + 2, *shape[1:]), 7.0)
    zero_pruned_(whole[1:-1], torch.zeros(shape, dtype=torch.bool))
    assert not whole[1:-1].any()
    assert (whole[[0, -1]] == 7.0).all()


@pytest.mark.parametrize("numel", [(1 << 17) - 1, 1 << 17, (1 << 17) + 1, (1 << 18) + 3])
def test_no_entry_is_forgotten_at_the_end_of_a_chunk(numel: int) -> None:
    tensor, mask = torch.ones(numel), random_mask((numel,))
    assert torch.equal(zero_pruned_(tensor, mask), mask.float())


def test_depthwise_filters_in_channels_last_are_zeroed() -> None:
    tensor = torch.ones(1 << 14, 1, 3, 3).to(memory_format=torch.channels_last)
    mask = random_mask(tuple(tensor.shape))
    assert torch.equal(zero_pruned_(tensor, mask), mask.float())


def test_pruned_nan_and_inf_become_positive_zero() -> None:
    tensor = torch.tensor([math.nan, math.inf, -math.inf, -0.0, -1.0])
    zero_pruned_(tensor, torch.zeros(5, dtype=torch.bool))
    assert tensor.view(torch.int32).tolist() == [0] * 5


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (1, 1, 1, 1)])
def test_zeroing_works_on_degenerate_shapes(shape: tuple[int, ...]) -> None:
    assert not zero_pruned_(torch.ones(shape), torch.zeros(shape, dtype=torch.bool)).any()


def test_a_parameter_is_zeroed_without_a_trace_in_autograd() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        zero_pruned_(parameter, torch.tensor([True, False, True]))
    assert (parameter.tolist(), parameter.grad_fn, parameter.is_leaf) == ([1.0, 0.0, 1.0], None, True)


def test_zeroing_a_weight_that_backward_needs_is_noticed_by_autograd() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight.sin()).sum()
    with torch.no_grad():
        zero_pruned_(weight, torch.tensor([True, False, True]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# pack and unpack


@given(st.lists(st.booleans(), max_size=40))
def test_unpacking_gives_the_mask_that_was_packed(entries: list[bool]) -> None:
    mask = torch.tensor(entries, dtype=torch.bool)
    packed = pack(mask)
    assert (packed.dtype, packed.numel()) == (torch.uint8, math.ceil(len(entries) / 8))
    assert torch.equal(unpack(packed, mask.shape), mask)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_any_shape_survives_packing(shape: list[int]) -> None:
    mask = random_mask(tuple(shape))
    assert torch.equal(unpack(pack(mask), tuple(shape)), mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_depends_on_the_values_and_not_on_the_strides(layout: Callable[[Tensor], Tensor]) -> None:
    mask = random_mask(SMALL)
    assert torch.equal(pack(layout(mask)), pack(mask))


def test_the_first_entry_is_the_lowest_bit() -> None:
    mask = torch.tensor([True] + 7 * [False] + [False, True])
    assert pack(mask).tolist() == [1, 2]


def test_packing_does_not_share_memory_with_the_mask() -> None:
    mask = torch.ones(8, dtype=torch.bool)
    packed = pack(mask)
    mask.zero_()
    assert packed.tolist() == [255]


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.int8),
        torch.zeros(2, 1, dtype=torch.uint8),
    ],
    ids=["cut short", "too long", "another dtype", "another rank"],
)
def test_bits_that_are_no_mask_of_the_shape_are_refused(packed: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 3\) is packed into 2 bytes"):
        unpack(packed, (3, 3))
