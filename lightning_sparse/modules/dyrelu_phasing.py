"""DyReLU phasing: every ReLU is a Dynamic ReLU while the network finds its way, and a ReLU again at the end.

Paper:  Li et al., "Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning", TMLR 2025,
        https://arxiv.org/abs/2411.13545
Code:   https://github.com/TensorStrike/ES2
Differs from the authors' code:
    - beta falls at every step, there at every epoch.
    - There, with frozen Dynamic ReLUs, the phase begins only where an epoch's number equals its start, which the
      default start (62.5) never does. Here it begins.
    - When the phase is over, the parameters of the Dynamic ReLUs are dropped; there they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeGuard, final
from weakref import ref

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies.launchers.multiprocessing import (
    _MultiProcessingLauncher,  # pyright: ignore[reportPrivateUsage]
)
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed, nn
from typing_extensions import override

from lightning_sparse.arguments import check_flag, check_globs, check_whole
from lightning_sparse.masks.distributed import world_size
from lightning_sparse.masks.layout import is_sharded
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.schema import check_fields, names
from lightning_sparse.modules.dyrelu import PhasedReLU, phased_relus
from lightning_sparse.modules.relu_inputs import Watch, watch_a_step
from lightning_sparse.schedules import Duration, Timetable, UpdateTimes
from lightning_sparse.trainer import (
    TrainerCallback,
    check_in_optimizer,
    copy_again,
    refuse_twins,
    steps_of_training,
    steps_taken,
)

__all__ = ["DyReLUPhasing"]

_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


@final
class DyReLUPhasing(TrainerCallback):
    r"""Replaces every ``nn.ReLU`` by a Dynamic ReLU, and turns it back into a ReLU during training.

    With the share :math:`\beta` of the Dynamic ReLU, each :class:`~lightning_sparse.modules.PhasedReLU` computes

    .. math:: \max\bigl((1 + \beta\,\theta_{a_1})\, x + \tfrac12 \beta\,\theta_{b_1},\;
        \beta\,\theta_{a_2}\, x + \tfrac12 \beta\,\theta_{b_2}\bigr), \qquad
        \beta = 1 - \frac{t - t_{start}}{t_{stop} - t_{start}} \text{ in } [0, 1]

    From ``stop`` on, it is a plain ReLU, and the states of the module and the optimizer no longer hold its parameters.
    A checkpoint written after ``stop`` loads into the original module. When the fit ends, the module has its
    ``nn.ReLU`` again. A fit that ends before ``stop`` keeps the Dynamic ReLUs, because the network needs them, and
    warns.

    To find the number of channels at each ReLU, a copy of the module runs once: its ``forward`` on the
    ``example_input_array`` or, if there is none, its ``training_step`` on a first training batch. If the data set can
    be iterated over only once, that batch is missing from training; an ``example_input_array`` avoids this. Two kinds
    of ReLU cannot be replaced: calls of ``F.relu``, and ReLUs whose inputs are (batch, position, feature), as in
    transformers, because Dynamic ReLU is not defined for them. A warning lists both.

    Args:
        start: Time at which :math:`\beta` begins to fall; ``int`` = optimizer steps, ``float`` = fraction of training.
        stop: Time at which :math:`\beta` reaches 0. The defaults are close to the authors' code: 62.5 and 124 of 250
            epochs.
        reduction: The ``reduction`` of each :class:`~lightning_sparse.modules.DyReLU`.
        freeze: Whether to stop training the Dynamic ReLUs once :math:`\beta` falls (the code's ``disable_drelu_grad``).
        include: Globs of the names of the ReLUs within the LightningModule; None means all.
        exclude: Globs of the names of ReLUs to leave unchanged.
        seed: Seed of the initial values of the Dynamic ReLUs' parameters.

    Raises:
        ValueError: A duration is negative or a fraction above 1, ``stop`` comes before ``start``, or an argument is of
            another type.
        MisconfigurationException: On setup, if a glob matches no ReLU or the channels cannot be found.

    Example:
        >>> import lightning as L
        >>> from lightning_sparse.modules import DyReLUPhasing
        >>> from lightning_sparse.zoo import Classifier, DigitsDataModule, LeNet300100
        >>> model = Classifier(LeNet300100(in_features=64))
        >>> trainer = L.Trainer(max_steps=20, callbacks=[DyReLUPhasing()], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(model, DigitsDataModule())
        >>> model.network.relu1
        ReLU()

    References:
        Li et al., `Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning
        <https://arxiv.org/abs/2411.13545>`_, TMLR 2025.
    """

    def __init__(
        self,
        start: Duration = 0.25,
        stop: Duration = 0.5,
        *,
        reduction: int = 4,
        freeze: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.reduction = check_whole("reduction", reduction)
        self.times = UpdateTimes(every=1, start=start, stop=stop)
        self.freeze = check_flag("freeze", freeze)
        self.include, self.exclude = check_globs("include", include), check_globs("exclude", exclude)
        self.seed = check_whole("seed", seed, least=0)
        self.beta = 1.0
        self._timetable = Timetable(every=1, start=0, stop=0)
        self._sites: dict[str, PhasedReLU] = {}  # while a module is at work
        self._site_names: list[str] = []  # theirs, afterwards too
        self._inserted = self._trained = False  # by this fit; since then
        self._hides_from_ddp = False
        self._ignored_before: Any = None
        self._finished: Callable[[], nn.Module | None] = _nothing

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A checkpoint that will be loaded, but is not read yet, says whether a site is phased out. Without a
        # checkpoint, a module whose phase is over stays as it is, and so does one that is not trained.
        self._inserted = self._trained = False
        refuse_twins(trainer, self, ("times", "reduction", "freeze", "include", "exclude"))
        there_before = phased_relus(pl_module)
        if not there_before:
            self._insert(trainer, pl_module, stage)
        self._sites = phased_relus(pl_module)
        self._site_names = list(self._sites)
        if not there_before and (stage != "fit" or self._finished() is pl_module):
            for site in self._sites.values():
                site.phase_out()
        if stage != "fit":
            return
        self._inserted = not there_before and self._finished() is not pl_module
        self._finished = _nothing
        # DDP waits for the gradient of every parameter that it knows, and these will have none. on_after_backward does
        # what it did for them.
        own = {f"{name}.{key}" for name, site in self._sites.items() for key in (*_names(site),)}
        hidden = set(getattr(pl_module, _IGNORED_BY_DDP, ()))
        if not own <= hidden:
            self._ignored_before, self._hides_from_ddp = vars(pl_module).get(_IGNORED_BY_DDP), True
            setattr(pl_module, _IGNORED_BY_DDP, own | hidden)
        copy_again(trainer, pl_module, self)

    def _insert(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        relus = {name: child for name, child in pl_module.named_modules() if _is_relu(child)}
        for argument, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns or ():
                if not any(fnmatchcase(name, pattern) for name in relus):
                    raise MisconfigurationException(
                        f"DyReLUPhasing: {argument}={pattern!r} matches none of the ReLUs: {', '.join(relus)}."
                    )
        wanted = {name: relu for name, relu in relus.items() if self._wants(name)}
        if not wanted and stage == "fit":
            rank_zero_warn(
                f"DyReLUPhasing: {type(pl_module).__name__} has no nn.ReLU when fit begins, so nothing is phased. Make"
                " activations nn.ReLU modules, in __init__."
            )
            return
        if stage != "fit":
            for relu in wanted.values():
                _replace(pl_module, relu, PhasedReLU(relu, (), self.reduction))
            return
        seen = watch_a_step(trainer, pl_module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for name, relu in wanted.items():
                if seen.channels.get(name) and name not in seen.features_last:
                    site = PhasedReLU(relu, seen.channels[name], self.reduction)
                    _replace(pl_module, relu, site.to(pl_module.device).type(pl_module.dtype))
        self._name_what_stays([name for name in wanted if name not in phased_relus(pl_module)], seen)

    def _name_what_stays(self, names: Sequence[str], seen: Watch) -> None:
        last = [name for name in names if name in seen.features_last]
        if last:
            rank_zero_warn(
                f"DyReLUPhasing: {', '.join(last)} stay ReLUs, because their inputs have features in the last of"
                " several dimensions, as in a transformer. Dynamic ReLU is defined for channels in dimension 1."
            )
        never = [name for name in names if name not in seen.features_last]
        if never:
            rank_zero_warn(f"DyReLUPhasing: no input reaches {', '.join(never)}, which stay ReLUs.")
        if seen.functions:
            rank_zero_warn(
                f"DyReLUPhasing: relu is called as a function by {', '.join(sorted(seen.functions))}, and stays a ReLU"
                " there. Use nn.ReLU modules to have it phased."
            )

    def _wants(self, name: str) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in self.exclude or ()):
            return False
        return self.include is None or any(fnmatchcase(name, pattern) for pattern in self.include)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_in_optimizer(trainer, {name: list(site.parameters()) for name, site in self._sites.items()}, type(self))

    @override
    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._timetable = self.times.resolve(steps_of_training(trainer, pl_module))
        if self._inserted and not self._trained:
            for site in self._sites.values():
                site.phase_in()  # which weights that the module's own setup has loaded may have phased out
        for parameter in self._parameters() if world_size() > 1 else ():
            if not is_sharded(parameter):  # else each process holds a part of what a seed has drawn
                distributed.broadcast(parameter, src=0)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._is_over():
            return
        self._trained = True
        self.beta = 1.0 - self._timetable.progress(steps_taken(trainer, pl_module))
        for site in self._sites.values():
            site.beta.fill_(self.beta)
            site.requires_grad_(not (self.freeze and self.beta < 1.0))
        if self.beta == 0.0:
            self._phase_out(trainer)

    def _phase_out(self, trainer: pl.Trainer) -> None:
        """Be ReLUs from now on, and leave the optimizer nothing to move."""
        for site in self._sites.values():
            site.phase_out()
        for parameter in self._parameters():
            parameter.grad = None
            for optimizer in trainer.optimizers:
                optimizer.state.pop(parameter, None)

    @override
    @torch.no_grad()
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Of accumulated batches too: what was averaged before is equal on every rank, and stays what it is.
        if world_size() == 1 or self._is_over():
            return
        # FSDP2 averages the gradients of what it shards.
        learning = [
            parameter for parameter in self._parameters() if parameter.requires_grad and not is_sharded(parameter)
        ]
        if not learning:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
        mean = torch.cat([gradient.flatten() for gradient in gradients]) / world_size()
        distributed.all_reduce(mean)
        for parameter, part in zip(learning, mean.split([p.numel() for p in learning]), strict=True):
            parameter.grad = part.view_as(parameter)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        beta = 0.0 if self._is_over() else self.beta
        pl_module.log("dyrelu/beta", beta, on_step=False, on_epoch=True, sync_dist=True)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_over():
            self._finished = ref(pl_module)
        elif not self._is_untouched():
            # The main process, which only takes weights from those that it has started, has a module without them.
            stays = not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
            rank_zero_warn(
                f"DyReLUPhasing: training ended at beta {self.beta:.3f}, and the module"
                f" {'still holds' if stays else 'is left without'} the Dynamic ReLUs that it needs. Train to the stop"
                " of the phase, for example by resuming from a checkpoint of this run, or give an earlier stop."
            )
            for site in self._sites.values() if not stays else ():
                _replace(pl_module, site, site.relu)
        self._leave(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave(pl_module)

    def _leave(self, pl_module: pl.LightningModule) -> None:
        """Take out of the module what is a ReLU by now, and what no step was taken with."""
        for site in phased_relus(pl_module).values():
            if site.is_phased_out or self._is_untouched():
                _replace(pl_module, site, site.relu)
        self._sites = {}
        if self._hides_from_ddp:
            vars(pl_module).pop(_IGNORED_BY_DDP, None)
            if self._ignored_before is not None:
                setattr(pl_module, _IGNORED_BY_DDP, self._ignored_before)
            self._ignored_before, self._hides_from_ddp = None, False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"sites": list(self._site_names)}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:
            check_fields(state, {"sites": names}, "The checkpoint's state of DyReLUPhasing")
        saved = state["sites"] if state else None
        if trainer.state.fn == "fit" and self._sites and saved != self._site_names:
            others = f" (but at {', '.join(map(printable, saved))})" if saved else ""
            raise MisconfigurationException(
                f"The checkpoint {trainer.ckpt_path} holds no Dynamic ReLUs at {', '.join(self._site_names)}{others},"
                " so its optimizers lack their parameters. Resume with the callbacks that wrote it."
                " To begin with its weights, load them with load_from_checkpoint and call fit without ckpt_path."
            )
        self._trained = checkpoint.get("global_step", 0) > 0  # it is 0 in the learning-rate finder's file

    def _is_untouched(self) -> bool:
        return self._inserted and not self._trained

    def _is_over(self) -> bool:
        return all(site.is_phased_out for site in self._sites.values())

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for site in self._sites.values() for parameter in site.parameters()]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_finished": _nothing}  # a reference cannot go to another process


def _is_relu(module: nn.Module) -> TypeGuard[nn.ReLU]:
    return isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward


def _names(site: PhasedReLU) -> list[str]:
    return [name for name, _ in (*site.named_parameters(), *site.named_buffers())]


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is; one module may be at several places."""
    names = [name for name, child in module.named_modules(remove_duplicate=False) if child is old]
    for name in names:
        module.set_submodule(name, new)


def _nothing() -> None:
    return None
