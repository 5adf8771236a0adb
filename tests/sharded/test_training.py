"""What a training does beside its masks: precision, clipping, validation, other networks, other ways to build them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn import functional as F

from lightning_sparse import DST, FGGP, RigL
from lightning_sparse.methods import SparseMethod
from lightning_sparse.testing import OPTIMIZERS, ConvToy
from lightning_sparse.testing.toys import SGD
from tests.sharded.processes import ONE, Mesh, ShardedToy, assert_same, fit, forked, recorded

# clip_grad_norm_ divides by the norm plus 1e-6. Torch 2.9 adds that to each process' part of the norm.
ROUNDING_OF_NORMS = 1e-5 if torch.__version__.startswith("2.9.") else 1e-9

TIMES: dict[str, Any] = {"update_every": 2, "stop": 11}


RIGL: Callable[[], SparseMethod] = partial(RigL, 0.8, **TIMES)


class Single(ShardedToy):
    """In single precision."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(OPTIMIZERS[optimizer], double=False)


Run = tuple[Callable[[], SparseMethod], Callable[[], Any], dict[str, Any]]


def train(mesh: Mesh | str, name: str, run: Run, root: Path) -> None:
    """Train; what fails is told in a file."""
    make, model, more = run
    try:
        fit(mesh, make(), root / f"{name}.pt", model, **more)
    except Exception:
        (root / f"{name}.error").write_text(traceback.format_exc())


def train_all(mesh: Mesh | str, runs: dict[str, Run], root: Path) -> None:
    for name, run in runs.items():
        train(mesh, name, run, root)


def compare(
    one: Mesh | str,
    other: Mesh,
    runs: dict[str, Run],
    tmp_path: Path,
    *,
    bitwise: bool = False,
) -> None:
    """Train everything over two meshes, and compare the masks and weights."""
    for number, mesh in enumerate((one, other)):
        root = tmp_path / str(number)
        root.mkdir()
        forked(2 if mesh == "ddp" else int(mesh[0]) * int(mesh[1]), train_all, mesh, runs, root)
        errors = [path.read_text() for path in root.glob("*.error")]
        assert not errors, errors[0]
    for name in runs:
        found, expected = (recorded(tmp_path / number / f"{name}.pt") for number in "10")
        rtol = ROUNDING_OF_NORMS if name == "clipped" else 1e-9
        assert_same(found, expected, bitwise=bitwise, rtol=rtol, what=name)


def test_fsdp_is_ddp_to_the_bit(tmp_path: Path) -> None:
    methods: dict[str, Callable[[], SparseMethod]] = {
        "fggp": partial(FGGP, 0.8, **TIMES),
        "rigl": partial(RigL, 0.8, **TIMES),
        "dst": partial(DST, 0.03),
    }
    of = {
        f"{name}-{optimizer}": (method, partial(Single, optimizer), {})
        for name, method in methods.items()
        for optimizer in ("sgd", "adamw")
    }
    compare("ddp", (2, 1), of, tmp_path, bitwise=True)


class Convolutions(ShardedToy):
    """The convolutional toy, whose grouped and one-by-one layers are sharded too."""

    def __init__(self) -> None:
        super().__init__()
        toy = ConvToy(batch_size=16)
        self.network, self.train_data, self.val_data = toy.network.double(), toy.train_data, toy.val_data
        self.network[1] = nn.Identity()  # BatchNorm's statistics are those of each part of a batch


class Recomputed(ShardedToy):
    """Activations are computed again in the backward."""

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        apply_activation_checkpointing(network, check_fn=lambda child: child is network[0])
        super().shard(network, data, tensor)


class Tied(ShardedToy):
    """An embedding whose weight is the last layer's too, in one wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16))
        torch.manual_seed(0)
        for parameter in self.network.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.network[4].weight = self.network[0].weight
        self.double()

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        fully_shard(network, mesh=data)


class Embedding(ShardedToy):
    """A language model's: the embedding and the last layer have one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        words, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        head.weight = words.weight
        self.network = nn.Sequential(words, nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), head).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network((3 * inputs[:, :3].abs()).long().clamp(max=9))

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        fully_shard(network, mesh=data)


class Compiled(ShardedToy):
    backend = "aot_eager"

    def configure_model(self) -> None:
        super().configure_model()
        if not isinstance(self.network, torch._dynamo.OptimizedModule):
            self.network.compile(backend=self.backend)


class Inductor(Compiled):
    backend = "inductor"


class Offloaded(ShardedToy):
    """Its shards lie in the memory of the CPU, as the policy says."""

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        fully_shard(network, mesh=data, offload_policy=CPUOffloadPolicy(pin_memory=False))


class Manual(ShardedToy):
    """Two optimizers, of which one steps half as often."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.batches = False, 0

    def configure_optimizers(self) -> Any:
        first, *rest = self.network.children()
        others = [parameter for child in rest for parameter in child.parameters()]
        return SGD(first.parameters()), torch.optim.AdamW(others, lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        parts, part = self.share()
        size = self.batch_size // parts
        begins = (self.batches * self.batch_size + part * size) % len(self.train_data)
        inputs, labels = self.train_data[begins : begins + size]
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(inputs.to(self.dtype)), labels))
        optimizers[0].step()
        if self.batches % 2:
            optimizers[1].step()
        self.batches += 1


class Copied(ShardedToy):
    """Each pair of processes holds one copy of all shards (HSDP)."""

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        if data.size() == 4:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
            for child in (network[0], network[2], network[4], network):
                fully_shard(child, mesh=mesh)


WAYS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "convolutions": (Convolutions, {}),
    # After a validation FSDP2 leaves the whole of some weights in their places.
    "validated": (ShardedToy, {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 1}),
    "clipped": (ShardedToy, {"gradient_clip_val": 0.05}),
    "clipped by value": (ShardedToy, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "recomputed": (Recomputed, {}),
    "tied": (Tied, {}),
    "embedding": (Embedding, {}),
    "offloaded": (Offloaded, {}),
    "manual": (Manual, {"max_steps": 24}),
    "compiled": (Compiled, {}),
    "accumulated": (ShardedToy, {"accumulate_grad_batches": 2}),
}


def test_whatever_else_a_training_does(tmp_path: Path) -> None:
    of: dict[str, Run] = {name: (RIGL, model, more) for name, (model, more) in WAYS.items()}
    compare(ONE, (2, 1), of, tmp_path)


@pytest.mark.slow
def test_inductor_compiles_what_is_sharded(tmp_path: Path) -> None:
    compare(ONE, (2, 1), {"rigl": (RIGL, Inductor, {})}, tmp_path)


@pytest.mark.slow
def test_shards_of_which_there_are_copies(tmp_path: Path) -> None:
    fit_pattern = partial(RigL, 0.5, pattern="2:4", **TIMES)
    compare(ONE, (4, 1), {"rigl": (RIGL, Copied, {}), "2:4": (fit_pattern, Copied, {})}, tmp_path)
