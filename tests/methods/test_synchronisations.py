"""How often an update waits for the device: a constant, whatever the number of layers.

On a GPU ``int(tensor)``, ``tensor.tolist()`` and ``nonzero()`` wait until all that was launched is done. Here the code
for GPUs runs on the CPU, and those operations are counted; where there is a GPU, torch itself counts them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_sparse import DSR, DST, EAST, FGGP, GMP, MEST, SET, SNFS, GraNet, RigL, SparseMethod
from lightning_sparse.functional import masks
from lightning_sparse.functional.selection import kth_smallest, largest, smallest
from lightning_sparse.schedules import Constant

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 12
EVERY_STEP: dict[str, Any] = {"drop_fraction": Constant(0.3), "update_every": 1, "stop": STEPS - 1}
METHODS: dict[str, Callable[[], SparseMethod]] = {
    "gmp": lambda: GMP(0.9, update_every=1, stop=STEPS - 1),
    "gmp-global": lambda: GMP(0.9, allocation="global", update_every=1, stop=STEPS - 1),
    "fggp": lambda: FGGP(0.9, update_every=1, stop=STEPS - 1),
    "set": lambda: SET(0.9, **EVERY_STEP),
    "rigl": lambda: RigL(0.9, **EVERY_STEP, update_replaces_step=False),
    "rigl-without-regrowth": lambda: RigL(0.9, **EVERY_STEP, update_replaces_step=False, regrow=False),
    "east": lambda: EAST(0.9, **EVERY_STEP, cycles=0, phasing=False, sharing=False),
    "granet": lambda: GraNet(0.9, **EVERY_STEP),
    "mest": lambda: MEST(0.9, **EVERY_STEP),
    "mest-soft": lambda: MEST(0.9, **EVERY_STEP, soft=True),
    "snfs": lambda: SNFS(0.9, **EVERY_STEP),
    "dsr": lambda: DSR(0.9, **EVERY_STEP),
    "dst": lambda: DST(1e-4),
}
AT_MOST = 6
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


class Layers(L.LightningModule):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.network = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(STEPS * 4, 16), batch_size=4)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Waits(TorchDispatchMode):
    """Counts the operations whose results the CPU waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for index in arg
        )
        name = func._schema.name.removeprefix("aten::")
        self.count += name in WAITING or (name.startswith("index") and by_mask)
        return func(*args, **(kwargs or {}))


class Counted(L.Callback):
    """Lets ``method`` work within ``waits``, and notes how often each step had to wait."""

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.of_steps: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before_step, after_step = self.method.before_step, self.method.after_step
        self.method.before_step = lambda *args: self._count(before_step, *args)  # type: ignore[method-assign, misc]
        self.method.after_step = lambda *args: self._count(after_step, *args)  # type: ignore[method-assign, misc]

    def _count(self, hook: Callable[..., None], *args: Any) -> None:
        if torch.cuda.is_available():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                hook(*args)
                torch.cuda.set_sync_debug_mode("default")
            self.of_steps[-1] += sum("synchronizing" in str(warning.message) for warning in caught)
        else:
            with Waits() as waits:
                hook(*args)
            self.of_steps[-1] += waits.count

    def on_train_batch_start(self, *_: Any) -> None:
        self.of_steps.append(0)


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "on_cpu", lambda tensor: False)


def waits_of(make: Callable[[], SparseMethod], layers: int) -> list[int]:
    L.seed_everything(0, verbose=False)
    method = make()
    counted = Counted(method)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=1,
        callbacks=[counted, method],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Layers(layers))
    assert method.registry.num_updates >= STEPS // 2 or isinstance(method, DST)
    return counted.of_steps


@pytest.mark.filterwarnings("ignore:.*hardly any gradient reaches")  # through twelve such layers
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("name", METHODS)
def test_an_update_waits_as_often_with_twelve_layers_as_with_three(name: str) -> None:
    few, many = waits_of(METHODS[name], 3), waits_of(METHODS[name], 12)
    assert few == many
    assert 0 < max(many) <= AT_MOST


def test_the_count_sees_what_waits() -> None:
    tensor = torch.tensor([1.0, 0.0, 2.0])
    with Waits() as waits:
        int(tensor.count_nonzero())
        assert waits.count == 1
        tensor.nonzero()
        assert waits.count == 2
        tensor[tensor > 0]
        assert waits.count == 3
        bool(tensor.isnan().any())
        assert waits.count == 4


@pytest.mark.parametrize("select", [smallest, largest])
def test_a_selection_as_on_a_gpu_is_that_of_the_cpu(
    select: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (1, 7, 5_000, 50_000):
        scores = torch.randn(size, generator=generator).mul(4).round()  # many ties
        among = torch.rand(size, generator=generator) < 0.6
        among[0] = True
        scores[1::11], scores[2::13] = torch.inf, -torch.inf
        for k in {1, max(1, int(among.sum()) // 2), int(among.sum())}:
            here = select(scores, k, among, key=torch.abs)
            with monkeypatch.context() as patched:
                patched.setattr(masks, "on_cpu", lambda tensor: False)
                assert torch.equal(select(scores, k, among, key=torch.abs), here)
                assert torch.equal(kth_smallest(scores, k), scores.sort().values[k - 1])


def test_on_a_gpu_a_selection_that_finds_too_few_gives_those(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "on_cpu", lambda tensor: False)
    scores = torch.tensor([1.0, torch.nan, 3.0])
    everything = torch.ones(3, dtype=torch.bool)
    assert smallest(scores, 3, everything).tolist() == [False, False, False]
    assert smallest(scores, 2, everything).tolist() == [True, False, True]


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_weights_of_nan_are_named_when_they_cannot_be_ranked_on_a_gpu() -> None:
    module = Layers(2)
    with torch.no_grad():
        module.get_parameter("network.1.weight")[:, :15] = torch.nan
    with pytest.raises(ValueError, match=r"network\.1\.weight has \d+ active weights after an update, but its budget"):
        L.Trainer(
            accelerator="auto", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[GMP(0.9, update_every=1, stop=5), _Finite()],
        ).fit(module)  # fmt: skip


class _Finite(L.Callback):
    """Gives finite gradients, so that the method does not wait for them."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(1.0)
