"""Layers of somebody's own: whether a stored zero is a zero where they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse.masks import select_weights
from lightning_sparse.masks.forwards import keeps_zeros


class Standardised(nn.Conv2d):
    """As in Big Transfer and NFNets."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(input, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias)


class StandardisedBelow(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Binary(nn.Linear):
    """As in BitNet: a straight-through estimator."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        signs = torch.sign(self.weight - self.weight.mean())
        return F.linear(input, self.weight + (signs - self.weight).detach(), self.bias)


class Same(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Equalised(nn.Linear):
    """As in StyleGAN: the learning rate is in the weight's scale."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input, self.weight * 0.1, self.bias)


class Normalised(nn.Linear):
    """As in ArcFace."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(F.normalize(input), F.normalize(self.weight))


class Multiplied(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input @ self.weight.t()


class Adapted(nn.Linear):
    """As in LoRA: something is added beside the weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.down, self.up = nn.Linear(self.in_features, 2, bias=False), nn.Linear(2, self.out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + self.up(self.down(input))


class Quantised(nn.Linear):
    """As in quantisation-aware training, where zero is one of the values."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input, torch.fake_quantize_per_tensor_affine(self.weight, 0.05, 3, -128, 127), self.bias)


class OfTwo(nn.Linear):
    def forward(self, input: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]  # noqa: A002
        return F.linear(input, self.weight - scale)


class Counting(nn.Linear):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self.calls += 1
        return super().forward(F.dropout(input))


KINDS: dict[str, tuple[Callable[[], nn.Module], bool | None]] = {
    "standardised": (lambda: Standardised(3, 8, 3), False),
    "standardised in groups": (lambda: Standardised(4, 8, 3, groups=2, dilation=2), False),
    "standardised below": (lambda: StandardisedBelow(3, 8, 3, padding=1), False),
    "binary": (lambda: Binary(5, 4), False),
    "same": (lambda: Same(3, 8, 3, stride=2), True),
    "equalised": (lambda: Equalised(5, 4), True),
    "normalised": (lambda: Normalised(5, 4), True),
    "multiplied": (lambda: Multiplied(4, 4), True),
    "adapted": (lambda: Adapted(4, 4), True),
    "quantised": (lambda: Quantised(5, 4), True),
    "of two": (lambda: OfTwo(5, 4), None),
}


@pytest.mark.parametrize(("make", "keeps"), KINDS.values(), ids=KINDS)
def test_a_trial_finds_out_whether_stored_zeros_are_zeros_in_use(
    make: Callable[[], nn.Module], keeps: bool | None
) -> None:
    assert keeps_zeros(make(), "weight") is keeps


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_neither_device_nor_type_matters(device: str, dtype: torch.dtype) -> None:
    assert keeps_zeros(Standardised(3, 8, 3, device=device, dtype=dtype), "weight") is False
    assert keeps_zeros(Same(3, 8, 3, device=device, dtype=dtype), "weight") is True


def test_a_trial_leaves_the_layer_and_the_generator_alone() -> None:
    layer = Counting(3, 2)
    calls: list[object] = []
    layer.register_forward_hook(lambda *_: calls.append(0))
    before, state = layer.weight.detach().clone(), torch.random.get_rng_state()
    assert keeps_zeros(layer, "weight") is True
    assert torch.equal(layer.weight, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (layer.calls, calls, layer.weight.grad) == (0, [], None)


class Parallel(nn.Linear):
    """As in tensor parallelism: waits for other processes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        dist.all_reduce(outputs := super().forward(input))
        return outputs


def test_a_trial_waits_for_no_other_process(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert keeps_zeros(Parallel(3, 2), "weight") is None
    finally:
        dist.destroy_process_group()


def test_defaults_of_the_process_change_nothing() -> None:
    layers = Standardised(3, 8, 3), Same(3, 8, 3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert [keeps_zeros(layer, "weight") for layer in layers] == [False, True]
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_forward_that_is_bound_to_the_layer_is_not_tried() -> None:
    layer = nn.Linear(3, 2)
    layer.forward = layer.forward  # as accelerate and others patch it
    assert keeps_zeros(layer, "weight") is None


def test_a_layer_that_computes_with_other_weights_stays_dense() -> None:
    module = nn.Sequential(Standardised(3, 8, 3), nn.Linear(2, 2))
    reason = {candidate.name: candidate.reason for candidate in select_weights(module)}["0.weight"]
    assert reason.startswith(
        "transformed: Standardised computes with other weights than it stores; to mask what it stores"
    )


@pytest.mark.parametrize(("include", "masked"), [(["Conv2d"], False), (["0.*"], False), (["Standardised"], True)])
def test_naming_it_or_its_very_class_masks_it_all_the_same(include: list[str], masked: bool) -> None:
    module = nn.Sequential(Standardised(3, 8, 3), nn.Linear(2, 2))
    plan = select_weights(module, include=[*include, "1.weight"])
    assert (plan[0].reason == "") == masked
    if masked:
        (remark,) = plan.remarks
        assert remark.startswith("0.weight: the forward of Standardised computes with other weights")


def test_a_layer_that_cannot_be_tried_is_masked_and_named() -> None:
    plan = select_weights(nn.Sequential(OfTwo(3, 2), OfTwo(2, 2), nn.Linear(2, 2)))
    assert [candidate.name for candidate in plan.masked] == ["0.weight", "1.weight", "2.weight"]
    (remark,) = plan.remarks
    assert remark.startswith("0.weight, 1.weight: the forward of OfTwo may compute with other weights than it stores")
    assert "exclude=['OfTwo']" in remark


def test_torchs_own_layers_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise AssertionError

    monkeypatch.setattr("lightning_sparse.masks.layers.keeps_zeros", fail)
    layers = [nn.Linear(2, 2), nn.Conv2d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3), nn.MultiheadAttention(2, 1)]
    assert len(select_weights(nn.ModuleList(layers)).masked) == 5
