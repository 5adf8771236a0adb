"""What accuracy one-shot pruning costs a trained transformer, and what tuning gives back: for docs/fine-tuning.md.

A vision transformer from transformers (two layers of 64, from its config) is trained on scikit-learn's 8 x 8 digits,
then pruned at once to each sparsity: by magnitude and by Wanda, without and with 2:4. Its classifier stays dense. The
network that was pruned to 70 % by magnitude, all layers alike, is then tuned for five epochs: with fixed masks; with
fixed masks and the dense network as a teacher; and by adapters of rank 4 (LoRA) that are masked in training, or only
when merged.

Accuracy is on the 360 held-out images, after the last epoch; mean ± sample standard deviation over seeds::

    python -m benchmarks.fine_tuning --seeds 0 1 2
    python -m benchmarks.fine_tuning --docs
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.harness import conditions, quiet_trainer
from benchmarks.pages import as_markdown, put_into
from benchmarks.runs import begin, mean_and_deviation
from lightning_sparse import FixedMask, prune
from lightning_sparse.masks.patterns import AnyPattern
from lightning_sparse.zoo import DigitsDataModule

DENSE_EPOCHS, TUNING_EPOCHS = 15, 5
HEAD = ["*classifier.*"]
PAGE = Path(__file__).parents[1] / "docs" / "fine-tuning.md"
RESULTS = Path(__file__).parent / "results" / "fine_tuning.json"


class Tuned(L.LightningModule):
    """A classifier, with or without a teacher.

    Args:
        network: What is trained.
        teacher: A network that it also learns from, if any.
    """

    def __init__(self, network: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.teacher = teacher

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy; with a teacher, half of it plus two times the divergence at temperature 2."""
        images, labels = batch
        logits = self.network(pixel_values=images).logits
        loss = F.cross_entropy(logits, labels)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            target = self.teacher(pixel_values=images).logits
        own, its = F.log_softmax(logits / 2.0, dim=1), F.log_softmax(target / 2.0, dim=1)
        return 0.5 * loss + 2.0 * F.kl_div(own, its, reduction="batchmean", log_target=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        correct = self.network(pixel_values=batch[0]).logits.argmax(dim=1) == batch[1]
        self.log("accuracy", correct.double().mean(), batch_size=len(correct))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the parameters that are trained."""
        return torch.optim.AdamW([its for its in self.network.parameters() if its.requires_grad], lr=1e-3)


class MaskedLoRA(nn.Module):
    """W + 2 (B A) ⊙ M: a change of low rank, which keeps the zeros of W; or the same without M.

    Args:
        weight: W.
        masked: Whether to use M.
        rank: The rank of the change.
    """

    def __init__(self, weight: Tensor, *, masked: bool = True, rank: int = 4) -> None:
        super().__init__()
        self.mask = nn.Buffer(weight.detach() != 0 if masked else torch.ones_like(weight, dtype=torch.bool))
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return weight + 2.0 * (self.b @ self.a) * self.mask


def fit(network: nn.Module, data: DigitsDataModule, epochs: int, *callbacks: L.Callback, teacher: Any = None) -> float:
    """Train, and return the accuracy in percent."""
    trainer = quiet_trainer(max_epochs=epochs, check_val_every_n_epoch=max(1, epochs), callbacks=list(callbacks))
    trainer.fit(Tuned(network, teacher), data)
    return accuracy(network, data)


@torch.no_grad()
def accuracy(network: nn.Module, data: DigitsDataModule) -> float:
    """Accuracy on the held-out images, in percent."""
    network.eval()
    right = [(network(pixel_values=x).logits.argmax(dim=1) == y).double() for x, y in data.val_dataloader()]
    return 100.0 * float(torch.cat(right).mean())


def adapted(network: nn.Module, data: DigitsDataModule, *, masked: bool) -> float:
    """Train adapters of the linear layers of a pruned network, merge them, and return the accuracy in percent."""
    masks = {name: its.detach() != 0 for name, its in network.named_parameters() if its.dim() > 1}
    network.requires_grad_(False)
    layers = [
        module for name, module in network.named_modules() if isinstance(module, nn.Linear) and "classifier" not in name
    ]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", MaskedLoRA(layer.weight, masked=masked))
    fit(network, data, TUNING_EPOCHS)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    with torch.no_grad():
        for name, its in network.named_parameters():
            if name in masks:
                its.mul_(masks[name])  # W + (B A) ⊙ M, as W has these zeros
    return accuracy(network, data)


def measure(seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each measurement with one seed."""
    begin(seed)
    data = DigitsDataModule()
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    config.num_labels = 10
    dense = ViTForImageClassification(config)
    yield {"what": "dense", "sparsity": 0.0, "seed": seed, "accuracy": fit(dense, data, DENSE_EPOCHS), "zeros": 0}
    calibration = [{"pixel_values": data.train_set.images[:256]}]
    ways: dict[str, dict[str, Any]] = {
        "magnitude, all layers together": {},
        "magnitude, layers alike": {"allocation": "uniform"},
        "Wanda, each output alike": {"scores": "wanda", "batches": calibration},
        "Wanda, layers alike": {"scores": "wanda", "batches": calibration, "pattern": AnyPattern()},
        "magnitude, 2:4": {"allocation": "uniform", "pattern": "2:4"},
        "Wanda, 2:4": {"scores": "wanda", "batches": calibration, "pattern": "2:4"},
    }
    for sparsity in (0.5, 0.6, 0.7):
        for way, arguments in ways.items():
            if "2:4" in way and sparsity != 0.5:
                continue
            network = deepcopy(dense)
            prune(network, sparsity, exclude=HEAD, **arguments)
            yield _row(way, seed, accuracy(network, data), network, sparsity)
    pruned = deepcopy(dense)
    prune(pruned, 0.7, exclude=HEAD, allocation="uniform")
    tuned = deepcopy(pruned)  # a copy has no record of masks, so its zeros are the masks
    yield _row("then fixed masks", seed, fit(tuned, data, TUNING_EPOCHS, FixedMask(exclude=HEAD)), tuned)
    taught = deepcopy(pruned)
    yield _row(
        "then fixed masks and a teacher",
        seed,
        fit(taught, data, TUNING_EPOCHS, FixedMask(exclude=HEAD), teacher=deepcopy(dense).requires_grad_(False)),
        taught,
    )
    for name, masked in (("then LoRA, masked throughout", True), ("then LoRA, masked when merged", False)):
        network = deepcopy(pruned)
        yield _row(name, seed, adapted(network, data, masked=masked), network)


def _row(what: str, seed: int, its: float, network: nn.Module, sparsity: float = 0.7) -> dict[str, Any]:
    return {"what": what, "sparsity": sparsity, "seed": seed, "accuracy": its, "zeros": zeros_of(network)}


def zeros_of(network: nn.Module) -> int:
    """The number of zeros in the weights of a network."""
    return sum(its.numel() - int(its.count_nonzero()) for its in network.parameters() if its.dim() > 1)


def tabulate(rows: Sequence[dict[str, Any]]) -> Table:
    """Make the table: mean ± sample standard deviation, and the number of zeros."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["what"], row["sparsity"]].append(row)
    table = Table("network", "sparsity", "accuracy, %", "zeros")
    for (what, sparsity), its in cells.items():
        zeros = " / ".join(f"{count:,}" for count in sorted({row["zeros"] for row in its}))
        table.add_row(what, f"{sparsity:g}", mean_and_deviation([row["accuracy"] for row in its]), zeros)
    return table


def figures(content: dict[str, Any]) -> str:
    """The text for the documentation: the table, and how it was measured."""
    measured_on = ", ".join(f"{name} {value}" for name, value in content["conditions"].items())
    return f"{as_markdown(tabulate(content['rows']))}\n\n`python -m benchmarks.fine_tuning`: {measured_on}."


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or write the results into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS, help="where the figures are kept")
    parser.add_argument("--docs", action="store_true", help="measure nothing; write what is in --json into the docs")
    arguments = parser.parse_args(argv)
    if arguments.docs:
        put_into(PAGE, "fine-tuning", figures(json.loads(arguments.json.read_text())))
        return
    content = {"conditions": conditions(), "rows": [row for seed in arguments.seeds for row in measure(seed)]}
    arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    print(figures(content))


if __name__ == "__main__":
    main()
