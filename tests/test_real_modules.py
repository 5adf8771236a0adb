"""Modules that nobody here wrote, fine-tuned as they are: torchvision's, Hugging Face's, Lightning's own, and a user's.

What is true of a training is asked of the module's own parameters and of its checkpoints, not of the callback.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.data import DataLoader, Dataset
from torchvision.models import (
    MobileNetV3,
    ResNet,
    VisionTransformer,
    efficientnet_b0,
    regnet_y_400mf,
    resnet18,
    resnet34,
    shufflenet_v2_x1_0,
)
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import Bottleneck

from lightning_sparse import (
    DST,
    EAST,
    FGGP,
    DyReLUPhasing,
    FixedMask,
    RigL,
    SparseMethod,
    report,
    save_masks,
    share_weights,
    unshare_weights,
)
from lightning_sparse.masks import select_weights
from lightning_sparse.masks.plan import canonical_name
from lightning_sparse.modules.dyrelu import phased_relus
from lightning_sparse.modules.weight_sharing import shared_convolutions
from tests.helpers import make_trainer

# The second training writes where the first one did.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

SPARSITY = 0.8
STEPS = 8  # of an epoch; two are trained
CLASSES = 3


# Data that can be learned in sixteen steps.


def _generator(index: int) -> torch.Generator:
    return torch.Generator().manual_seed(index)


def images(index: int, *, size: int = 16, batch: int = 12) -> Batch:
    """Noise, and the colour of its class over it."""
    labels = torch.arange(batch) % CLASSES
    pixels = 0.3 * torch.randn(batch, 3, size, size, generator=_generator(index))
    pixels[torch.arange(batch), labels] += 1.0
    return {"pixel_values": pixels, "labels": labels}


def sentences(index: int, *, vocabulary: int = 64, length: int = 10, batch: int = 12) -> Batch:
    """Tokens of one third of the vocabulary, and which third."""
    labels = torch.arange(batch) % CLASSES
    words = torch.randint(vocabulary // CLASSES, (batch, length), generator=_generator(index))
    tokens = words + labels.unsqueeze(1) * (vocabulary // CLASSES)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def sequences(index: int, *, vocabulary: int = 64, length: int = 10, batch: int = 12) -> Batch:
    """Tokens that count upwards, from anywhere."""
    first = torch.randint(vocabulary, (batch, 1), generator=_generator(index))
    tokens = (first + torch.arange(length)) % vocabulary
    return {"input_ids": tokens, "labels": tokens.clone()}


def loader(batches: Iterable[Batch]) -> DataLoader[Batch]:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


# The modules around them, as users write them.


class FineTuner(L.LightningModule):
    """A network, a loss and AdamW."""

    def __init__(self, network: nn.Module, batches: Callable[[int], Batch], loss: Loss, lr: float = 3e-3) -> None:
        super().__init__()
        self.network = network
        self.batches = batches
        self.loss = loss
        self.lr = lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(self.network, batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.network, batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Batch]:
        return loader(self.batches(index) for index in range(STEPS))

    def val_dataloader(self) -> DataLoader[Batch]:
        return loader([self.batches(1000)])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(network(batch["pixel_values"]), batch["labels"])


def loss_of_transformers(network: nn.Module, batch: Batch) -> Tensor:
    return network(**batch).loss


def classifier_of_images(network: Callable[[], nn.Module], **arguments: Any) -> L.LightningModule:
    return FineTuner(network(), partial(images, **arguments), cross_entropy)


def hugging_face(kind: Any, config: Any, batches: Callable[[int], Batch], **settings: Any) -> L.LightningModule:
    return FineTuner(kind(config(**settings)), batches, loss_of_transformers)


def vision_transformer() -> VisionTransformer:
    """Two layers; its head begins at zero, as torchvision has it."""
    return VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=CLASSES)


def vision_transformer_with_a_new_head() -> VisionTransformer:
    network = vision_transformer()
    network.heads = nn.Sequential(nn.Linear(32, CLASSES))
    return network


_BLOCK = partial(InvertedResidualConfig, kernel=3, stride=1, dilation=1, width_mult=1.0)
_MOBILE = [
    _BLOCK(16, expanded_channels=16, out_channels=16, use_se=True, activation="RE"),
    _BLOCK(16, expanded_channels=32, out_channels=24, use_se=False, activation="HS"),
]
_TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
_TEXT: dict[str, Any] = _TINY | {"vocab_size": 64, "max_position_embeddings": 16}


def convnext() -> ConvNeXt:
    """Two stages of two blocks."""
    return ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=CLASSES, layer_scale=0.1)


def llama() -> L.LightningModule:
    kinds = transformers.LlamaForCausalLM, transformers.LlamaConfig
    return hugging_face(*kinds, sequences, num_key_value_heads=1, **_TEXT)


@dataclass(frozen=True)
class Case:
    """A module; what of it has two dimensions or more and stays dense."""

    name: str
    make: Callable[[], L.LightningModule]
    dense: Sequence[str] = ()
    east: Mapping[str, Any] = field(default_factory=lambda: {"phasing": False, "sharing": False})
    """Without the parts of EAST that such a network has no place for."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    falls: bool = True
    """Whether the loss has something to fall to."""
    alpha: float = 0.004
    """For DST."""
    dead: bool = False
    """Whether some weights never have a gradient; grown, they stay zero."""


NETWORKS = [
    Case(
        "torchvision-vit",
        partial(classifier_of_images, vision_transformer_with_a_new_head),
        dense=["*.class_token", "*.pos_embedding"],
    ),
    Case(
        "torchvision-convnext",  # depthwise convolutions, LayerNorm2d, scales of layers
        partial(classifier_of_images, convnext),
        dense=["*.layer_scale"],
    ),
    Case(
        "torchvision-mobilenet-v3",  # depthwise convolutions, squeeze and excitation, BatchNorm
        partial(
            classifier_of_images,
            partial(MobileNetV3, _MOBILE, last_channel=32, num_classes=CLASSES),
            size=32,
        ),
        east={"sharing": False},
    ),
    Case(
        "bert",
        partial(
            hugging_face,
            transformers.BertForSequenceClassification,
            transformers.BertConfig,
            sentences,
            num_labels=CLASSES,
            **_TEXT,
        ),
        dense=["*_embeddings.weight"],
    ),
    Case(
        "gpt2",  # Conv1D, whose weight is (in, out), and an lm_head tied to the embedding
        partial(
            hugging_face,
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config,
            sequences,
            vocab_size=64,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        ),
        dense=["*.wte.weight", "*.wpe.weight", "*.lm_head.weight"],
    ),
    Case(
        "llama",  # grouped queries, RMSNorm, an lm_head of its own
        llama,
        dense=["*.embed_tokens.weight"],
    ),
    Case(
        "t5",  # one embedding for encoder, decoder and lm_head, and positions that are an embedding
        partial(
            hugging_face,
            transformers.T5ForConditionalGeneration,
            transformers.T5Config,
            sequences,
            vocab_size=64,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        dense=["*.shared.weight", "*.embed_tokens.weight", "*.lm_head.weight", "*.relative_attention_bias.weight"],
    ),
]


# Modules with training loops of their own.


class Gan(L.LightningModule):
    """Two optimizers, stepped by hand; the generator by every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()
        )
        self.discriminator = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 16, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, 1),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        of_generator, of_discriminator = self.optimizers()  # type: ignore[misc]
        noise = torch.randn(len(batch["pixel_values"]), 8, 1, 1)

        self.toggle_optimizer(of_discriminator)
        real = self.discriminator(batch["pixel_values"])
        fake = self.discriminator(self.generator(noise).detach())
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)

        if batch_idx % 2:
            self.toggle_optimizer(of_generator)
            of_generator.zero_grad()
            self.manual_backward(F.softplus(-self.discriminator(self.generator(noise))).mean())
            of_generator.step()
            self.untoggle_optimizer(of_generator)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", F.softplus(-self.discriminator(batch["pixel_values"])).mean())

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.99)),
            torch.optim.Adam(self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.99)),
        ]

    def train_dataloader(self) -> DataLoader[Batch]:
        return loader(images(index, size=8) for index in range(STEPS))

    def val_dataloader(self) -> DataLoader[Batch]:
        return loader([images(1000, size=8)])


class OneCycle(FineTuner):
    """Learning rate and momentum change at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class CompiledHead(nn.Module):
    """A backbone, and a head that is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = vision_transformer()
        self.backbone.heads = nn.Sequential(nn.Identity())
        head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, CLASSES))
        self.head = torch.compile(head, backend="eager")

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.backbone(pixels))


class Checkpointed(nn.Module):
    """A network whose activations are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnext().features
        self.head = nn.Linear(32, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        features = checkpoint_sequential(self.body, 2, pixels, use_reentrant=False)
        return self.head(features.mean((2, 3)))


def with_one_cycle() -> L.LightningModule:
    return OneCycle(vision_transformer_with_a_new_head(), images, cross_entropy)


LOOPS = [
    Case("gan", Gan, dense=["*.original"], falls=False),
    Case("one-cycle", with_one_cycle, dense=["*.class_token", "*.pos_embedding"]),
    Case("compiled-head", partial(classifier_of_images, CompiledHead), dense=["*.class_token", "*.pos_embedding"]),
    Case("gradient-checkpointing", partial(classifier_of_images, Checkpointed), dense=["*.layer_scale"]),
    Case(
        "bf16-mixed-accumulated",
        with_one_cycle,
        dense=["*.class_token", "*.pos_embedding"],
        trainer={"precision": "bf16-mixed", "accumulate_grad_batches": 3},  # and the last two of an epoch
    ),
]


def demo_model() -> L.LightningModule:
    module = DemoModel()
    module.train_dataloader = BoringModel().train_dataloader  # it brings none
    return module


def lightning_transformer() -> L.LightningModule:
    return LightningTransformer(vocab_size=32)


class RandomTokens(Dataset[tuple[Tensor, Tensor]]):
    """What WikiText2 gives, without a download."""

    def __init__(self, download: bool = True) -> None:
        self.tokens = torch.randint(32, (STEPS, 11))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index, :-1], self.tokens[index, 1:]


# Random data, drawn anew at every fit.
_RANDOM: dict[str, Any] = {
    "falls": False,
    "trainer": {"limit_train_batches": 6, "limit_val_batches": 1},
    "alpha": 5e-4,
}

DEMOS = [
    Case("boring-model", BoringModel, **_RANDOM),
    Case("manual-optim-boring-model", ManualOptimBoringModel, **_RANDOM),
    Case("demo-model", demo_model, dead=True, **_RANDOM),
    Case("lightning-transformer", lightning_transformer, dense=["*.embedding.weight"], **_RANDOM),
]

CASES = [*NETWORKS, *LOOPS, *DEMOS]

_OFTEN: dict[str, Any] = {"update_every": 2, "stop": 0.7}


def fggp(case: Case) -> SparseMethod:
    return FGGP(SPARSITY, start=1, **_OFTEN)


def rigl(case: Case) -> SparseMethod:
    return RigL(SPARSITY, **_OFTEN)


def dst(case: Case) -> SparseMethod:
    return DST(alpha=case.alpha)


def east(case: Case) -> SparseMethod:
    return EAST(SPARSITY, update_every=2, cycle_update_every=1, **case.east)


def fixed_mask(case: Case) -> SparseMethod:
    return FixedMask()


METHODS = [fggp, rigl, dst, east, fixed_mask]


class Journal(L.Callback):
    """Keeps the losses; seeds dropout at each batch, so that a resumed training draws the same."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


def new(make: Callable[[], L.LightningModule]) -> L.LightningModule:
    """The module, the same at every call."""
    torch.manual_seed(0)
    return make()


@torch.no_grad()
def prune_by_magnitude(module: L.LightningModule) -> None:
    """What a user may have done long before: the smallest weights of each layer are zero."""
    for weight in select_weights(module).masked:
        values = weight.parameter.view(-1)
        values[values.abs().topk(int(SPARSITY * values.numel()), largest=False).indices] = 0.0


def fit(
    module: L.LightningModule,
    method: SparseMethod,
    root: Path,
    path: Path | None = None,
    also: Sequence[L.Callback] = (),
    **overrides: Any,
) -> list[float]:
    """Fit two epochs, with a checkpoint ``epoch=0.ckpt`` after the first; the losses."""
    journal = Journal()
    callbacks = [*also, method, journal, ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)]
    trainer = make_trainer(root, callbacks=callbacks, enable_checkpointing=True, **overrides)
    trainer.fit(module, ckpt_path=path)
    return journal.losses


def zeros(module: nn.Module, names: Sequence[str]) -> int:
    """Zeros in the parameters of those names."""
    return sum(int((module.get_parameter(name) == 0).sum()) for name in names)


def size(module: nn.Module, names: Sequence[str]) -> int:
    return sum(module.get_parameter(name).numel() for name in names)


def weights_to_mask(module: nn.Module, dense: Sequence[str] = ()) -> list[str]:
    """Every parameter of two dimensions or more but ``dense``."""
    return [
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.dim() > 1 and not any(fnmatchcase(name, pattern) for pattern in dense)
    ]


def zeros_at(sparsity: float, numel: int) -> int:
    """What is left of ``numel`` weights when the budget is rounded down."""
    return numel - int((1 - sparsity) * numel + 1e-9)


def check_zeros(module: nn.Module, names: Sequence[str], method: SparseMethod, case: Case, pruned_before: int) -> None:
    """As many as were asked for."""
    found, numel = zeros(module, names), size(module, names)
    if isinstance(method, DST):
        assert 0.01 * numel < found < 0.99 * numel
    elif isinstance(method, FixedMask):
        assert found == pruned_before
    elif case.dead and isinstance(method, RigL | EAST):
        assert zeros_at(SPARSITY, numel) <= found <= zeros_at(SPARSITY, numel) + 0.05 * numel
    else:
        assert found == zeros_at(SPARSITY, numel)


# Depthwise filters have nine weights, of which a method may prune all; it warns of these.
@pytest.mark.filterwarnings("ignore:.* filters of depthwise convolutions have no active weight left")
@pytest.mark.parametrize("make_method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fine_tuning_is_sparse_learns_and_resumes(
    case: Case, make_method: Callable[[Case], SparseMethod], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.demos.transformer.WikiText2", RandomTokens)
    plain = new(case.make)
    module, method = new(case.make), make_method(case)
    if isinstance(method, FixedMask):
        prune_by_magnitude(module)
    names = weights_to_mask(module, case.dense)
    pruned_before = zeros(module, names)

    losses = fit(module, method, tmp_path, **case.trainer)

    assert torch.tensor(losses).isfinite().all()
    assert not case.falls or sum(losses[-4:]) < sum(losses[:4])

    # Sparse, and nothing else has become so.
    assert list(method.registry) == [canonical_name(name) for name in names]
    check_zeros(module, names, method, case, pruned_before)
    assert report(module).num_active == size(module, names) - zeros(module, names)

    # Plain: the module's own keys, and types.
    assert list(module.state_dict()) == list(plain.state_dict())
    assert repr(module) == repr(plain)
    plain.load_state_dict(torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"])

    # Looked at, it stays as it is.
    before = {name: value.clone() for name, value in module.state_dict().items()}
    if type(module).validation_step is not L.LightningModule.validation_step:
        (metrics,) = make_trainer(tmp_path, **case.trainer).validate(module, verbose=False)
        assert not case.falls or metrics["val_loss"] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    # Resumed, it comes to the same.
    again = new(case.make)
    resumed = make_method(case)
    assert fit(again, resumed, tmp_path, tmp_path / "epoch=0.ckpt", **case.trainer) == losses[len(losses) // 2 :]
    for name, weight in method.registry.items():
        assert torch.equal(resumed.registry[name].mask, weight.mask), name
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


# Whole networks of torchvision.


class Sgd(FineTuner):
    """With the optimizer of the papers."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)


@pytest.mark.parametrize("make_method", METHODS, ids=lambda method: method.__name__)
def test_resnet18(make_method: Callable[[Case], SparseMethod], tmp_path: Path) -> None:
    module = Sgd(resnet18(num_classes=CLASSES), partial(images, size=64, batch=2), cross_entropy)
    plain = copy.deepcopy(module)
    # Its stages have two blocks, the first of which may be of another shape: nothing to share.
    case = Case("resnet18", L.LightningModule, east={"sharing": False}, alpha=0.1, dead=True)
    method = make_method(case)
    names = weights_to_mask(module)
    if isinstance(method, FixedMask):
        prune_by_magnitude(module)
    pruned_before = zeros(module, names)
    journal = Journal()

    trainer = make_trainer(tmp_path, callbacks=[method, journal], max_epochs=1, limit_train_batches=5)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)

    assert torch.tensor(journal.losses).isfinite().all()
    assert list(method.registry) == names
    assert len(names) == 21  # 17 convolutions, 3 in shortcuts, and the classifier
    check_zeros(module, names, method, case, pruned_before)
    assert repr(module) == repr(plain)
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert report(plain).num_active == size(module, names) - zeros(module, names)


def test_a_relu_that_a_block_uses_twice_is_phased_in_both_places(tmp_path: Path) -> None:
    """torchvision's BasicBlock has one for two convolutions, its Bottleneck one for widths of 64 and 256."""
    seen: dict[str, list[str]] = {}

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.update({name: list(site.dyrelu) for name, site in phased_relus(pl_module).items()})

    network = ResNet(Bottleneck, [1, 1, 1, 1])
    network.layer3 = network.layer4 = nn.Sequential()  # too large for a test
    network.fc = nn.Linear(512, CLASSES)
    module = FineTuner(network, images, cross_entropy)
    plain = copy.deepcopy(module)
    callbacks = [FGGP(SPARSITY), DyReLUPhasing(1, 3), Look()]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_epochs=1, limit_train_batches=5)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "phased.ckpt")

    assert seen["network.relu"] == ["64"]
    assert seen["network.layer1.0.relu"] == ["64", "256"]
    assert len(seen) == 3
    assert repr(module) == repr(plain)
    plain.load_state_dict(torch.load(tmp_path / "phased.ckpt", weights_only=True)["state_dict"])
    pixels = images(0)["pixel_values"]
    assert torch.equal(plain.eval()(pixels), module.eval()(pixels))


def backbone_and_head() -> nn.Module:
    """The feature extractor that everyone makes of a torchvision ResNet, here without its largest stage."""
    *body, _, pool, _ = resnet34().children()
    return nn.Sequential(OrderedDict(backbone=nn.Sequential(*body, pool, nn.Flatten()), head=nn.Linear(256, CLASSES)))


def test_east_with_all_its_parts_ends_as_a_plain_resnet34(tmp_path: Path) -> None:
    module = Sgd(backbone_and_head(), partial(images, size=32, batch=2), cross_entropy)
    plain = copy.deepcopy(module)
    method = EAST(0.95, update_every=1, cycle_update_every=1)
    trainer = make_trainer(tmp_path, callbacks=[method], max_epochs=1, limit_train_batches=5)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "east.ckpt")

    shared = shared_convolutions(module)
    assert len(shared) == 14  # of 3, 4 and 6 blocks, those from the third on
    assert phased_relus(module) == {}
    names = weights_to_mask(plain)
    stored = [name for name in names if name.removesuffix(".weight") not in shared]
    # As many weights as at that sparsity without sharing, in fewer places.
    assert size(module, stored) - zeros(module, stored) == size(plain, names) - zeros_at(0.95, size(plain, names))

    plain.load_state_dict(torch.load(tmp_path / "east.ckpt", weights_only=True)["state_dict"])
    pixels = images(0, size=32, batch=2)["pixel_values"]
    torch.testing.assert_close(plain.eval()(pixels), module.eval()(pixels))
    unshare_weights(module)
    assert repr(module) == repr(plain)
    assert zeros(plain, names) == zeros(module, names) > 0.8 * size(plain, names)


@pytest.mark.parametrize(("network", "shared"), [(regnet_y_400mf, 45), (efficientnet_b0, 20), (shufflenet_v2_x1_0, 30)])
def test_stages_within_a_sequential_of_stages_share_weights(network: Callable[[], nn.Module], shared: int) -> None:
    assert len(share_weights(network())) == shared


# A part that is frozen.


class FrozenBackbone(L.LightningModule):
    """A BERT that BackboneFinetuning freezes and thaws, and a head; the optimizer has what can be trained."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(**_TEXT)
        self.backbone = transformers.BertModel(config, add_pooling_layer=False)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, CLASSES))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden = self.backbone(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return F.cross_entropy(self.head(hidden[:, 0]), batch["labels"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=3e-3)

    def train_dataloader(self) -> DataLoader[Batch]:
        return loader(sentences(index) for index in range(4))


def thaw() -> L.Callback:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)


def test_a_backbone_that_thaws_stays_dense_and_is_named(tmp_path: Path) -> None:
    method = FGGP(SPARSITY, start=1, update_every=1, stop=0.7)
    module = new(FrozenBackbone)
    names = weights_to_mask(module, ["backbone.*"])
    thawed = weights_to_mask(module, ["head.*", "*embeddings*"])
    with pytest.warns(UserWarning, match=r"frozen when masks were made, so left dense: backbone\.encoder"):
        losses = fit(module, method, tmp_path, also=[thaw()], max_epochs=3)
    assert torch.tensor(losses).isfinite().all()
    assert zeros(module, names) == zeros_at(SPARSITY, size(module, names))
    assert zeros(module, thawed) == 0

    # Not from a later checkpoint: resumed after the thaw, BackboneFinetuning itself leaves the backbone frozen.
    again, resumed = new(FrozenBackbone), FGGP(SPARSITY, start=1, update_every=1, stop=0.7)
    with pytest.warns(UserWarning, match="frozen when masks were made, so left dense"):
        assert fit(again, resumed, tmp_path, tmp_path / "epoch=0.ckpt", also=[thaw()], max_epochs=3) == losses[4:]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_fixed_mask_keeps_the_zeros_of_a_backbone_that_thaws(tmp_path: Path) -> None:
    module = new(FrozenBackbone)
    prune_by_magnitude(module)
    names = weights_to_mask(module, ["*embeddings*"])
    before, pruned = copy.deepcopy(module), zeros(module, names)
    method = FixedMask()
    losses = fit(module, method, tmp_path, also=[thaw()], max_epochs=3)
    assert zeros(module, names) == pruned
    assert {*names} == {*method.registry}
    for name in names:  # and what is active has been trained
        assert not torch.equal(module.get_parameter(name), before.get_parameter(name)), name

    # Resumed before the thaw: nothing is lost.
    again, resumed = new(FrozenBackbone), FixedMask()
    assert fit(again, resumed, tmp_path, tmp_path / "epoch=0.ckpt", also=[thaw()], max_epochs=3) == losses[4:]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize("source", ["file", "mapping", "checkpoint"])
def test_fixed_mask_gives_a_frozen_backbone_the_masks_that_it_was_told(source: str, tmp_path: Path) -> None:
    sparse = new(FrozenBackbone)
    prune_by_magnitude(sparse)
    names = weights_to_mask(sparse, ["*embeddings*"])
    pruned = zeros(sparse, names)
    masks = {name: sparse.get_parameter(name) != 0 for name in names}
    given: Any = masks
    if source == "file":
        save_masks(given := tmp_path / "sparse.masks", masks)
    elif source == "checkpoint":
        torch.save({"state_dict": sparse.state_dict()}, given := tmp_path / "plain.ckpt")
    module = new(FrozenBackbone)
    fit(module, FixedMask(given), tmp_path, also=[thaw()])
    assert zeros(module, names) == pruned
    assert all(torch.equal(module.get_parameter(name) != 0, mask) for name, mask in masks.items())


def test_a_new_dense_head_on_a_sparse_frozen_backbone_is_fine_tuned(tmp_path: Path) -> None:
    module = new(FrozenBackbone)
    backbone = weights_to_mask(module, ["*embeddings*", "head.*"])
    with torch.no_grad():
        for name in backbone:
            module.get_parameter(name).mul_(torch.rand_like(module.get_parameter(name)) < 0.2)
    pruned = zeros(module, backbone)
    fit(module, FixedMask(), tmp_path, also=[thaw()])
    assert zeros(module, backbone) == pruned
    assert zeros(module, ["head.0.weight"]) == 0


class Adapted(nn.Module):
    """A linear layer that is frozen, and a low-rank adapter beside it, as PEFT has them."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.lora_B(self.lora_A(inputs))


# Not a ranking of all weights together: of an adapter that begins at zero it would leave nothing.
@pytest.mark.parametrize(
    "method",
    [
        FGGP(SPARSITY, allocation="uniform", start=1, **_OFTEN),
        RigL(SPARSITY, **_OFTEN),
        EAST(SPARSITY, sharing=False, phasing=False, update_every=2, cycle_update_every=1),
    ],
    ids=["fggp", "rigl", "east"],
)
def test_adapters_become_sparse_and_their_frozen_base_stays_what_it_is(method: SparseMethod, tmp_path: Path) -> None:
    module = new(llama)
    prune_by_magnitude(module)
    module.requires_grad_(False)
    for layer in cast("Any", module.network).model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)
    before = copy.deepcopy(module)
    adapters = [name for name in weights_to_mask(module) if "lora" in name]

    losses = fit(module, method, tmp_path)

    assert sum(losses[-4:]) < sum(losses[:4])
    assert list(method.registry) == adapters
    assert zeros(module, adapters) == zeros_at(SPARSITY, size(module, adapters))
    for name, weight in before.named_parameters():
        assert "lora" in name or torch.equal(weight, module.get_parameter(name)), name


# One method after another.


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed")
def test_pretrained_by_one_method_fine_tuned_by_another_and_shipped(tmp_path: Path) -> None:
    gpt2 = next(case for case in CASES if case.name == "gpt2")
    module = new(gpt2.make)
    names = weights_to_mask(module, gpt2.dense)
    fit(module, fggp(gpt2), tmp_path)

    module, tuner = new(gpt2.make), RigL(0.9, update_every=2)
    fit(module, tuner, tmp_path / "tuned", tmp_path / "epoch=1.ckpt", max_epochs=4)
    assert zeros(module, names) == zeros_at(0.9, size(module, names))
    tuned = {name: module.get_parameter(name) == 0 for name in names}

    fit(module, FixedMask(), tmp_path / "on")
    assert all(torch.equal(module.get_parameter(name) == 0, tuned[name]) for name in names)

    network = cast("Any", module).network
    network.save_pretrained(tmp_path / "shipped")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "shipped").train()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    elsewhere = FineTuner(loaded, sequences, loss_of_transformers)
    fit(elsewhere, FixedMask(), tmp_path / "elsewhere")
    for name in names:
        assert torch.equal(elsewhere.get_parameter(name) == 0, tuned[name]), name
        assert not torch.equal(elsewhere.get_parameter(name), module.get_parameter(name)), name


# Where a user goes astray.


def test_a_head_that_begins_at_zero_is_pruned_like_any_other(tmp_path: Path) -> None:
    for make_method in (fggp, rigl, east):
        module = new(partial(classifier_of_images, vision_transformer))  # torchvision's own head is zero
        names = weights_to_mask(module, ["*.class_token", "*.pos_embedding"])
        losses = fit(module, make_method(Case("vit", L.LightningModule)), tmp_path / make_method.__name__)
        assert sum(losses[-4:]) < sum(losses[:4])
        assert zeros(module, names) == zeros_at(SPARSITY, size(module, names))


@pytest.mark.filterwarnings("ignore:DST. network.heads.head.weight has collapsed")
def test_a_head_that_begins_at_zero_is_named_where_zeros_stay(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"network\.heads\.head\.weight .*[Ll]eave it out with exclude="):
        fit(new(partial(classifier_of_images, vision_transformer)), FixedMask(), tmp_path)


@pytest.mark.filterwarnings("ignore:DST. network.heads.head.weight has collapsed")
def test_a_head_that_begins_at_zero_learns_under_dst(tmp_path: Path) -> None:
    module = new(partial(classifier_of_images, vision_transformer))
    fit(module, DST(alpha=1e-4), tmp_path)
    assert module.get_parameter("network.heads.head.weight").any()


class SeldomStepping(Gan):
    """Gradients are accumulated by hand: a step for every fourth batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        of_generator, of_discriminator = self.optimizers()  # type: ignore[misc]
        fake = self.generator(torch.randn(len(batch["pixel_values"]), 8, 1, 1))
        self.manual_backward((self.discriminator(fake) - self.discriminator(batch["pixel_values"])).mean())
        if batch_idx % 4 == 3:
            for optimizer in (of_generator, of_discriminator):
                optimizer.step()
                optimizer.zero_grad()


def test_fractions_of_a_training_that_steps_seldom_are_told_and_steps_are_exact(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"training ended at step 4 with sparsity 0\.\d+ instead of 0\.8"):
        make_trainer(tmp_path, callbacks=[FGGP(SPARSITY)]).fit(new(SeldomStepping))
    module = new(SeldomStepping)
    names = weights_to_mask(module, ["*.original"])
    make_trainer(tmp_path, callbacks=[FGGP(SPARSITY, start=0, stop=2, update_every=1)]).fit(module)
    for part in ("generator", "discriminator"):  # each optimizer's weights have a budget of their own
        own = [name for name in names if name.startswith(part)]
        assert zeros(module, own) == zeros_at(SPARSITY, size(module, own))


def mixtral() -> L.LightningModule:
    """Experts in one tensor of three dimensions, which is no layer of torch."""
    kinds = transformers.MixtralForCausalLM, transformers.MixtralConfig
    return hugging_face(*kinds, sequences, num_key_value_heads=1, num_local_experts=4, **_TEXT)


def test_experts_are_masked_as_the_layers_that_they_are(tmp_path: Path) -> None:
    module = new(mixtral)
    experts = [name for name, _ in module.named_parameters() if ".experts." in name]
    assert len(experts) == 4
    names = weights_to_mask(module, ["*.embed_tokens.weight", "*.gate.weight"])
    fit(module, method := FGGP(SPARSITY, start=1, **_OFTEN), tmp_path)
    assert set(experts) < set(names)
    assert zeros(module, names) == zeros_at(SPARSITY, size(module, names))
    assert [layer.name for layer in report(module).layers] == list(method.registry)


def test_the_report_lists_routers_that_were_asked_for(tmp_path: Path) -> None:
    module = new(mixtral)
    method = FGGP(SPARSITY, include=["*", "MixtralTopKRouter"], start=1, **_OFTEN)
    fit(module, method, tmp_path)
    assert sum(".gate.weight" in name for name in method.registry) == 2
    assert [layer.name for layer in report(module).layers] == list(method.registry)


@pytest.mark.filterwarnings("ignore:DyReLUPhasing. .* stay ReLUs, because their inputs have features in the last")
def test_dynamic_relus_let_no_position_see_another(tmp_path: Path) -> None:
    """T5's decoder is causal, and its ReLU a module: what comes last must not change what comes before."""
    changes: list[Tensor] = []

    class Look(L.Callback):
        @torch.no_grad()
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            network = cast("Any", pl_module).network.eval()
            tokens = sequences(0)["input_ids"]
            other = tokens.clone()
            other[:, -1] = (other[:, -1] + 1) % 64
            first, second = (network(input_ids=tokens, decoder_input_ids=each).logits for each in (tokens, other))
            changes.append((first - second).abs().amax(dim=(0, 2)))
            network.train()

    module = new(next(case for case in CASES if case.name == "t5").make)
    make_trainer(tmp_path, callbacks=[DyReLUPhasing(2, 4, reduction=1), Look()], max_steps=6).fit(module)
    assert changes[0][-1] > 0
    assert changes[0][:-1].max() == 0
