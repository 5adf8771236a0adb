"""Files that are damaged, or made to do harm: refused in words, and before memory is taken for what they claim."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from lightning_sparse import GMP, FixedMask, apply_masks, load_masks, report, save_masks
from lightning_sparse.cli import main
from lightning_sparse.masks import CheckpointError, read_masks
from lightning_sparse.masks.checkpoint import load_checkpoint, masks_by_method, state_dict_of
from lightning_sparse.modules import PhasedReLU
from lightning_sparse.reporting import checkpoint_sparsity
from tests.helpers import ToyModel, make_trainer

_SHAPE = (10**6, 10**6)

Reader = Callable[[Path], Any]
READERS: dict[str, Reader] = {
    "read_masks": read_masks,
    "apply_masks": lambda path: apply_masks(ToyModel(), path),
    "report": report,
    "checkpoint_sparsity": lambda path: checkpoint_sparsity(path, all_tensors=True),
    "FixedMask": lambda path: make_trainer(path.parent, callbacks=[FixedMask(path)]).fit(ToyModel()),
}


@contextlib.contextmanager
def little_memory(gigabytes: int = 8) -> Generator[None]:
    """Let nobody ask for terabytes, whatever the machine would promise."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def expanded(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = _SHAPE) -> Tensor:
    return torch.zeros(1, dtype=dtype).expand(shape)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    trainer = make_trainer(tmp_path, callbacks=[GMP(0.8, update_every=2)], max_epochs=1)
    trainer.fit(ToyModel())
    trainer.save_checkpoint(tmp_path / "gmp.ckpt")
    return tmp_path / "gmp.ckpt"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory as Linux tells it")
@pytest.mark.parametrize("reader", READERS)
def test_weights_that_claim_terabytes_are_refused(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    torch.save({"network.0.weight": expanded(), "network.4.weight": torch.eye(3)}, path)
    assert path.stat().st_size < 3_000
    with (
        little_memory(),
        pytest.raises((CheckpointError, MisconfigurationException), match=r"claims .* entries and stores"),
    ):
        READERS[reader](path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory as Linux tells it")
@pytest.mark.parametrize("reader", ["read_masks", "apply_masks", "report", "FixedMask"])
def test_masks_that_claim_terabytes_are_refused(reader: str, tmp_path: Path) -> None:
    path, bits = tmp_path / "small.ckpt", expanded(torch.uint8, (10**12,))
    saved = {"shape": [8 * 10**6, 10**6], "bits": bits, "budget": 1, "updated_at": 0}
    state = {"step": 1, "masks": {"network.0.weight": saved}, "method": {}}
    torch.save({"state_dict": {"network.0.weight": torch.eye(2)}, "callbacks": {"GMP": state}}, path)
    with little_memory(), pytest.raises(CheckpointError, match="does not store them"):
        READERS[reader](path)


def test_a_name_alone_takes_no_memory_for_a_dynamic_relu() -> None:
    site = PhasedReLU(nn.ReLU(), [4])
    state = site.state_dict() | {"dyrelu.100000.squeeze.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"dyrelu\.100000 is no Dynamic ReLU of reduction 4"):
        site.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"dyrelu\.many is no Dynamic ReLU"):
        site.load_state_dict(site.state_dict() | {"dyrelu.many.squeeze.weight": torch.zeros(1)})
    assert list(site.dyrelu) == ["4"]


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1_000, 1_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in plain.infolist():
            bomb.writestr(record.filename, plain.read(record))
    with pytest.raises(CheckpointError, match=r"would be unpacked from .* does not compress"):
        load_checkpoint(tmp_path / "bomb.pt")


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.eye(2)}, tmp_path / "eye.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_masks(tmp_path / "eye.pt")["weight"].sum() == 2


# Bit flips.


def refuses(reader: Reader, path: Path) -> bool:
    try:
        reader(path)
    except CheckpointError:
        return True
    return False


def flipped(content: bytes, bit: int) -> bytes:
    spoiled = bytearray(content)
    spoiled[bit // 8] ^= 1 << bit % 8
    return bytes(spoiled)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 13])
def test_every_bit_of_a_file_of_masks_counts(step: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(8, 9, generator=generator) < 0.3 for name in ("fc.weight", "head.weight")}
    save_masks(tmp_path / "whole.masks", masks)
    content, path = (tmp_path / "whole.masks").read_bytes(), tmp_path / "flipped.masks"
    accepted: list[int] = []
    for bit in range(0, 8 * len(content), step):
        path.write_bytes(flipped(content, bit))
        if not refuses(load_masks, path):
            accepted.append(bit)
    assert accepted == []


@pytest.mark.parametrize("number", [pytest.param(1_000, marks=pytest.mark.slow), 40])
def test_flipped_bits_in_a_checkpoint_are_refused_or_change_no_mask(number: int, trained: Path) -> None:
    content, path = trained.read_bytes(), trained.with_name("flipped.ckpt")
    whole = read_masks(trained)
    generator = torch.Generator().manual_seed(number)
    for bit in torch.randint(8 * len(content), (number,), generator=generator).tolist():
        path.write_bytes(flipped(content, bit))
        if not refuses(read_masks, path):  # what fills the archive up between its records
            read = read_masks(path)
            assert read.keys() == whole.keys()
            assert all(torch.equal(mask, read[name]) for name, mask in whole.items())


@pytest.mark.parametrize("method", [8, 9, 12, 14, 99], ids=["deflate", "deflate64", "bzip2", "lzma", "none there is"])
def test_a_record_that_claims_to_be_compressed_is_refused(method: int, trained: Path) -> None:
    content, path = bytearray(trained.read_bytes()), trained.with_name("compressed.ckpt")
    with zipfile.ZipFile(trained) as archive:
        offsets = [record.header_offset for record in archive.infolist()]
    entries = [place.start() for place in re.finditer(rb"PK\x01\x02", bytes(content))]
    for place in (*(offset + 8 for offset in offsets), *(entry + 10 for entry in entries)):
        content[place : place + 2] = method.to_bytes(2, "little")
    path.write_bytes(content)
    assert refuses(read_masks, path)


def test_every_flipped_bit_of_the_masks_in_a_checkpoint_is_refused(trained: Path) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    for mask in state["masks"].values():
        for place in range(mask["bits"].numel()):
            for bit in range(8):
                mask["bits"][place] ^= 1 << bit
                with pytest.raises(CheckpointError, match="its digest does not match"):
                    masks_by_method(checkpoint, "flipped.ckpt")
                mask["bits"][place] ^= 1 << bit
    assert masks_by_method(checkpoint, "whole.ckpt")


# What is in none of the forms that are known.


@pytest.mark.parametrize(
    "state",
    [
        {"masks": None},
        {"masks": [1]},
        {"masks": {"w": None}},
        {"masks": {"w": {"shape": None, "bits": None}}},
        {"masks": {"w": {"shape": [2, "x"], "bits": torch.zeros(1, dtype=torch.uint8)}}},
        {"masks": {"w": {"shape": [2**70], "bits": torch.zeros(1, dtype=torch.uint8)}}},
        {"masks": {"w": {"shape": [8], "bits": torch.zeros(1)}}},
        {"masks": {"w": {"shape": [8], "bits": torch.zeros(1, dtype=torch.uint8, device="meta")}}},
        {"masks": {}, "version": 2},
        {"masks": {}, "digest": "0"},
        {"masks": {}, "version": [2], "digest": "0"},
        {"masks": {}, "version": 2, "digest": "0"},
        {"masks": {}, "version": 2, "digest": "0", "method": {"asleep": expanded()}},
    ],
    ids=range(13),
)
def test_a_state_of_another_form_is_refused_in_words(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"bad\.ckpt.*\.$|cannot be read"):
        masks_by_method({"callbacks": {"GMP": {"step": 1, "method": {}, **state}}}, "bad.ckpt")


def test_a_state_that_holds_itself_is_refused() -> None:
    state: dict[str, Any] = {"step": 1, "method": {}, "masks": {}, "version": 2, "digest": "0"}
    state["method"]["again"] = state
    with pytest.raises(CheckpointError, match="levels deep"):
        masks_by_method({"callbacks": {"GMP": state}}, "bad.ckpt")


@pytest.mark.parametrize("checkpoint", [None, 3, [], "x", {}, {1: 2}, {"callbacks": 3}, {"callbacks": {"a": 3}}])
def test_what_holds_no_state_gives_no_masks_and_no_state_dict(checkpoint: Any) -> None:
    assert masks_by_method(checkpoint, "x.ckpt") == {}
    with pytest.raises(CheckpointError, match=r"x\.ckpt holds no state dict"):
        state_dict_of(checkpoint, "x.ckpt")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("layout", ["sparse", "meta", "quantized", "split"])
def test_tensors_without_plain_entries_are_named(layout: str, tmp_path: Path) -> None:
    eye = torch.eye(4)
    tensors: dict[str, dict[str, Any]] = {
        "sparse": {"a.weight": eye.to_sparse()},
        "meta": {"a.weight": eye.to("meta")},
        "quantized": {"a.weight_orig": eye, "a.weight_mask": eye.to_sparse()},
        "split": {"a.weight_orig": eye, "a.weight_mask": torch.ones(3)},
    }
    torch.save(tensors[layout], tmp_path / "odd.pt")
    for reader in (read_masks, report):
        with pytest.raises(CheckpointError, match=r"a\.weight"):
            reader(tmp_path / "odd.pt")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("split", [False, True])
def test_narrow_floats_are_weights_like_others(dtype: torch.dtype, split: bool, tmp_path: Path) -> None:
    weight = torch.eye(4).to(dtype)
    state = {"fc.weight_orig": weight, "fc.weight_mask": torch.eye(4)} if split else {"fc.weight": weight}
    torch.save(state, tmp_path / "narrow.pt")
    assert torch.equal(read_masks(tmp_path / "narrow.pt")["fc.weight"], torch.eye(4) != 0)
    assert report(tmp_path / "narrow.pt").num_active == 4


# Files of masks.


def written(path: Path, **metadata: str) -> Path:
    whole = {"format": "lightning_sparse.masks", "version": "1", "shapes": "{}"}
    path.write_bytes(save({}, whole | metadata))
    return path


def test_a_file_of_masks_without_any_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "empty.masks")
    with pytest.raises(CheckpointError, match=r"empty\.masks holds no masks"):
        load_masks(path)
    assert main(["masks", "compare", str(path), str(path)]) == 2
    assert "holds no masks" in capsys.readouterr().err


def test_masks_of_empty_weights_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_masks(tmp_path / "a.masks", {"w": torch.zeros(0, 3, dtype=torch.bool)})
    assert main(["masks", "compare", str(tmp_path / "a.masks"), str(tmp_path / "a.masks")]) == 0
    assert "w" in capsys.readouterr().out


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    shapes = json.dumps({"w": [2, 4]})
    metadata = {"format": "lightning_sparse.masks", "version": "1", "shapes": shapes}
    save_file({"w": torch.tensor([3], dtype=torch.uint8)}, tmp_path / "old.masks", metadata)
    assert load_masks(tmp_path / "old.masks")["w"].sum() == 2


@pytest.mark.parametrize("shape", ["[4294967296, 4294967296]", "[1e300]", "[true, 8]", '"8"', "[[8]]", "{}"])
def test_a_shape_that_is_none_is_refused(shape: str, tmp_path: Path) -> None:
    metadata = {"format": "lightning_sparse.masks", "version": "1", "shapes": f'{{"w": {shape}}}'}
    save_file({"w": torch.tensor([3], dtype=torch.uint8)}, tmp_path / "odd.masks", metadata)
    with pytest.raises(CheckpointError, match="do not fit their shapes"):
        load_masks(tmp_path / "odd.masks")


# Names.

_EVIL = "fc\x1b]0;owned\x07\x1b[31m.weight"


def test_control_characters_in_names_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {_EVIL: torch.eye(2)}
    torch.save(state, tmp_path / "evil.pt")
    main(["report", str(tmp_path / "evil.pt")])
    main(["masks", "extract", str(tmp_path / "evil.pt"), str(tmp_path / "evil.masks")])
    main(["masks", "compare", str(tmp_path / "evil.masks"), str(tmp_path / "evil.pt")])
    save_masks(tmp_path / "other.masks", {f"{_EVIL}2": torch.ones(2, dtype=torch.bool)})
    main(["masks", "compare", str(tmp_path / "evil.masks"), str(tmp_path / "other.masks")])
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "owned" in said.out
    assert "owned" in said.err
    for use in (lambda: apply_masks(nn.Linear(2, 2), tmp_path / "evil.masks"), lambda: FixedMask({_EVIL: 1})):  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="owned") as refused:
            use()
        assert "\x1b" not in str(refused.value)


def test_weights_in_the_safetensors_format_are_understood(tmp_path: Path) -> None:
    model = ToyModel()
    masks = {name: torch.rand_like(value) < 0.3 for name, value in model.state_dict().items() if value.dim() > 1}
    for name, mask in masks.items():
        model.get_parameter(name).data *= mask
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    read = read_masks(tmp_path / "model.safetensors")
    assert all(torch.equal(mask, read[name]) for name, mask in masks.items())
    assert report(tmp_path / "model.safetensors").num_active == sum(int(mask.sum()) for mask in masks.values())
    other, fixed = ToyModel(seed=3), FixedMask(tmp_path / "model.safetensors")
    apply_masks(other, tmp_path / "model.safetensors")
    make_trainer(tmp_path, callbacks=[fixed], max_epochs=1).fit(other)
    assert all(torch.equal(fixed.registry[name].mask, mask) for name, mask in masks.items())
    assert load_file(tmp_path / "model.safetensors")
