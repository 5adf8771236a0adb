from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import lightning_sparse.reporting.gains as gains_module
from lightning_sparse import GMP, report, save_masks, save_sparse
from lightning_sparse.reporting import (
    CheckpointError,
    LayerSparsity,
    checkpoint_sparsity,
    compare_masks,
    overlap_table,
    sparsity_table,
)
from tests.helpers import ToyModel, make_trainer


def half_zero(*shape: int) -> Tensor:
    values = torch.ones(shape)
    values.view(-1)[::2] = 0
    return values


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {"conv.weight": half_zero(4, 2, 3, 3), "conv.bias": torch.zeros(4), "steps": torch.zeros(2, 2).long()}


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "file.ckpt")
    return folder / "file.ckpt"


def test_a_checkpoint_of_ours_is_as_sparse_as_the_method_made_it(tmp_path: Path) -> None:
    method = GMP(sparsity=0.75)
    trainer = make_trainer(tmp_path, callbacks=[method])
    trainer.fit(ToyModel())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    layers = checkpoint_sparsity(tmp_path / "last.ckpt")
    assert {layer.name: layer.num_active for layer in layers} == {
        name: weight.num_active for name, weight in method.registry.items()
    }


def test_zeros_of_a_bare_state_dict_are_counted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    assert checkpoint_sparsity(saved(tmp_path, state)) == [LayerSparsity("conv.weight", (4, 2, 3, 3), num_active=36)]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_state_dicts_are_found_under_the_usual_keys(tmp_path: Path, state: dict[str, Tensor], key: str) -> None:
    (layer,) = checkpoint_sparsity(saved(tmp_path, {"epoch": 3, key: state}))
    assert layer.name == "conv.weight"


def test_all_tensors_means_all(tmp_path: Path, state: dict[str, Tensor]) -> None:
    layers = checkpoint_sparsity(saved(tmp_path, state), all_tensors=True)
    assert [(layer.name, layer.num_active) for layer in layers] == [("conv.weight", 36), ("conv.bias", 0), ("steps", 0)]


def test_masks_of_torchs_own_pruning_are_applied(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    prune.l1_unstructured(network[0], "weight", amount=0.75)
    layers = checkpoint_sparsity(saved(tmp_path, network.state_dict()))
    assert {layer.name: layer.num_active for layer in layers} == {"0.weight": 8, "1.weight": 16}


@pytest.mark.parametrize(("num_active", "sparsity"), [(0, 1.0), (5, 0.75), (20, 0.0)])
def test_sparsity_is_the_fraction_of_zeros(num_active: int, sparsity: float) -> None:
    assert LayerSparsity("w", (4, 5), num_active).sparsity == sparsity


def test_an_empty_tensor_is_not_sparse() -> None:
    assert LayerSparsity("w", (0, 5), 0).sparsity == 0


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no file .*nowhere\.ckpt"):
        checkpoint_sparsity(tmp_path / "nowhere.ckpt")


def test_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder; give the file itself"):
        checkpoint_sparsity(tmp_path)


@pytest.mark.parametrize("size", [0, 10, 700, -40], ids=["empty", "start", "half", "without its end"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, state: dict[str, Tensor], size: int) -> None:
    path = saved(tmp_path, state)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"file\.ckpt is damaged or is not a checkpoint"):
        checkpoint_sparsity(path)


def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    path.write_text("trainer:\n  max_epochs: 1\n")
    with pytest.raises(CheckpointError, match="is damaged or is not a checkpoint") as refused:
        checkpoint_sparsity(path)
    assert "weights_only" not in str(refused.value)  # which torch advises, and which could run code


def test_python_objects_are_refused_with_a_way_out(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": {"w": torch.eye(2)}, "model": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match=r"could run code.*weights_only=False\)\['state_dict'\]"):
        checkpoint_sparsity(path)


@pytest.mark.parametrize("content", [{"epoch": 1}, [1, 2], torch.eye(2)])
def test_a_file_without_a_state_dict_is_an_error(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match="holds no state dict"):
        checkpoint_sparsity(saved(tmp_path, content))


def test_a_state_dict_without_weights_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has 1 tensors.*--all"):
        checkpoint_sparsity(saved(tmp_path, {"bias": torch.zeros(3)}))


def test_names_in_brackets_are_shown_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(sparsity_table([LayerSparsity("a[b]", (2, 2), 2)], title="run[1].ckpt"))
    shown = console.export_text()
    assert "run[1].ckpt" in shown
    assert "a[b]" in shown


def test_the_table_ends_with_the_total() -> None:
    table = sparsity_table([LayerSparsity("a", (10, 100), 250), LayerSparsity("b", (10, 100), 150)])
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(table)
    total = console.export_text().splitlines()[-2]
    assert total.replace("│", " ").split() == ["total", "2,000", "400", "80.00%"]


# Of a module. By hand: two outputs, four inputs; row 1 and columns 0 and 2 are dead.


def small() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3, bias=False))
    network[0].weight = nn.Parameter(torch.tensor([[0.0, 3.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]))
    nn.init.ones_(network.get_parameter("2.weight"))
    return network


def test_rows_and_columns_without_a_weight_are_dead() -> None:
    first, second = report(small()).layers
    assert (first.num_active, first.sparsity, first.dead_rows, first.dead_columns) == (2, 0.75, 1, 2)
    assert (second.num_active, second.sparsity, second.dead_rows, second.dead_columns) == (6, 0.0, 0, 0)
    assert first.flops is second.flops is None


def test_operations_with_zeros_are_left_out() -> None:
    # Five inputs: 2 * 5 * 8 and 2 * 5 * 6 operations dense, a quarter of the first sparse. Biases count as none.
    result = report(small(), torch.ones(5, 4))
    assert [layer.flops for layer in result.layers] == [20, 60]
    assert (result.flops, result.dense_flops) == (80, 140)


def test_operations_of_what_is_not_listed_count_in_the_total() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs) @ inputs.T

    square = Square()
    nn.init.eye_(square.layer.weight)
    result = report(square, torch.ones(3, 4))  # 2 * 3 * 16 dense, 2 * 3 * 4 sparse, and 2 * 3 * 4 * 3
    assert (result.flops, result.dense_flops) == (24 + 72, 96 + 72)
    assert "72 of them in layers that are not listed" in str(result)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_columns_of_a_convolution_are_its_input_channels(kind: type[nn.Conv2d]) -> None:
    # Two groups of two inputs and three outputs; inputs 0 and 3 are dead, and so is output 4.
    layer = kind(4, 6, 3, groups=2)
    mask = torch.ones(6, 2) if kind is nn.Conv2d else torch.ones(4, 3)
    if kind is nn.Conv2d:  # (outputs, inputs of the group)
        mask[:3, 0] = mask[3:, 1] = mask[4] = 0
    else:  # (inputs, outputs of the group)
        mask[0] = mask[3] = mask[2:, 1] = 0
    with torch.no_grad():
        layer.weight.fill_(1.0).mul_(mask[:, :, None, None])
        layer.weight[..., 1:, 1:] = 0  # one position that is left is enough
    (weight,) = report(layer).layers
    assert (weight.dead_rows, weight.dead_columns) == (1, 2)


def test_the_module_is_left_as_it_was_and_runs_in_evaluation_mode() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    network[1].eval()
    before = copy.deepcopy(network.state_dict())
    report(network, torch.randn(1, 4))  # one sample: BatchNorm refuses it in training mode
    assert [part.training for part in network] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    "example",
    [(torch.ones(1, 4), torch.ones(1, 3)), [torch.ones(1, 4), torch.ones(1, 3)], {"right": torch.ones(1, 3)}],
    ids=["tuple", "list", "mapping"],
)
def test_an_example_may_be_arguments_by_place_or_by_name(example: Any) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = nn.Bilinear(4, 3, 2)

        def forward(self, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
            left = torch.ones(1, 4) if left is None else left
            assert right is not None
            return self.bilinear(left, right)

    assert report(Both(), example).flops == 2 * 24


def test_frozen_weights_are_counted_too() -> None:
    assert [layer.num_active for layer in report(small().requires_grad_(False)).layers] == [2, 6]


def test_all_tensors_of_a_module_are_its_parameters() -> None:
    layers = report(small(), all_tensors=True).layers
    assert [(layer.name, layer.dead_rows) for layer in layers] == [("0.weight", 1), ("0.bias", None), ("2.weight", 0)]


def test_a_module_in_training_by_a_method_is_as_sparse_as_its_registry(tmp_path: Path) -> None:
    method, model = GMP(sparsity=0.75), ToyModel()
    make_trainer(tmp_path, callbacks=[method]).fit(model)
    result = report(model, model.train_data[:2][0])
    assert result.sparsity == pytest.approx(method.registry.sparsity)
    assert {layer.name: layer.num_active for layer in result.layers} == {
        name: weight.num_active for name, weight in method.registry.items()
    }
    assert result.dense_flops == 2 * 2 * 344
    assert result.flops == 2 * 2 * method.registry.num_active


def test_the_report_of_a_checkpoint_is_that_of_its_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path, small().state_dict())
    assert list(report(path).layers) == checkpoint_sparsity(path)
    assert "dead" not in str(report(path))
    with pytest.raises(ValueError, match="is a checkpoint, which takes no example"):
        report(path, torch.ones(1, 4))


def test_the_report_of_a_checkpoint_says_that_it_counts_what_a_module_leaves_dense(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    module.get_parameter("1.weight").data[0] = 0.0
    path = saved(tmp_path, module.state_dict())
    result = report(path)
    assert [layer.name for layer in result.layers] == ["0.weight", "1.weight"]
    said = " ".join(str(result).split())
    assert "All floating-point tensors with at least two dimensions are counted, embeddings too" in said
    assert "report(module), or --model" in said
    assert result.to_dict()["remark"] == result.remark
    of_the_module = report(module)
    assert [layer.name for layer in of_the_module.layers] == ["1.weight"]
    assert of_the_module.remark == report(path, all_tensors=True).remark == ""


def test_a_checkpoint_that_is_masked_throughout_needs_no_such_remark(tmp_path: Path) -> None:
    for method, remarks in ((GMP(sparsity=0.75), 0), (GMP(sparsity=0.75, exclude=["@last"]), 1)):
        trainer = make_trainer(tmp_path, callbacks=[method], max_epochs=1)
        trainer.fit(ToyModel())
        trainer.save_checkpoint(path := tmp_path / "sparse.ckpt")
        assert str(report(path)).count("All floating-point tensors") == remarks


def test_what_is_neither_module_nor_path_is_an_error_that_says_what_to_report(tmp_path: Path) -> None:
    method: Any = GMP(sparsity=0.75)
    trainer: Any = make_trainer(tmp_path, callbacks=[method])
    for source in (method, trainer):
        with pytest.raises(TypeError, match=rf"this is a {type(source).__name__}\..* report\(trainer\.model\)"):
            report(source)
    trainer.fit(ToyModel())
    assert report(trainer.model).sparsity == pytest.approx(method.registry.sparsity)


class Projection(nn.Module):
    """A matrix in a module that says nothing of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.linear = nn.Parameter(torch.ones(4, 5)), nn.Linear(2, 2, bias=False)


def test_patterns_say_what_is_counted() -> None:
    names = [layer.name for layer in report(Projection(), include=["*", "Projection"]).layers]
    assert names == ["matrix", "linear.weight"]
    assert [layer.name for layer in report(Projection(), exclude=["matrix"]).layers] == ["linear.weight"]
    with pytest.raises(MisconfigurationException, match="'matrxi' matches no"):
        report(Projection(), include=["matrxi"])


def test_what_was_pruned_and_loaded_is_counted_whatever_its_module_is() -> None:
    module = Projection()
    assert [layer.name for layer in report(module).layers] == ["linear.weight"]
    module.matrix.data[1:] = 0.0
    assert [(layer.name, layer.sparsity) for layer in report(module).layers] == [("matrix", 0.75), ("linear.weight", 0)]


def test_a_report_tells_what_is_masked_from_the_rest(tmp_path: Path) -> None:
    model = ToyModel()
    trainer = make_trainer(tmp_path, callbacks=[GMP(sparsity=0.75, exclude=["@last"])])
    trainer.fit(model)
    trainer.save_checkpoint(path := tmp_path / "sparse.ckpt")
    for result in (report(path), report(model, all_tensors=True)):
        assert result.masked.sparsity == pytest.approx(0.75, abs=0.01)
        assert result.sparsity < 0.75
        labels = [line.replace("│", " ").split()[:1] for line in str(result).splitlines()]
        assert ["masked"] in labels
        assert ["total"] in labels


def test_eight_bit_floats_are_counted(tmp_path: Path) -> None:
    eighths = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).to(torch.float8_e4m3fn)
    module = nn.Sequential(nn.Linear(2, 2, bias=False))
    module[0].weight = nn.Parameter(eighths, requires_grad=False)
    assert report(module, all_tensors=True).layers[0].num_active == 1
    assert report(saved(tmp_path, {"weight": eighths})).layers[0].num_active == 1


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_layer_without_a_shape_is_passed_over() -> None:
    assert len(report(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))).layers) == 1


def test_a_report_of_a_checkpoint_takes_no_patterns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a checkpoint, which takes no patterns"):
        report(saved(tmp_path, small().state_dict()), include=["*"])


def test_a_printed_report_breaks_no_name() -> None:
    name = "bert_encoder_layer_11_attention_self_" * 4 + "query"
    assert f"{name}.weight" in str(report(nn.ModuleDict({name: nn.Linear(2, 2)})))


def test_a_module_without_weights_is_an_error_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"LayerNorm has no weight to count(.|\n)*norm(.|\n)*all_tensors=True"):
        report(nn.LayerNorm(3))


def test_the_data_are_plain_and_are_those_of_the_table() -> None:
    result = report(small(), torch.ones(5, 4))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["layers"][0] == {
        "name": "0.weight",
        "shape": [2, 4],
        "num_active": 2,
        "dead_rows": 1,
        "dead_columns": 2,
        "flops": 20,
        "masked": None,
        "sparsity": 0.75,
    }
    assert (data["numel"], data["num_active"], data["flops"], data["dense_flops"]) == (14, 8, 80, 140)
    rows = [line.replace("│", " ").split() for line in str(result).splitlines()]
    first = ["0.weight", "2", "×", "4", "8", "2", "75.00%", "1", "2", "20"]
    assert [row[: len(first)] for row in rows if row[:1] == ["0.weight"]] == [first]  # one row a layer, gains too
    assert ["total", "14", "8", "42.86%", "1", "2", "80"] in rows


# How alike two masks are.


def masks(*rows: str) -> dict[str, Tensor]:
    return {f"{index}.weight": torch.tensor([[bit == "1" for bit in row]]) for index, row in enumerate(rows)}


def test_overlap_by_hand() -> None:
    # 3 active and 5; 2 in both, 6 in one at least; 2 of 3 kept.
    (overlap,) = compare_masks(masks("11010000"), masks("11001110"))
    assert (overlap.numel, overlap.active_before, overlap.active_after, overlap.shared) == (8, 3, 5, 2)
    assert (overlap.jaccard, overlap.kept) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_empty_masks_are_alike() -> None:
    (overlap,) = compare_masks(masks("000"), masks("000"))
    assert (overlap.jaccard, overlap.kept) == (1.0, 1.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_overlap_is_that_of_sets(entries: list[tuple[bool, bool]]) -> None:
    before, after = ({place for place, entry in enumerate(entries) if entry[side]} for side in (0, 1))
    first, second = ({"weight": torch.tensor([entry[side] for entry in entries])} for side in (0, 1))
    (overlap,) = compare_masks(first, second)
    assert overlap.shared == len(before & after)
    assert overlap.jaccard == (len(before & after) / len(before | after) if before | after else 1.0)
    assert overlap.kept == (len(before & after) / len(before) if before else 1.0)


def test_masks_of_other_layers_are_refused_with_both_sides() -> None:
    with pytest.raises(ValueError, match=r"1\.weight in the first alone; other in the second alone"):
        compare_masks(masks("10", "01"), {**masks("10"), "other": torch.tensor([True])})


def test_masks_of_other_shapes_are_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"masks of 0\.weight have the shapes \(1, 2\) and \(1, 3\)"):
        compare_masks(masks("10"), masks("101"))


def test_the_total_of_overlaps_is_over_all_weights() -> None:
    table = overlap_table(compare_masks(masks("1100", "1111"), masks("1010", "0001")))
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(table)
    # 6 and 3 of 8 active; 2 in both, 7 in one at least
    total = console.export_text().splitlines()[-2]
    assert total.replace("│", " ").split() == ["total", "8", "25.00%", "62.50%", "0.2857", "33.33%"]


# What zeros are good for.


def test_groups_of_two_in_four_are_along_the_inputs() -> None:
    layer = nn.Linear(6, 2)
    # Groups of four, the last of which has two and holds whatever is in it: 3 of 4 groups hold.
    layer.weight = nn.Parameter(torch.tensor([[1.0, 0.0, 2.0, 0.0, 3.0, 4.0], [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]]))
    (gain,) = report(layer).gains.layers  # pyright: ignore[reportOptionalMemberAccess]
    assert gain.two_of_four == 0.75


def test_the_file_is_about_as_large_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1))
    for parameter in network.parameters():
        parameter.data.masked_fill_(torch.rand_like(parameter) < 0.9, 0.0)
    save_sparse(network, tmp_path / "file.sparse")
    size = (tmp_path / "file.sparse").stat().st_size
    pointwise = int((network.get_parameter("3.weight") == 0).sum())
    for source in (network, saved(tmp_path, network.state_dict()), tmp_path / "file.sparse"):
        gains = report(source).gains
        assert gains is not None
        assert gains.sparse_nbytes == pytest.approx(size, rel=0.25)
        assert gains.nbytes == sum(tensor.nbytes for tensor in network.state_dict().values())
        spatial = int((network.get_parameter("0.weight") == 0).sum())
        assert gains.compiled_zeros == spatial
        for is_installed in (True, False):
            monkeypatch.setattr(gains_module, "find_spec", lambda _, known=is_installed: known or None)
            said = f"{spatial:,} of {spatial + pointwise:,} zeros are in convolutions larger than 1 × 1"
            assert (said in str(report(source))) != is_installed


@pytest.mark.parametrize("example", [(4,), "four", torch.ones(1, 5)])
def test_an_example_that_the_module_does_not_take_is_refused_in_words(example: Any) -> None:
    module = nn.Linear(4, 3).train()
    with pytest.raises(ValueError, match=r"Linear does not take the example, of shapes .* Give one tensor"):
        report(module, example)
    assert module.training


def test_dead_units_need_an_example() -> None:
    gains = report(small(), torch.ones(5, 4)).gains
    assert gains is not None
    assert gains.units is not None
    assert (gains.units.dead, gains.units.units) == (1, 5)  # the second neuron has no inputs
    assert gains.units.parameters_left < gains.units.parameters
    assert "shrink removes 1 dead units of 5" in str(report(small(), torch.ones(5, 4)))
    assert report(small()).gains.units is None  # pyright: ignore[reportOptionalMemberAccess]


def test_allocations_are_compared_by_the_operations_of_as_many_weights() -> None:
    # 36 weights at 36 places and 4,320 at one; 336 are active. Uniform: 336 / 4,356 of each, which is 3 and 333. ERK:
    # shares of 4 + 1 + 3 + 3 = 11 and 30 + 144 = 174, which is 20 and 316.
    network: Any = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 30, bias=False))
    with torch.no_grad():
        network[2].weight[:, 10:] = 0
    gains = report(network, torch.ones(1, 1, 8, 8)).gains
    assert gains is not None
    assert (gains.uniform_flops, gains.erk_flops) == (2 * (36 * 3 + 333), 2 * (36 * 20 + 316))
    assert (
        "882 FLOPs with allocation='uniform' and 2,072 with allocation='erk': 'uniform' needs 2.35 times fewer."
        in str(report(network, torch.ones(1, 1, 8, 8)))
    )


def test_what_cannot_be_traced_is_said() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs) if inputs.sum() > 0 else inputs

    assert "shrink cannot remove dead units: the module cannot be traced" in str(report(Deciding(), torch.ones(1, 4)))


def test_weights_in_safetensors_are_counted_and_masks_are_not(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "file.safetensors")
    assert checkpoint_sparsity(tmp_path / "file.safetensors") == [LayerSparsity("conv.weight", (4, 2, 3, 3), 36)]
    save_masks(tmp_path / "file.masks", {"conv.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(CheckpointError, match="like a file of masks"):
        checkpoint_sparsity(tmp_path / "file.masks")
    (tmp_path / "file.safetensors").write_bytes((tmp_path / "file.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint_sparsity(tmp_path / "file.safetensors")


def test_names_with_escape_sequences_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = saved(tmp_path, {"fc\x1b[2J.weight": half_zero(4, 4)})
    assert "\x1b" not in str(report(path))


def test_a_small_file_of_terabytes_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"weight": torch.ones(1, 1).expand(10**6, 10**6)})
    assert path.stat().st_size < 10_000
    with pytest.raises(CheckpointError, match="claims 1,000,000,000,000 entries and stores 1"):
        report(path)


def test_an_exported_module_has_layers_of_no_kind_and_is_told_so() -> None:
    exported = torch.export.export(nn.Sequential(nn.Linear(4, 3)), (torch.randn(2, 4),)).module()
    with pytest.raises(ValueError, match=r"0\.weight +Module +\(3, 4\) +unknown module"):
        report(exported)
