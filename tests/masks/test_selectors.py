"""What ``include=`` and ``exclude=`` say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrizations

from lightning_sparse.masks import select_weights
from lightning_sparse.masks.plan import as_patterns


def masked_names(module: nn.Module, **patterns: Any) -> list[str]:
    return [candidate.name for candidate in select_weights(module, **patterns).masked]


def asked(argument: str, pattern: str) -> dict[str, Any]:
    return {argument: [pattern]}


def network() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(1, 2, 3),
            "encoder": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            "embed": nn.Embedding(3, 2),
            "head": nn.Linear(2, 1),
        }
    )


@pytest.mark.parametrize(
    ("include", "names"),
    [
        (["encoder.*"], ["encoder.0.weight", "encoder.1.weight"]),
        (["*.0.weight"], ["encoder.0.weight"]),
        (["Conv2d"], ["stem.weight"]),
        (["Conv*"], ["stem.weight"]),
        (["_ConvNd"], ["stem.weight"]),
        (["head.weight", "Conv2d"], ["stem.weight", "head.weight"]),
        (["embed.weight"], ["embed.weight"]),
        (["Embedding"], ["embed.weight"]),
    ],
)
def test_include_takes_globs_names_types_and_base_classes(include: list[str], names: list[str]) -> None:
    assert masked_names(network(), include=include) == names


@pytest.mark.parametrize(
    ("exclude", "names"),
    [
        (["encoder.*"], ["stem.weight", "head.weight"]),
        (["Linear"], ["stem.weight"]),
        (["_ConvNd", "head.*"], ["encoder.0.weight", "encoder.1.weight"]),
        (["*.bias"], ["stem.weight", "encoder.0.weight", "encoder.1.weight", "head.weight"]),
    ],
)
def test_exclude_takes_globs_names_types_and_base_classes(exclude: list[str], names: list[str]) -> None:
    assert masked_names(network(), exclude=exclude) == names


def test_exclude_wins_over_include() -> None:
    assert masked_names(network(), include=["encoder.*"], exclude=["encoder.0.weight"]) == ["encoder.1.weight"]


@pytest.mark.parametrize("include", [["Linear"], ["head.bias", "head.weight"]])
def test_biases_are_dense_even_where_they_are_included(include: list[str]) -> None:
    assert not [name for name in masked_names(network(), include=include) if name.endswith("bias")]


def test_naming_attention_by_its_type_does_not_mask_its_biases() -> None:
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)  # bias_k and bias_v have three dimensions
    assert masked_names(attention, include=["MultiheadAttention"]) == ["in_proj_weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "near"), [("encodr.*", "encoder"), ("Conv2D", "Conv2d"), ("head.wieght", "head.weight")]
)
def test_a_pattern_that_matches_nothing_is_answered_with_names_near_it(argument: str, pattern: str, near: str) -> None:
    with pytest.raises(MisconfigurationException) as raised:
        select_weights(network(), **asked(argument, pattern))
    assert f"{argument}={pattern!r}" in str(raised.value)
    assert near in str(raised.value)


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "module"),
    [("head", "head"), ("encoder", "encoder"), ("encoder.1", "encoder.1"), ("1", "encoder.1")],
)
def test_the_name_of_a_module_is_answered_with_the_pattern_of_its_parameters(
    argument: str, pattern: str, module: str
) -> None:
    sentence = f"{argument}='{pattern}' matches no .* '{module}' is a module; for its parameters write '{module}.*'."
    with pytest.raises(MisconfigurationException, match=sentence.replace(".*'.", r"\.\*'\.")):
        select_weights(network(), **asked(argument, pattern))
    assert select_weights(network(), **asked(argument, f"{module}.*")).masked


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        ("head", r" is the string 'head'; give a list of patterns: \['head'\]\."),
        ([nn.Linear], r"\[0\] is the class Linear; give its name: 'Linear'\."),
        (["head.*", nn.Conv2d], r"\[1\] is the class Conv2d; give its name: 'Conv2d'\."),
        ([(nn.Linear(1, 1), "weight")], r"\[0\] is of type tuple; give parameter names, such as 'head\.weight'"),
        ([nn.Linear(1, 1)], r"\[0\] is of type Linear; give parameter names, such as 'head\.weight'"),
        (nn.Linear, r" is the class Linear; give a list of names or patterns"),
        (3, r" is of type int; give a list of names or patterns"),
    ],
)
def test_what_is_no_list_of_strings_is_refused(argument: str, patterns: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=argument + sentence):
        select_weights(network(), **{argument: patterns})


@pytest.mark.parametrize("kind", [set, frozenset])
def test_the_patterns_of_a_set_are_in_one_order_in_every_process(kind: Any) -> None:
    letters = [*"hgfedcba"]
    assert as_patterns("include", kind(letters)) == tuple("abcdefgh")
    assert as_patterns("include", letters) == tuple("hgfedcba")
    with pytest.raises(ValueError, match=r"include\[\d\] is the class Conv2d"):
        as_patterns("include", kind(["a", nn.Conv2d]))


def test_the_type_of_every_module_is_no_pattern() -> None:
    with pytest.raises(MisconfigurationException, match="'Module' matches no parameter"):
        select_weights(network(), include=["Module"])


# Types admit their own weights alone


class Gained(nn.Conv2d):
    """A convolution with a gain for each filter, as timm's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_the_name_of_a_type_admits_that_types_weights_alone() -> None:
    module = nn.ModuleDict(
        {
            "plain": nn.Conv2d(2, 3, 3),
            "gained": Gained(2, 3, 3),
            "normed": nn.utils.weight_norm(nn.Conv2d(2, 3, 3)),
            "spectral": nn.utils.spectral_norm(nn.Conv2d(2, 3, 3)),
            "parametrized": parametrizations.weight_norm(nn.Conv2d(2, 3, 3)),
        }
    )
    assert masked_names(module, include=["Conv2d"]) == ["plain.weight", "gained.weight"]
    assert masked_names(module, include=["Gained"]) == ["gained.weight"]


@pytest.mark.parametrize("name", ["gained.gain", "spectral.weight_orig", "normed.parametrizations.weight.original1"])
def test_the_full_name_of_a_parameter_admits_it(name: str) -> None:
    module = nn.ModuleDict(
        {
            "gained": Gained(2, 3, 3),
            "spectral": nn.utils.spectral_norm(nn.Conv2d(2, 3, 3)),
            "normed": parametrizations.weight_norm(nn.Conv2d(2, 3, 3)),
        }
    )
    assert masked_names(module, include=[name]) == [name]
    assert set(masked_names(module, include=["*", name])) == {name, "gained.weight"}


# Traits


class Mobile(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.Conv2d(4, 8, 1),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ConvTranspose2d(8, 8, 3, groups=8),
            nn.Embedding(3, 8),
            nn.Linear(8, 2),
            nn.LayerNorm(2),
        )


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("@depthwise", ["1.weight", "4.weight"]),
        ("@1x1", ["2.weight"]),
        ("@first", ["0.weight"]),
        ("@last", ["6.weight"]),
    ],
)
def test_traits_select_in_include_and_exclude(selector: str, names: list[str]) -> None:
    everything = masked_names(Mobile())
    assert masked_names(Mobile(), include=[selector]) == names
    assert masked_names(Mobile(), exclude=[selector]) == [name for name in everything if name not in names]


def test_traits_stand_beside_globs() -> None:
    assert masked_names(Mobile(), include=["Conv2d", "@last"], exclude=["@first", "@depthwise"]) == [
        "2.weight",
        "3.weight",
        "6.weight",
    ]


def test_first_and_last_pass_over_what_is_tied_to_an_embedding() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(5, 2), "a": nn.Linear(2, 2), "b": nn.Linear(2, 5, bias=False)})
    module["b"].weight = module["embed"].weight
    assert masked_names(module, include=["@last"]) == ["a.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_an_unknown_trait_is_answered_with_those_there_are(argument: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{argument}\[0\] is '@deepwise'.*'@1x1', .*'@depthwise', .*'@first', .*'@last'"
    ):
        as_patterns(argument, ["@deepwise"])


def test_a_trait_that_nothing_has_is_answered_like_a_name_that_nothing_has() -> None:
    with pytest.raises(MisconfigurationException, match=r"exclude='@depthwise' matches nothing: .* Leave it out"):
        select_weights(nn.Linear(2, 2), exclude=["@depthwise"])


# Unknown modules


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.ones(2, 3, 3)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("pattern", ["experts.*", "*experts*", "Experts", "Exp*", "experts.first"])
def test_what_names_an_unknown_module_admits_its_matrices(pattern: str) -> None:
    module = nn.ModuleDict({"experts": Experts(), "linear": nn.Linear(2, 2)})
    experts = ["experts.first"] if pattern == "experts.first" else ["experts.first", "experts.second"]
    assert masked_names(module, include=[pattern]) == experts
    assert masked_names(module, include=["*", pattern]) == [*experts, "linear.weight"]


def test_the_pattern_that_is_advised_for_a_module_works() -> None:
    module = nn.ModuleDict({"layer": nn.ModuleDict({"experts": Experts()}), "linear": nn.Linear(2, 2)})
    with pytest.raises(MisconfigurationException, match=r"write 'layer\.experts\.\*'"):
        select_weights(module, include=["experts"])
    assert masked_names(module, include=["layer.experts.*"]) == ["layer.experts.first", "layer.experts.second"]


def test_names_that_look_like_patterns_are_names_too() -> None:
    module = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    assert masked_names(module, include=["a[0].weight"]) == ["a[0].weight"]
