"""Masks written to files and read again."""

from __future__ import annotations

import json
import string
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_sparse import GMP, MaskRegistry, SparsityMonitor, load_masks, save_masks
from lightning_sparse.masks import CheckpointError, read_masks, select_weights
from tests.helpers import ToyModel, make_trainer
from tests.methods.spies import masks_of

NAMES = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=20)
SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=4)


@st.composite
def masks(draw: st.DrawFn) -> dict[str, Tensor]:
    shapes = draw(st.dictionaries(NAMES, SHAPES, min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return {name: torch.rand(shape, generator=generator) < 0.3 for name, shape in shapes.items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, mask in first.items():
        assert mask.dtype == second[name].dtype == torch.bool
        assert mask.shape == second[name].shape
        assert torch.equal(mask, second[name])


@given(masks())
def test_what_is_read_is_what_was_written(written: dict[str, Tensor]) -> None:
    with TemporaryDirectory() as folder:
        save_masks(f"{folder}/masks", written)
        assert_same(load_masks(f"{folder}/masks"), written)
        assert_same(read_masks(f"{folder}/masks"), written)


def test_a_mask_takes_one_bit_a_weight(tmp_path: Path) -> None:
    save_masks(tmp_path / "masks", {"weight": torch.ones(1000, 80, dtype=torch.bool)})
    assert (tmp_path / "masks").stat().st_size < 10_000 + 500
    assert load_file(tmp_path / "masks")["weight"].dtype == torch.uint8


def test_a_mask_that_is_no_contiguous_tensor_is_written_by_its_entries(tmp_path: Path) -> None:
    mask = (torch.arange(24) % 5 == 0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    save_masks(tmp_path / "masks", {"conv.weight": mask})
    assert_same(load_masks(tmp_path / "masks"), {"conv.weight": mask})


@pytest.fixture
def trained(tmp_path: Path) -> tuple[GMP, ToyModel]:
    method, model = GMP(0.8, update_every=1, stop=3), ToyModel()
    trainer = make_trainer(tmp_path, callbacks=[method], max_epochs=1)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "gmp.ckpt")
    return method, model


def test_a_callback_a_registry_and_a_module_are_written_alike(trained: tuple[GMP, ToyModel], tmp_path: Path) -> None:
    method, model = trained
    for source in (method, method.registry, model, model.requires_grad_(False)):
        save_masks(tmp_path / "masks", source)
        assert_same(load_masks(tmp_path / "masks"), masks_of(method))


def test_of_a_module_in_training_the_masks_are_written_and_not_the_zeros(tmp_path: Path) -> None:
    module = nn.Linear(2, 2, bias=False)
    (group,) = MaskRegistry.of(module).claim(
        "method", select_weights(module).masked, [torch.optim.SGD(module.parameters(), lr=0.1)]
    )
    nn.init.zeros_(module.weight)
    group.mask[1:] = False
    save_masks(tmp_path / "masks", module)
    assert load_masks(tmp_path / "masks")["weight"].tolist() == [[True, False], [False, False]]


def test_masks_are_read_from_a_checkpoint_too(trained: tuple[GMP, ToyModel], tmp_path: Path) -> None:
    assert_same(read_masks(tmp_path / "gmp.ckpt"), masks_of(trained[0]))


def test_a_checkpoint_without_masks_gives_its_zeros(tmp_path: Path) -> None:
    state = {"_orig_mod.fc.weight": torch.eye(3), "dense": torch.ones(2, 2), "bias": torch.zeros(3)}
    torch.save({"state_dict": state, "callbacks": {"EarlyStopping": {"patience": 3}}}, tmp_path / "eye.ckpt")
    assert_same(read_masks(tmp_path / "eye.ckpt"), {"fc.weight": torch.eye(3) != 0})


def test_a_callback_without_masks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no mask to write .* from the start of its training on"):
        save_masks(tmp_path / "masks", GMP(0.5))


def test_swapped_arguments_are_an_error_that_says_their_order(tmp_path: Path) -> None:
    swapped: Any = (GMP(0.5), tmp_path / "masks")
    with pytest.raises(TypeError, match=r'as in save_masks\("sparse\.masks", method\).*the path is a GMP'):
        save_masks(*swapped)


def test_what_has_no_masks_is_an_error_that_says_what_has_some(tmp_path: Path) -> None:
    monitor: Any = SparsityMonitor()
    with pytest.raises(TypeError, match=r"a method such as FGGP, its registry.* is a SparsityMonitor"):
        save_masks(tmp_path / "masks", monitor)


def test_what_is_no_mask_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mask of weight is torch\.float32; give a tensor of torch\.bool"):
        save_masks(tmp_path / "masks", {"weight": torch.eye(2)})


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (1, r"no tensor but of type int; give a tensor of torch\.bool, True = active, of the weight's shape"),
        (None, r"no tensor but of type NoneType; give a tensor of torch\.bool"),
        ([True], r"no tensor but of type list; give a tensor of torch\.bool"),
        (np.eye(2) != 0, r"no tensor but of type ndarray; .*, as in `torch\.as_tensor\(mask\) != 0`\."),
        (np.eye(2), r"no tensor but of type ndarray; .*, as in `torch\.as_tensor\(mask\) != 0`\."),
    ],
)
def test_what_is_no_tensor_is_not_written(mask: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"The mask of weight is {sentence}"):
        save_masks(tmp_path / "masks", {"weight": mask})
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("read", [load_masks, read_masks])
def test_a_missing_file_and_a_folder_are_errors(read: object, tmp_path: Path) -> None:
    assert callable(read)
    with pytest.raises(CheckpointError, match=r"There is no file .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a folder; give the file itself"):
        read(tmp_path)


@pytest.mark.parametrize("size", [9, 40, -1])
def test_a_truncated_file_is_an_error_that_names_it(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file.masks"
    save_masks(path, {"weight": torch.eye(20) != 0})
    path.write_bytes(path.read_bytes()[:size])
    for read in (load_masks, read_masks):
        with pytest.raises(CheckpointError, match=r"file\.masks is damaged or is not a file of masks"):
            read(path)


def damaged(path: Path, key: str, value: str) -> None:
    shapes = json.dumps({"weight": [2, 4]})
    metadata = {"format": "lightning_sparse.masks", "version": "1", "shapes": shapes} | {key: value}
    save_file({"weight": torch.tensor([3], dtype=torch.uint8)}, path, metadata)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("format", "pt", "holds tensors in the safetensors format, but no masks"),
        ("version", "3", "was written in version 3 .* Upgrade lightning-sparse"),
        ("shapes", "{", "its masks do not fit their shapes"),
        ("shapes", "[]", "its masks do not fit their shapes"),
        ("shapes", '{"weight": [2, 5]}', "packed into 2 bytes"),
        ("shapes", '{"weight": [-2, -4]}', "its masks do not fit their shapes"),
        ("shapes", '{"weight": 8}', "its masks do not fit their shapes"),
        ("shapes", '{"other": [2, 4]}', r"shapes of other and masks of weight\."),
    ],
)
def test_a_file_with_wrong_metadata_is_an_error(key: str, value: str, sentence: str, tmp_path: Path) -> None:
    damaged(tmp_path / "file.masks", key, value)
    with pytest.raises(CheckpointError, match=sentence):
        load_masks(tmp_path / "file.masks")


def test_the_file_of_the_table_above_is_right_where_nothing_is_damaged(tmp_path: Path) -> None:
    damaged(tmp_path / "file.masks", "version", "1")
    assert load_masks(tmp_path / "file.masks")["weight"].tolist() == [[True, True, False, False], [False] * 4]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"{}"])
def test_a_file_that_is_neither_is_an_error_that_says_both(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged or is not a checkpoint.* It is not a file of masks"):
        read_masks(tmp_path / "file")


def test_a_dense_checkpoint_is_an_error(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "dense.pt")
    with pytest.raises(CheckpointError, match="is dense: no method has saved masks"):
        read_masks(tmp_path / "dense.pt")


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.network."])
def test_weights_under_other_names_are_an_error_that_shows_both(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "eye.pt"
    torch.save({f"{prefix}{index}.weight": torch.eye(2) for index in range(6)}, path)
    shown = (
        rf"asked for, which are 0\.weight, 1\.weight; it has {prefix}0\.weight, .*{prefix}3\.weight and 2 more\. Give"
    )
    with pytest.raises(CheckpointError, match=shown):
        read_masks(path, names=(f"{index}.weight" for index in range(2)))


def test_names_that_the_file_does_not_have_are_left_out(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.eye(2)}, tmp_path / "eye.pt")
    assert_same(read_masks(tmp_path / "eye.pt", names=["fc.weight", "head.weight"]), {"fc.weight": torch.eye(2) != 0})


def test_a_checkpoint_whose_mask_is_cut_short_is_an_error(trained: tuple[GMP, ToyModel], tmp_path: Path) -> None:
    checkpoint = torch.load(tmp_path / "gmp.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    state["masks"]["network.0.weight"]["bits"] = state["masks"]["network.0.weight"]["bits"][:-1]
    torch.save(checkpoint, tmp_path / "cut.ckpt")
    with pytest.raises(CheckpointError, match=r"mask of network\.0\.weight in .*cut\.ckpt cannot be read"):
        read_masks(tmp_path / "cut.ckpt")
