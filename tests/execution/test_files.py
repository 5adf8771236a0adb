from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_sparse import atomic
from lightning_sparse.execution import SparseFileError, load_sparse, packing, save_sparse
from lightning_sparse.execution.files import is_sparse_file, sparse_nbytes
from lightning_sparse.execution.notes import DTYPES
from tests.execution import sparse_reader
from tests.execution.sparse_reader import read_sparse

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.zeros(0)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(bits(first), bits(second))


def sparse(*shape: int, keep: float = 0.05, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Any pattern of bits in a share of the places."""
    generator = torch.Generator().manual_seed(seed)
    numel = int(np.prod(shape))
    if dtype == torch.bool:
        return (torch.rand(numel, generator=generator) < keep).view(shape)
    patterns = torch.randint(0, 256, (numel, dtype.itemsize), generator=generator, dtype=torch.uint8)
    patterns[torch.rand(numel, generator=generator) >= keep] = 0
    return patterns.view(dtype).view(shape)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.sparse"


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, keep: float, path: Path) -> None:
    state = {"weight": sparse(40, 50, keep=keep, dtype=dtype), "bias": sparse(7, keep=keep, dtype=dtype)}
    save_sparse(state, path)
    loaded = load_sparse(path)
    assert loaded.keys() == state.keys()
    assert all(same_bits(loaded[name], state[name]) for name in state)
    assert path.stat().st_size <= sum(tensor.nbytes for tensor in state.values()) + 900


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=st_numpy.arrays(
        st.sampled_from([np.int32, np.int64, np.int16, np.uint8]),
        st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=30),
        elements=st.sampled_from([0, 0, 0, 0, 0, 1, 127]),
        fill=st.just(0),
    ),
    transposed=st.booleans(),
)
def test_any_shape_and_pattern_comes_back(array: NDArray[Any], transposed: bool, tmp_path: Path) -> None:
    tensor = torch.from_numpy(array)
    if transposed and tensor.ndim > 1:
        tensor = tensor.transpose(0, 1)  # not contiguous
    as_float = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}.get(array.itemsize, torch.uint8)
    state = {"whole": tensor, "float": tensor.contiguous().view(as_float), "part": tensor.flatten()[1:]}
    save_sparse(state, tmp_path / "any.sparse")
    loaded = load_sparse(tmp_path / "any.sparse")
    assert all(same_bits(loaded[name], state[name]) for name in state)


SPECIAL = [0x80000000, 0x7FC00001, 0xFF800000, 0x7F800000, 0x00000001, 0x7FA12345]  # -0, NaN, -inf, inf, tiny, NaN


@pytest.mark.parametrize("numel", [6, 600, 60_000])
def test_special_values_are_values(numel: int, path: Path) -> None:
    tensor = torch.zeros(numel)
    tensor.view(torch.int32)[:: numel // 6] = torch.tensor(np.array(SPECIAL, np.uint32).view(np.int32))
    save_sparse({"x": tensor}, path)
    assert same_bits(load_sparse(path)["x"], tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_zeros_of_a_product_with_a_mask_keep_their_sign_for_a_bit_each(dtype: torch.dtype, path: Path) -> None:
    weight = torch.randn(100, 1000) * (torch.rand(100, 1000) < 0.05)
    weight = weight.to(dtype)
    assert weight.float().signbit().float().mean() > 0.4  # most of them of zeros
    save_sparse({"x": weight}, path)
    assert same_bits(load_sparse(path)["x"], weight)
    assert path.stat().st_size < 100_000 * (0.06 * (dtype.itemsize + 1) + 0.126) + 1000
    save_sparse({"x": weight}, path, signed_zeros=False)
    loaded = load_sparse(path)["x"].float()
    assert torch.equal(loaded, weight.float())
    assert not loaded.signbit()[loaded == 0].any()


def test_a_few_zeros_with_a_sign_need_no_list_of_their_own(path: Path) -> None:
    weight = sparse(100, 100)
    weight[0, :3] = -0.0
    save_sparse({"x": weight}, path)
    assert not any("minus" in name for name in load_file(path))
    assert same_bits(load_sparse(path)["x"], weight)


def test_the_smallest_form_is_chosen_for_each_tensor(path: Path) -> None:
    state = {"wide": sparse(100_000, keep=1e-4), "gaps": sparse(100_000, keep=0.05), "half": sparse(10_000, keep=0.5)}
    save_sparse(state | {"dense": torch.ones(100), "one": torch.ones(())}, path)
    stored = {name: tensor.dtype for name, tensor in load_file(path).items()}
    assert {name: dtype for name, dtype in stored.items() if not name.endswith("values")} == {
        "wide.gaps": torch.uint16,
        "gaps.gaps": torch.uint8,
        "half.bitmask": torch.uint8,
        "dense": torch.float32,
        "one": torch.float32,
    }
    for name, tensor in state.items():
        assert sparse_nbytes(tensor) == pytest.approx(
            sum(load_file(path)[key].nbytes for key in stored if key.startswith(name)), abs=201
        )


def test_the_documented_reader_reads_it(path: Path) -> None:
    state = {
        "wide": sparse(100_000, keep=1e-4),
        "signed": torch.randn(50, 400) * (torch.rand(50, 400) < 0.1),
        "half": sparse(100, 100, keep=0.5, dtype=torch.complex64),
        "byte": sparse(3, dtype=torch.float8_e5m2),
        "dense": torch.ones(2, 2),
    }
    save_sparse(state | {"tied": state["wide"]}, path)
    loaded = read_sparse(path)
    assert all(same_bits(loaded[name], tensor) for name, tensor in (state | {"tied": state["wide"]}).items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 20)
        self.decoder = nn.Linear(20, 50)
        self.decoder.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(50)
        with torch.no_grad():
            self.decoder.weight.copy_(sparse(50, 20, keep=0.1))


def test_ties_and_buffers_are_kept(path: Path) -> None:
    module = Tied()
    module.norm(torch.randn(4, 50))
    save_sparse(module, path)
    stored = {*load_file(path)}
    assert {"embedding.weight.values", "norm.num_batches_tracked"} <= stored
    assert not any(name.startswith("decoder.weight") for name in stored)
    loaded = load_sparse(path)
    assert loaded["decoder.weight"] is loaded["embedding.weight"]
    other = Tied()
    load_sparse(path, into=other)
    assert all(same_bits(tensor, module.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert other.norm.num_batches_tracked == 1


def test_views_of_one_memory_that_are_not_one_tensor_are_stored_apart(path: Path) -> None:
    base = torch.randn(4, 4)
    state = {"base": base, "transposed": base.T, "part": base[1:], "expanded": torch.ones(1).expand(5, 5)}
    save_sparse(state, path)
    loaded = load_sparse(path)
    assert all(same_bits(loaded[name], state[name]) for name in state)
    assert loaded["transposed"] is not loaded["base"]


def test_names_that_are_taken_are_stored_dense(path: Path) -> None:
    state = {name: sparse(50, 50) for name in ("x", "x.gaps", "x.gaps.values", "x.minus", "y", "y.values.gaps")}
    state["x"].view(torch.int32)[20:, ::2] = -(2**31)
    save_sparse(state, path)
    loaded = load_sparse(path)
    assert loaded.keys() == state.keys()
    assert all(same_bits(loaded[name], state[name]) for name in state)


def test_the_name_of_the_formats_own_notes_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="another name"):
        save_sparse({"__metadata__": torch.eye(3)}, path)
    assert not path.exists()


@pytest.mark.parametrize("dtype", [torch.uint64, torch.float8_e5m2, torch.complex64, torch.bool])
def test_one_value_of_an_expanded_tensor_comes_back(dtype: torch.dtype, path: Path) -> None:
    one = torch.ones(()).to(dtype)
    save_sparse({"one": one.expand(1), "first": one.expand(5)[:1]}, path)
    assert all(bool((value.to(torch.complex64) == 1).all()) for value in load_sparse(path).values())


def test_half_precision_is_for_weights_alone(path: Path) -> None:
    state = {"weight": torch.randn(100, 100) * (torch.rand(100, 100) < 0.05), "bias": torch.randn(100)}
    state |= {"dense": torch.randn(20, 20, dtype=torch.float64), "count": torch.full((2, 2), 70_000)}
    save_sparse(state, path, values="float16", signed_zeros=False)
    loaded = load_sparse(path)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {name: x.dtype for name, x in state.items()}
    assert torch.equal(loaded["weight"], state["weight"].half().float())
    assert torch.equal(loaded["dense"], state["dense"].half().double())
    assert torch.equal(loaded["bias"], state["bias"])
    assert torch.equal(loaded["count"], state["count"])


def test_a_value_too_large_for_half_precision_is_an_error_that_names_it(path: Path) -> None:
    with pytest.raises(
        ValueError, match=r'weight has the value 70000, and the largest float16 is 65504.*values="same"'
    ):
        save_sparse({"weight": torch.full((2, 2), -7e4)}, path, values="float16")
    assert not path.exists()
    save_sparse({"weight": torch.full((2, 2), torch.inf)}, path, values="float16")
    assert load_sparse(path)["weight"].isinf().all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(2).to_sparse(), r"layout torch.sparse_coo; save tensor.to_dense"),
        (lambda: torch.empty(2, device="meta"), "meta device"),
        (lambda: torch.ones(1).expand(10**12), r"expanded, 4,000,000,000,000 bytes of tensor on 4 bytes"),
        (lambda: nn.LazyLinear(2).weight, "not initialised yet; run the module once"),
        (lambda: torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8), "quantised"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_plain_memory_is_refused(make: Callable[[], Tensor], words: str, path: Path) -> None:
    with pytest.raises(ValueError, match=f"x cannot be saved in a sparse file: it .*{words}"):
        save_sparse({"x": make()}, path)


def test_wrong_arguments_are_sentences(path: Path) -> None:
    broken: Any = save_sparse
    with pytest.raises(TypeError, match=r"and then the file.*the path is a Linear"):
        broken(path, nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"what is to be saved is a list"):
        broken([torch.eye(2)], path)
    with pytest.raises(TypeError, match=r'epoch is a int.*checkpoint\["state_dict"\]'):
        broken({"epoch": 3}, path)
    with pytest.raises(TypeError, match="one of the names is 3"):
        broken({3: torch.eye(2)}, path)
    with pytest.raises(ValueError, match="There is nothing to save: the ReLU has no tensor"):
        save_sparse(nn.ReLU(), path)
    with pytest.raises(ValueError, match='it can be "same" or "float16"'):
        broken(nn.Linear(2, 2), path, values="int8")
    save_sparse(nn.Linear(2, 2), path)
    for call in (lambda: load_sparse(path, into=broken), lambda: load_sparse(broken)):
        with pytest.raises(TypeError, match="it is a function"):
            call()


def test_a_file_of_another_module_changes_nothing(path: Path) -> None:
    save_sparse(nn.Linear(3, 3), path)
    for other, words in (
        (nn.Linear(3, 3, bias=False), "Linear has no place for bias"),
        (nn.BatchNorm1d(3), "it lacks num_batches_tracked, running_mean, running_var"),
        (nn.Linear(3, 4), r"bias has the shape \(3,\) there, and \(4,\) in Linear"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(SparseFileError, match=rf"model\.sparse is of another module: {words}"):
            load_sparse(path, into=other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


# Files that are not as they were written.


def test_any_flipped_bit_is_found(path: Path) -> None:
    save_sparse({"x": sparse(20, 30), "y": torch.randn(4)}, path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for bit in {*range(64), *rng.choice(8 * len(content), 400, replace=False).tolist()}:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(SparseFileError) as error:
            load_sparse(path)
        assert str(error.value).isprintable()


def test_any_cut_is_found(path: Path) -> None:
    save_sparse({"x": sparse(20, 30), "y": torch.randn(4)}, path)
    content = path.read_bytes()
    for size in [*range(20), *range(20, len(content), 37)]:
        path.write_bytes(content[:size])
        with pytest.raises(SparseFileError, match=r"model\.sparse is damaged"):
            load_sparse(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(SparseFileError, match=r"model\.sparse is damaged"):
        load_sparse(path)


def forge(path: Path, pieces: dict[str, Tensor], notes: Any, **metadata: str) -> None:
    """A file whose digest is right and whose content somebody has thought out."""
    text = notes if isinstance(notes, str) else json.dumps(notes)
    said = {"format": "lightning_sparse.sparse", "version": "1", "digest": "0" * 64, "sparse": text} | metadata
    save_file(pieces, path, {key: value for key, value in said.items() if value})
    content = bytearray(path.read_bytes())
    digest = hashlib.sha256(content).hexdigest().encode()
    at = content.find(b'"digest":"' + b"0" * 64)
    if at >= 0:
        content[at + 10 : at + 74] = digest
    path.write_bytes(content)


def u8(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


ONE = {"x.gaps": u8(1, 2), "x.values": torch.ones(1)}
NOTES = {"dtype": "float32", "shape": [4], "positions": "gaps"}


def test_a_forged_file_that_is_right_is_read(path: Path) -> None:
    forge(path, ONE, {"x": NOTES})
    assert load_sparse(path)["x"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "notes",
    [
        {"x": NOTES | {"shape": [10**15]}},
        {"x": NOTES | {"shape": [2**40, 2**40]}},
        {"x": NOTES | {"shape": [0, 2**62, 2**62]}},
        {"x": NOTES | {"shape": [-4]}},
        {"x": NOTES | {"shape": [-2, -2]}},
        {"x": NOTES | {"shape": [4.0]}},
        {"x": NOTES | {"shape": [True, 4]}},
        {"x": NOTES | {"shape": [[4]]}},
        {"x": NOTES | {"shape": 4}},
        {"x": NOTES | {"shape": [3]}},
        {"x": NOTES | {"shape": [5]}},
        {"x": NOTES | {"dtype": "float33"}},
        {"x": NOTES | {"dtype": ["float32"]}},
        {"x": NOTES | {"dtype": "complex64"}},
        {"x": NOTES | {"dtype": "float64"}},
        {"x": NOTES | {"positions": "bitmask"}},
        {"x": NOTES | {"positions": "runs"}},
        {"x": NOTES | {"minus": "gaps"}},
        {"x": {"dtype": "float32", "shape": [4]}},
        {"x": {"dtype": "float32", "shape": [4], "minus": "gaps"}},
        {"x": {"shape": [4], "positions": "gaps"}},
        {"x": NOTES | {"more": 1}},
        {"x": NOTES, "y": {"same_as": "z"}},
        {"x": NOTES, "y": {"same_as": "y"}},
        {"x": NOTES, "y": {"same_as": "z"}, "z": {"same_as": "x"}},
        {"x": NOTES, "y": NOTES},
        {"x": 3},
        [NOTES],
        "{",
        "[" * 100_000,
        '{"x":' * 100_000,
        "9" * 5000,
    ],
    ids=lambda notes: str(notes)[:60],
)
def test_hostile_notes_are_one_sentence(notes: Any, path: Path) -> None:
    forge(path, ONE, notes)
    with pytest.raises(SparseFileError, match=r"damaged") as error:
        load_sparse(path)
    assert len(str(error.value)) < 400 + len(str(path))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "pieces",
    [
        {"x.gaps": u8(1, 3)},
        {"x.gaps": u8(1, 200)},
        {"x.gaps": u8(4)},
        {"x.gaps": u8(0, 0, 2)},
        {"x.gaps": torch.tensor([1, 2], dtype=torch.int16)},
        {"x.gaps": torch.ones(2, 2, dtype=torch.uint8)},
        {"x.gaps": u8()},
        {"x.values": torch.ones(2)},
        {"x.values": torch.ones(())},
        {"x.values": torch.ones(1, 1)},
        {"x.values": torch.ones(1, dtype=torch.bfloat16)},
        {"x.values": torch.ones(1, 4, dtype=torch.uint8)},
        {"x.gaps": u8(0, 1, 1), "x.values": torch.ones(0)},
    ],
    ids=str,
)
def test_hostile_pieces_are_one_sentence(pieces: dict[str, Tensor], path: Path) -> None:
    forge(path, ONE | pieces, {"x": NOTES})
    with pytest.raises(SparseFileError, match=r"The tensor x of .*model\.sparse is damaged: it"):
        load_sparse(path)


def test_zeros_with_a_sign_do_not_overlap_with_values(path: Path) -> None:
    notes = {"x": NOTES | {"minus": "gaps"}}
    forge(path, ONE | {"x.minus.gaps": u8(0, 0, 2)}, notes)
    with pytest.raises(SparseFileError, match="some of its zeros with a minus sign are where it has other values"):
        load_sparse(path)
    forge(path, ONE | {"x.minus.gaps": u8(0, 3)}, notes)
    assert load_sparse(path)["x"].signbit().tolist() == [True, False, False, False]
    integers = {"x": notes["x"] | {"dtype": "int32"}}
    forge(path, ONE | {"x.values": torch.ones(1).int(), "x.minus.gaps": u8(0, 3)}, integers)
    with pytest.raises(SparseFileError, match="zeros with a minus sign, and int32 has none"):
        load_sparse(path)


def test_a_tensor_is_no_larger_than_its_gaps_say(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kilobyte cannot ask for terabytes: each gap stands for 65536 places at most, and is looked at before."""
    asked: list[int] = []
    zeros = np.zeros
    monkeypatch.setattr(packing.np, "zeros", lambda nbytes, **dtype: asked.append(nbytes) or zeros(nbytes, **dtype))
    save_sparse({"x": torch.empty(1).expand(1_000_000).contiguous().zero_()}, path)
    assert load_sparse(path)["x"].count_nonzero() == 0
    assert asked == [4_000_064]
    forge(path, ONE, {"x": NOTES | {"shape": [2_000_000]}})
    with pytest.raises(SparseFileError, match="its gaps lead to place 4, and it has 2,000,000 places"):
        load_sparse(path)
    assert asked == [4_000_064]


def test_a_tensor_without_memory_for_it_is_a_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise MemoryError

    forge(path, ONE, {"x": NOTES})
    monkeypatch.setattr(packing.np, "zeros", full)
    with pytest.raises(SparseFileError, match=r"x of .* is damaged, or there is no memory for its 16 bytes"):
        load_sparse(path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": "pt"}, r"is in the safetensors format, but is not a sparse file"),
        ({"format": ""}, r"is in the safetensors format, but is not a sparse file"),
        ({"version": "2"}, r"was written in version 2 .* reads version 1\. Upgrade"),
        ({"version": "\x1b[2J"}, r"was written in version \\x1b\[2J"),
        ({"digest": ""}, "is damaged: its digest"),
        ({"digest": "1" * 64}, "is damaged: its digest"),
        ({"digest": "\x1b"}, "is damaged: its digest"),
        ({"sparse": ""}, "is damaged"),
    ],
)
def test_other_headers_are_one_sentence(metadata: dict[str, str], words: str, path: Path) -> None:
    forge(path, ONE, {"x": NOTES}, **metadata)
    with pytest.raises(SparseFileError, match=words):
        load_sparse(path)


def test_foreign_files_are_one_sentence(path: Path, tmp_path: Path) -> None:
    with pytest.raises(SparseFileError, match=r"There is no file .*model\.sparse"):
        load_sparse(path)
    with pytest.raises(SparseFileError, match="is a folder; give the file itself"):
        load_sparse(tmp_path)
    for content in (b"", b"PK\3\4", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{}", os.urandom(200)):
        path.write_bytes(content)
        assert not is_sparse_file(path)
        with pytest.raises(SparseFileError):
            load_sparse(path)
    torch.save({"x": torch.eye(2)}, path)
    with pytest.raises(SparseFileError, match="is damaged or is not a sparse file"):
        load_sparse(path)


def test_names_with_escape_sequences_do_not_reach_the_terminal(path: Path) -> None:
    evil = "fc\x1b[2J\n.weight"
    state = {evil: sparse(30, 30)}
    save_sparse(state, path)
    assert same_bits(load_sparse(path)[evil], state[evil])
    with pytest.raises(SparseFileError) as error:
        load_sparse(path, into=nn.Linear(2, 2))
    assert str(error.value).isprintable()
    with pytest.raises(ValueError, match="meta") as refused:
        save_sparse({evil: torch.empty(1, device="meta")}, path)
    assert str(refused.value).isprintable()


# Writing.


def test_a_file_keeps_its_mode_and_a_link_its_aim(tmp_path: Path) -> None:
    target, link = tmp_path / "target.sparse", tmp_path / "link.sparse"
    save_sparse({"x": torch.ones(2)}, target)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    target.chmod(0o640)
    link.symlink_to(target.name)
    save_sparse({"x": torch.zeros(2)}, link)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert load_sparse(target)["x"].tolist() == [0, 0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.sparse", "target.sparse"]


def test_a_full_disk_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sparse({"x": torch.ones(2)}, path)
    before = path.read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(SparseFileError, match=r"model\.sparse cannot be written: the disk is full"):
        save_sparse({"x": torch.zeros(2)}, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_places_that_cannot_be_written_are_sentences(tmp_path: Path) -> None:
    tensors = {"x": torch.ones(2)}
    with pytest.raises(SparseFileError, match=r"there is no folder .*nowhere\. Make it first"):
        save_sparse(tensors, tmp_path / "nowhere" / "x.sparse")
    with pytest.raises(SparseFileError, match="is a folder"):
        save_sparse(tensors, tmp_path)
    with pytest.raises(SparseFileError, match="cannot be written: its name is too long"):
        save_sparse(tensors, tmp_path / ("x" * 300))


def test_a_device_is_written_to(tmp_path: Path) -> None:
    save_sparse({"x": torch.ones(2)}, os.devnull)
    assert not Path(os.devnull).is_file()


def test_the_file_is_plain_safetensors(path: Path) -> None:
    save_sparse({"x": sparse(30, 30), "y": torch.ones(3)}, path)
    with safe_open(path, framework="np") as file:
        assert {*file.keys()} == {"x.gaps", "x.values", "y"}
        assert file.metadata().keys() == {"format", "version", "digest", "sparse"}


def test_the_reader_of_the_documentation_is_the_one_that_is_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sparse-files.md").read_text(encoding="utf-8")
    reader = Path(sparse_reader.__file__).read_text(encoding="utf-8")
    assert f"```python\n{reader[reader.index('import json') :]}```" in page
