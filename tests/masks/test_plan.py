from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations

from lightning_sparse import report
from lightning_sparse.masks import select_weights
from lightning_sparse.masks.plan import canonical_name, judge_parameters


def masked_names(module: nn.Module, **patterns: Any) -> list[str]:
    return [candidate.name for candidate in select_weights(module, **patterns).masked]


def reasons(module: nn.Module, **patterns: Any) -> dict[str, str]:
    return {candidate.name: candidate.reason for candidate in select_weights(module, **patterns)}


def beside_a_linear(module: nn.Module) -> nn.Module:
    """``module`` as ``it``, and a linear layer, so that there is always something to mask."""
    return nn.ModuleDict({"it": module, "linear": nn.Linear(2, 2, bias=False)})


# What is masked

WEIGHTS_OF: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "Linear": (lambda: nn.Linear(4, 3), ["weight"]),
    "Bilinear": (lambda: nn.Bilinear(2, 3, 4), ["weight"]),
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3), ["weight"]),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3), ["weight"]),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 3), ["weight"]),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 4, 3), ["weight"]),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 4, 3), ["weight"]),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 3), ["weight"]),
    "RNN": (lambda: nn.RNN(3, 4), ["weight_ih_l0", "weight_hh_l0"]),
    "GRU": (lambda: nn.GRU(3, 4, 2), ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]),
    "LSTM with projection": (lambda: nn.LSTM(3, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
    "RNN of both directions": (
        lambda: nn.RNN(3, 4, bidirectional=True),
        ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
    ),
    "RNNCell": (lambda: nn.RNNCell(3, 4), ["weight_ih", "weight_hh"]),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"]),
    "GRUCell": (lambda: nn.GRUCell(3, 4), ["weight_ih", "weight_hh"]),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
    "MultiheadAttention of other keys": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
}


@pytest.mark.parametrize(("module", "names"), WEIGHTS_OF.values(), ids=WEIGHTS_OF)
def test_weights_of_known_layers_are_masked_and_biases_are_not(
    module: Callable[[], nn.Module], names: list[str]
) -> None:
    plan = reasons(module())
    assert [name for name, reason in plan.items() if not reason] == names
    assert {reason for name, reason in plan.items() if name not in names} <= {"bias"}


def test_a_subclass_of_a_known_layer_is_masked() -> None:
    class MyLinear(nn.Linear):
        pass

    assert masked_names(MyLinear(2, 2)) == ["weight"]


# What is not


@pytest.mark.parametrize("embedding", [nn.Embedding(5, 2), nn.EmbeddingBag(5, 2)], ids=repr)
def test_embeddings_are_dense(embedding: nn.Module) -> None:
    assert reasons(beside_a_linear(embedding))["it.weight"] == "embedding"


class MyRMSNorm(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm(4),
        nn.LayerNorm([3, 4]),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        MyRMSNorm(4),
        MyRMSNorm(3, 4),
    ],
    ids=repr,
)
def test_norms_are_dense(norm: nn.Module) -> None:
    plan = reasons(beside_a_linear(norm))
    assert {reason for name, reason in plan.items() if name.startswith("it.")} == {"norm"}


def test_frozen_weights_are_dense() -> None:
    assert reasons(beside_a_linear(nn.Linear(2, 2).requires_grad_(False)))["it.weight"] == "frozen"


def test_naming_a_frozen_weight_in_full_does_not_mask_it() -> None:
    module = beside_a_linear(nn.Linear(2, 2).requires_grad_(False))
    assert reasons(module, include=["it.weight", "linear.weight"])["it.weight"] == "frozen"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_dense(dtype: torch.dtype) -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
    for include in (["*"], ["*", "it.weight"]):
        assert reasons(beside_a_linear(module), include=include)["it.weight"] == f"8-bit floating point: {dtype}"


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_not_floating_point_are_dense(dtype: torch.dtype) -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(2, 2, dtype=dtype), requires_grad=False)
    assert reasons(beside_a_linear(module))["it.weight"] == f"not floating point: {dtype}"


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 2))
        self.scale = nn.Parameter(torch.ones(3))


def test_a_matrix_of_an_unknown_module_is_dense_and_the_plan_says_how_to_mask_it() -> None:
    assert "give its full name in include=" in reasons(beside_a_linear(Unknown()))["it.matrix"]


@pytest.mark.parametrize("pattern", ["it.matrix", "Unknown"])
def test_naming_an_unknown_module_in_full_masks_its_matrices_and_not_its_vectors(pattern: str) -> None:
    assert masked_names(beside_a_linear(Unknown()), include=[pattern]) == ["it.matrix"]


@pytest.mark.parametrize("pattern", ["it.*", "Unk*", "*.matrix"])
def test_a_wildcard_that_names_an_unknown_module_alone_masks_its_matrices(pattern: str) -> None:
    assert masked_names(beside_a_linear(Unknown()), include=[pattern]) == ["it.matrix"]


@pytest.mark.parametrize("pattern", ["*", "*.*", "*i*"])
def test_a_wildcard_that_names_more_admits_nothing(pattern: str) -> None:
    assert masked_names(beside_a_linear(Unknown()), include=[pattern]) == ["linear.weight"]


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_are_dense(kind: Callable[[nn.Module], nn.Module]) -> None:
    plan = reasons(beside_a_linear(kind(nn.Linear(3, 2))))
    originals = {reason for name, reason in plan.items() if "parametrizations" in name}
    assert {reason.split(":")[0] for reason in originals} == {"parametrized"}
    assert plan["it.bias"] == "bias"


@pytest.mark.parametrize(("layer", "name"), [(nn.Linear(3, 2), "weight"), (nn.LSTM(3, 2), "weight_hh_l0")], ids=repr)
def test_the_two_factors_of_old_weight_norm_are_dense(layer: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer, name)
    masked = masked_names(beside_a_linear(layer))
    assert f"it.{name}_g" not in masked
    assert f"it.{name}_v" not in masked


# Ties


def tie(first: nn.Module, second: nn.Module) -> nn.Module:
    second.weight = first.weight
    return nn.ModuleDict({"first": first, "second": second, "other": nn.Linear(2, 2, bias=False)})


def test_a_weight_tied_between_two_linears_is_masked_once_under_its_first_name() -> None:
    plan = reasons(tie(nn.Linear(2, 5, bias=False), nn.Linear(2, 5, bias=False)))
    assert plan == {"first.weight": "", "second.weight": "tied: to first.weight", "other.weight": ""}


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_linear_tied_to_an_embedding_is_dense(embedding_first: bool) -> None:
    layers = [nn.Embedding(5, 2), nn.Linear(2, 5, bias=False)]
    plan = reasons(tie(*(layers if embedding_first else reversed(layers))))
    assert plan["first.weight"]
    assert plan["second.weight"] == "tied: to first.weight"


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
@pytest.mark.parametrize("rest", [[], ["*"]])
def test_a_tied_embedding_named_in_full_by_one_of_its_names_is_masked(name: str, rest: list[str]) -> None:
    for layers in (
        [nn.Embedding(5, 2), nn.Linear(2, 5, bias=False)],
        [nn.Linear(2, 5, bias=False), nn.Embedding(5, 2)],
    ):
        names = masked_names(tie(*layers), include=[*rest, name])
        assert names == ["first.weight", *(["other.weight"] if rest else [])]


def test_exclude_wins_where_another_name_of_the_weight_is_included_in_full() -> None:
    module = tie(nn.Embedding(5, 2), nn.Linear(2, 5, bias=False))
    assert masked_names(module, include=["*", "first.weight"], exclude=["second.weight"]) == ["other.weight"]


def test_a_weight_excluded_under_one_of_its_names_is_dense() -> None:
    module = tie(nn.Linear(2, 5, bias=False), nn.Linear(2, 5, bias=False))
    assert masked_names(module, exclude=["second.*"]) == ["other.weight"]


def test_a_tied_weight_included_by_its_second_name_is_masked() -> None:
    module = tie(nn.Linear(2, 5, bias=False), nn.Linear(2, 5, bias=False))
    assert len(masked_names(module, include=["second.weight", "other.weight"])) == 2


def test_a_module_registered_twice_is_masked_once() -> None:
    layer = nn.Linear(2, 2)
    assert masked_names(nn.ModuleDict({"a": layer, "b": layer})) == ["a.weight"]


def test_the_summary_counts_a_tied_weight_once() -> None:
    module = tie(nn.Linear(2, 5, bias=False), nn.Embedding(5, 2))  # 10 weights, tied, and 4 others
    assert "(4 of 14 entries," in select_weights(module).summary


# Wrapped and nested modules


def test_a_compiled_submodule_keeps_the_names_of_the_plain_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 1, 1)))
    names = [candidate.name for candidate in select_weights(module)]
    module.register_module("1", torch.compile(module[1]))  # type: ignore[arg-type]
    assert [candidate.name for candidate in select_weights(module)] == names


def test_a_compiled_module_keeps_the_names_of_the_plain_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert masked_names(torch.compile(module)) == masked_names(module)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["_orig_mod.a", "a._orig_mod", "_orig_mod._checkpoint_wrapped_module.a", "a"])
def test_canonical_names_hold_no_wrapper(name: str) -> None:
    assert canonical_name(name) == "a"


def test_canonical_names_keep_parts_that_only_look_like_wrappers() -> None:
    assert canonical_name("my_orig_mod.weight") == "my_orig_mod.weight"


def test_every_convolution_and_the_classifier_of_a_resnet_are_masked() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        resnet = models.resnet18()
    names = masked_names(resnet)
    convolutions = [name for name, module in resnet.named_modules() if isinstance(module, nn.Conv2d)]
    assert names == [f"{name}.weight" for name in [*convolutions, "fc"]]
    assert len(names) == 21


def test_attention_and_mlps_of_a_vision_transformer_are_masked_and_its_tokens_are_not() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        plan = reasons(models.vit_b_16())
    assert sum(not reason for reason in plan.values()) == 1 + 12 * 4 + 1  # patches, layers, head
    assert plan["class_token"].startswith("unknown module")
    assert plan["encoder.pos_embedding"].startswith("unknown module")
    assert plan["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"] == ""


# Refusals, and what is printed


def network() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(1, 2, 3),
            "encoder": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            "embed": nn.Embedding(3, 2),
            "head": nn.Linear(2, 1),
        }
    )


@pytest.mark.parametrize("module", [nn.ReLU(), nn.LayerNorm(3), nn.Linear(2, 2).requires_grad_(False)], ids=repr)
def test_a_module_with_nothing_to_mask_is_answered_with_the_reasons(module: nn.Module) -> None:
    with pytest.raises(MisconfigurationException, match="has no weight to mask") as raised:
        select_weights(module)
    assert all(name in str(raised.value) for name, _ in module.named_parameters())


def test_an_empty_include_masks_nothing_and_says_so() -> None:
    with pytest.raises(MisconfigurationException, match="not included"):
        select_weights(network(), include=[])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_is_refused_by_name_with_the_remedy() -> None:
    with pytest.raises(MisconfigurationException, match=r"1\.weight of LazyLinear .* one batch"):
        select_weights(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("patterns", [{"exclude": ["1.*"]}, {"include": ["0.*"]}])
def test_a_lazy_layer_that_is_left_out_is_no_refusal(patterns: dict[str, Sequence[str]]) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    assert masked_names(module, **patterns) == ["0.weight"]
    assert "no shape yet" in str(judge_parameters(module))


class Device(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.empty(0))
        self.linear = nn.Linear(2, 2)


def test_an_empty_parameter_is_no_weight() -> None:
    assert reasons(Device())["dummy"] == "empty"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_entries_is_no_weight() -> None:
    assert reasons(beside_a_linear(nn.Linear(0, 3)))["it.weight"] == "empty"


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_with_sparse_gradients_is_refused_where_it_would_be_masked(kind: Any) -> None:
    module = beside_a_linear(kind(5, 2, sparse=True))
    assert reasons(module)["it.weight"] == "embedding"
    with pytest.raises(
        MisconfigurationException, match=rf"it\.weight are sparse.* Build {kind.__name__} with sparse=F"
    ):
        select_weights(module, include=["*", "it.weight"])


def test_a_sharded_weight_is_refused_where_it_would_be_masked() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    vars(module[1].weight)["ds_shape"] = torch.Size([2, 2])  # as DeepSpeed marks what it has divided
    with pytest.raises(MisconfigurationException, match=r"The entries of 1\.weight are divided.* strategy='ddp'"):
        select_weights(module)
    assert masked_names(module, exclude=["1.*"]) == ["0.weight"]


def test_a_distributed_tensor_is_masked(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        module[1].weight = nn.Parameter(distribute_tensor(torch.eye(2), mesh, [Shard(0)]))
        assert masked_names(module) == ["0.weight", "1.weight"]
        assert [layer.num_active for layer in report(module).layers] == [4, 2]
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_of_another_library_is_refused_too() -> None:
    class Linear(nn.Module):
        """As PyTorch Geometric's, whose inputs are not known yet."""

        def __init__(self) -> None:
            super().__init__()
            self.in_channels, self.out_channels = -1, 2
            self.weight = nn.parameter.UninitializedParameter()

    with pytest.raises(MisconfigurationException, match=r"The shape of it\.weight of Linear is not known yet"):
        select_weights(beside_a_linear(Linear()))


def autoencoder() -> nn.ModuleDict:
    module = nn.ModuleDict({"enc": nn.Linear(4, 3), "dec": nn.Linear(3, 4), "head": nn.Linear(2, 2)})
    module.get_parameter("dec.weight").data = module.get_parameter("enc.weight").data.t()
    return module


def test_two_parameters_in_one_memory_are_refused_with_the_remedy() -> None:
    sentence = r"enc\.weight, dec\.weight share their memory.* Make them one parameter"
    cases: list[dict[str, Any]] = [{}, {"exclude": ["enc.*"]}, {"exclude": ["dec.*"]}]
    for patterns in cases:
        with pytest.raises(MisconfigurationException, match=sentence):
            select_weights(autoencoder(), **patterns)
    assert masked_names(autoencoder(), exclude=["enc.*", "dec.*"]) == ["head.weight"]


def test_a_frozen_view_of_a_weight_is_no_second_mask() -> None:
    module = autoencoder()
    module["dec"].requires_grad_(False)
    assert masked_names(module) == ["enc.weight", "head.weight"]


def test_a_plan_may_be_wanted_whose_weights_are_all_frozen_yet() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    assert [candidate.name for candidate in select_weights(module, frozen=True).weights] == ["weight"]


def test_each_candidate_knows_who_holds_it() -> None:
    module = nn.ModuleDict({"plain": nn.Linear(2, 2), "normed": parametrizations.weight_norm(nn.Linear(2, 2))})
    for candidate in select_weights(module):
        assert candidate.owner._parameters[candidate.local_name] is candidate.parameter
        assert candidate.module_type == type(candidate.owner).__name__


def test_coverage_is_the_share_of_all_matrices_that_is_masked() -> None:
    module = nn.Sequential(
        nn.Embedding(6, 2), nn.Linear(2, 4), nn.LayerNorm(4)
    )  # 12 and 8 entries; vectors do not count
    assert select_weights(module).coverage == pytest.approx(0.4)
    assert "40% of those in matrices" in select_weights(module).summary


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.matrix, self.vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        self.complex, self.empty = nn.Parameter(torch.ones(2, dtype=torch.complex64)), nn.Parameter(torch.empty(0))
        self.embedding, self.norm, self.frozen = nn.Embedding(2, 2), nn.LayerNorm(2), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.normed = parametrizations.weight_norm(nn.Linear(2, 2))
        self.excluded, self.standardised = nn.Linear(2, 2), Standardised(2, 2)


class Standardised(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight - self.weight.mean(), self.bias)


def test_the_summary_is_one_line_of_at_most_200_characters() -> None:
    plan = select_weights(Many(), exclude=["excluded.*"])
    assert len(plan.summary) <= 200
    assert plan.summary.endswith(" for other reasons.")
    assert "\n" not in plan.summary


def test_names_reach_no_terminal_as_commands() -> None:
    module = nn.ModuleDict({"a\x1b[31m": nn.Linear(2, 2), "b": nn.Linear(2, 2).requires_grad_(False)})
    plan = select_weights(module)
    assert "\x1b" not in str(plan)
    assert r"a\x1b[31m.weight" in str(plan)
    assert masked_names(module, include=["a\x1b[31m.weight"]) == ["a\x1b[31m.weight"]


def test_the_plan_prints_a_line_for_each_parameter() -> None:
    plan = select_weights(network())
    lines = str(plan).splitlines()
    assert len(lines) == len(plan) == 9
    assert all(candidate.name in line for candidate, line in zip(plan, lines, strict=True))
