"""A small transformer like Llama, trained sparse on several processes: ``python -m lightning_sparse.zoo.llama``.

By default, two processes on a CPU share its weights by FSDP2, and RigL keeps two of every four inputs. On GPUs or
several machines, start this file with ``torchrun``. ``--tensor 2`` divides the layers themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import RigL, SparsityMonitor

__all__ = ["LanguageModel", "Llama", "LlamaConfig", "main"]


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a transformer.

    Attributes:
        vocabulary: Number of tokens.
        width: Width of the residual stream, a multiple of ``heads``.
        inner: Width inside each feed-forward layer.
        layers: Number of blocks.
        heads: Heads of attention.
        length: Tokens in a sequence.
    """

    vocabulary: int = 64
    width: int = 64
    inner: int = 128
    layers: int = 2
    heads: int = 4
    length: int = 32

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.width // self.heads


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )

    def forward(self, inputs: Tensor, rotation: Tensor) -> Tensor:
        # With tensor parallelism, this process has only some of the heads.
        parts = (proj(inputs).unflatten(-1, (-1, self.head_width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (part.transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(
            _rotated(query, rotation), _rotated(key, rotation), value, is_causal=True
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.inner, bias=False)
        self.up_proj = nn.Linear(config.width, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(inputs)) * self.up_proj(inputs))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.width), nn.RMSNorm(config.width)
        self.attention, self.mlp = _Attention(config), _FeedForward(config)

    def forward(self, inputs: Tensor, rotation: Tensor) -> Tensor:
        inputs = inputs + self.attention(self.attention_norm(inputs), rotation)
        return inputs + self.mlp(self.mlp_norm(inputs))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """Pre-norm blocks of rotary attention and SwiGLU. The output layer uses the embedding's weight.

    Args:
        config: Its sizes.

    Example:
        >>> network = Llama(LlamaConfig())
        >>> network(torch.zeros(2, 8, dtype=torch.int64)).shape
        torch.Size([2, 8, 64])
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of the next token, shape ``(batch, length, vocabulary)``."""
        rotation = _rotation(tokens.shape[1], self.config.head_width, tokens.device)
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, rotation)
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]

    def shard(self, data: DeviceMesh, tensor: DeviceMesh) -> None:
        """Divide the layers over the mesh ``tensor``, and the resulting parts over the mesh ``data``."""
        plan: dict[str, Any] = {
            **{f"attention.{name}_proj": ColwiseParallel() for name in "qkv"},
            "attention.o_proj": RowwiseParallel(),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        for block in self.blocks:
            if tensor.size() > 1:
                parallelize_module(block, tensor, plan)
            if data.size() > 1:
                fully_shard(block, mesh=data)
        if data.size() > 1:
            fully_shard(self, mesh=data)


class LanguageModel(L.LightningModule):
    """Learns sequences in which a token mostly follows from the one before.

    Args:
        config: Sizes of the network.
        batch_size: Sequences in a batch, for each process.
    """

    def __init__(self, config: LlamaConfig, batch_size: int = 16) -> None:
        super().__init__()
        self.config, self.batch_size = config, batch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # every process makes the same weights, and keeps its part of them
            self.network = Llama(config)

    def configure_model(self) -> None:
        """Shard the network over the processes of the strategy. Lightning may call this more than once."""
        if self.device_mesh is not None and not self._is_sharded:
            self.network.shard(self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"])

    @property
    def _is_sharded(self) -> bool:
        return any(hasattr(parameter, "device_mesh") for parameter in self.network.parameters())

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The cross entropy of the next token."""
        (tokens,) = batch
        logits = self.network(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """1024 sequences of a random walk through the vocabulary; Lightning gives each process its part."""
        generator = torch.Generator().manual_seed(0)
        number, length = 1024, self.config.length + 1
        steps = torch.randint(1, 4, (number, length), generator=generator)
        first = torch.randint(self.config.vocabulary, (number, 1), generator=generator)
        return DataLoader(TensorDataset((first + steps.cumsum(1)) % self.config.vocabulary), batch_size=self.batch_size)


def main(argv: Sequence[str] | None = None) -> LanguageModel:
    """Train, and print the registry and the loss."""
    parser = argparse.ArgumentParser("python -m lightning_sparse.zoo.llama", description=__doc__)
    parser.add_argument("--data", type=int, default=2, help="processes that share batches and weights (FSDP2)")
    parser.add_argument("--tensor", type=int, default=1, help="processes that share each layer (tensor parallelism)")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--accelerator", default="cpu", help="cpu, or cuda")
    arguments = parser.parse_args(argv)
    model = LanguageModel(LlamaConfig())
    method = RigL(sparsity=0.5, pattern="2:4", allocation="uniform")
    trainer = L.Trainer(
        accelerator=arguments.accelerator,
        devices=arguments.data * arguments.tensor // arguments.nodes,
        num_nodes=arguments.nodes,
        strategy=ModelParallelStrategy(data_parallel_size=arguments.data, tensor_parallel_size=arguments.tensor),
        max_steps=arguments.steps,
        callbacks=[method, SparsityMonitor()],
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    trainer.fit(model)
    loss = float(trainer.callback_metrics["train_loss"])
    if trainer.is_global_zero:
        # Guessing gives ln 64 = 4.16; the entropy of a step is ln 3 = 1.10.
        print(f"{method.registry}; loss {loss:.2f} (guessing: 4.16, best possible: 1.10)")  # noqa: T201  # a command
    return model


def _rotation(length: int, width: int, device: torch.device) -> Tensor:
    """Cosines and sines of rotary positions, shape ``(2, length, width)``."""
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(torch.arange(length, device=device), frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def _rotated(heads: Tensor, rotation: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * rotation[0] + torch.cat([-second, first], dim=-1) * rotation[1]


if __name__ == "__main__":
    main()
