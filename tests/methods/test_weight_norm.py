"""The direction of a weight norm, masked by name: outputs keep weights, or a message stops training first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrizations

from lightning_sparse import GMP, SNIP, FixedMask, RigL, TopKAST
from tests.helpers import ToyModel, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# The older function, by the second name.
NAMES = {
    parametrizations.weight_norm: "network.2.parametrizations.weight.original1",
    nn.utils.weight_norm: "network.2.weight_v",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*under weight norm, an output becomes NaN"),
    pytest.mark.filterwarnings("ignore:.*will have no more than one weight per output"),
]


def normed(kind: Callable[..., nn.Module], **kwargs: Any) -> ToyModel:
    """Three layers, of which the second, of 16 outputs with 16 weights each, has a weight norm."""
    torch.manual_seed(0)
    model = ToyModel()
    middle = kind(nn.Linear(16, 16), **kwargs)
    model.network = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), middle, nn.Tanh(), nn.Linear(16, 3))
    return model


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("method", [RigL, TopKAST, GMP, SNIP])
def test_a_mask_that_would_make_an_output_nan_stops_training(method: Any, kind: Any, tmp_path: Path) -> None:
    model = normed(kind)
    its = method(0.95, include=["*", NAMES[kind]])
    message = r"output\(s\) of network\.2\..* no weight other than zero.*Lower the sparsity, leave the weight out"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, callbacks=[its]).fit(model)
    assert model(torch.randn(2, 12)).isfinite().all()


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("method", [RigL, TopKAST, GMP])
def test_a_mask_that_leaves_each_output_some_weights_trains(method: Any, kind: Any, tmp_path: Path) -> None:
    model = normed(kind)
    make_trainer(tmp_path, callbacks=[method(0.3, include=["*", NAMES[kind]])]).fit(model)
    assert model(torch.randn(2, 12)).isfinite().all()
    assert int((model.network[2].weight == 0).sum()) > 0  # type: ignore[index, union-attr]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("dim", "refused"), [(0, "outputs"), (1, "inputs"), (None, "neither")])
@pytest.mark.parametrize("pruned", ["outputs", "inputs"])
def test_what_counts_is_what_the_norm_is_taken_of(
    pruned: str, dim: int | None, refused: str, kind: Any, tmp_path: Path
) -> None:
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[3] = False
    mask = mask if pruned == "outputs" else mask.T.contiguous()
    fixed, model = FixedMask({NAMES[kind]: mask}, include=[NAMES[kind]]), normed(kind, dim=dim)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if pruned == refused:
        with pytest.raises(MisconfigurationException, match=r"leave 1 output\(s\) of network\.2"):
            make_trainer(tmp_path, callbacks=[fixed]).fit(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    else:
        make_trainer(tmp_path, callbacks=[fixed], max_epochs=1).fit(model)
        assert all(value.isfinite().all() for value in model.parameters())
