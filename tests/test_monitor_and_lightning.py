"""SparsityMonitor beside Lightning's own callbacks: the progress bar and the monitor of throughput."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch.callbacks import ThroughputMonitor, TQDMProgressBar, throughput_monitor
from typing_extensions import override

from lightning_sparse import GMP
from lightning_sparse.monitor import SparsityMonitor
from tests.helpers import ToyModel, fit_two_processes, make_trainer

UPDATES: dict[str, Any] = {"update_every": 4, "start": 0, "stop": 12}


class KeepBar(TQDMProgressBar):
    """Keeps what the bar shows at each batch, and hides the bar."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[dict[str, Any]] = []

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.shown.append(dict(self.get_metrics(trainer, pl_module)))


def fit_with_bar(root: Path, *callbacks: L.Callback) -> list[dict[str, Any]]:
    bar = KeepBar()
    make_trainer(root, callbacks=[*callbacks, bar], enable_progress_bar=True, logger=True).fit(ToyModel())
    return bar.shown


class TestProgressBar:
    @pytest.mark.parametrize("monitor_first", [True, False])
    def test_shows_the_sparsity_of_each_step(self, monitor_first: bool, tmp_path: Path) -> None:
        callbacks = [GMP(0.75, **UPDATES), SparsityMonitor(progress_bar=True)]
        shown = fit_with_bar(tmp_path, *(callbacks[::-1] if monitor_first else callbacks))
        values = [float(metrics["sparsity"]) for metrics in shown]
        assert (len(values), values[0], round(values[-1], 2)) == (16, 0.0, 0.75)
        assert values == sorted(values)

    def test_shows_nothing_of_it_by_default(self, tmp_path: Path) -> None:
        shown = fit_with_bar(tmp_path, GMP(0.75, **UPDATES), SparsityMonitor())
        assert all("sparsity" not in metrics for metrics in shown)

    def test_trains_on_two_processes(self, tmp_path: Path) -> None:
        callbacks = [GMP(0.75, **UPDATES), SparsityMonitor(progress_bar=True)]
        first, second = fit_two_processes(ToyModel(batch_size=4), tmp_path, callbacks, logger=True)
        assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


class KnowsSparse(Throughput):
    """``Throughput`` of releases of Lightning that ask which peak to compare with."""

    asked: list[bool | None]

    def __init__(self, *args: Any, using_sparse_model: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked.append(using_sparse_model)


class TestThroughput:
    def throughput(self, **kwargs: Any) -> ThroughputMonitor:
        return ThroughputMonitor(batch_size_fn=len, window_size=2, **kwargs)

    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[bool | None]:
        KnowsSparse.asked = []
        monkeypatch.setattr(throughput_monitor, "Throughput", KnowsSparse)
        return KnowsSparse.asked

    def fit(self, root: Path, throughput: ThroughputMonitor) -> None:
        model = ToyModel()
        model.flops_per_batch = 100  # type: ignore[assignment]
        callbacks = [GMP(0.5), SparsityMonitor(), throughput]
        make_trainer(root, callbacks=callbacks, logger=True, log_every_n_steps=1).fit(model)

    def test_is_that_of_the_dense_peak(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.asked(monkeypatch)
        self.fit(tmp_path, self.throughput())
        assert set(asked) == {False}

    def test_is_what_the_user_has_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.asked(monkeypatch)
        self.fit(tmp_path, self.throughput(using_sparse_model=True))
        assert set(asked) == {True}

    def test_of_releases_that_do_not_ask_is_left_as_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class DoesNotAsk(Throughput):
            def __init__(self, available_flops: float | None = None, world_size: int = 1, window_size: int = 2) -> None:
                super().__init__(available_flops, world_size, window_size)

        monkeypatch.setattr(throughput_monitor, "Throughput", DoesNotAsk)
        throughput = self.throughput()
        self.fit(tmp_path, throughput)
        assert throughput.kwargs == {"window_size": 2}
