from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_sparse.masks import MaskGroup, MaskRegistry, select_weights
from lightning_sparse.masks.randomness import random_scores


def weights_of_two_layers() -> MaskGroup:
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (group,) = MaskRegistry().claim("method", select_weights(module).masked, [optimizer])
    return group


def test_random_scores_depend_on_seed_step_and_name_alone() -> None:
    first, second = weights_of_two_layers()[0], weights_of_two_layers()[0]
    torch.manual_seed(1)
    scores = random_scores(first, seed=3, step=5)
    torch.manual_seed(2)
    assert torch.equal(scores, random_scores(second, seed=3, step=5))
    assert not torch.equal(scores, random_scores(first, seed=4, step=5))
    assert not torch.equal(scores, random_scores(first, seed=3, step=6))


def test_random_scores_differ_between_weights_of_one_shape() -> None:
    first, second = weights_of_two_layers()
    assert not torch.equal(random_scores(first, 0, 0), random_scores(second, 0, 0))


def test_random_scores_leave_the_global_generator_alone() -> None:
    weight = weights_of_two_layers()[0]
    before: Tensor = torch.random.get_rng_state()
    random_scores(weight, 0, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
