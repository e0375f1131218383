"""RunCost: what it times and what it leaves out; and what a run writes once for TensorBoard."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_efficient import CollapseMonitor, RunCost
from lightning_efficient.common.memory import peak_resident
from lightning_efficient.common.registry import METHODS
from lightning_efficient.comparison import compare
from lightning_efficient.deploy.measure import log_exported


class Slow(LightningModule):
    """Each training step sleeps 10 ms, each validation 200 ms, the first step 100 ms."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        time.sleep(0.1 if self.global_step == 0 else 0.01)
        return self(batch).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, index: int) -> None:
        time.sleep(0.2)
        self.log("val_loss", self(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def data(batches: int = 8) -> DataLoader[Any]:
    return DataLoader(torch.ones(2 * batches, 4), 2)  # type: ignore[arg-type]


def fit(
    root: Path, *callbacks: Any, loggers: Any = None, module: LightningModule | None = None, **kwargs: Any
) -> Trainer:
    loggers = loggers or [TensorBoardLogger(root, "tb", "seed_0"), CSVLogger(root, "csv", "seed_0")]
    options: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 1} | kwargs
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=loggers, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=root, **options,
    )  # fmt: skip
    trainer.fit(module or Slow(), data(), data(1))
    return trainer


def test_steps_are_timed_without_validation_warm_up_and_pauses(tmp_path: Path) -> None:
    fit(tmp_path, RunCost(every_n_steps=3))
    for name in ("tb", "csv"):
        found = compare(tmp_path / name, ["val_loss"])
        (run,) = found.runs
        # windows of 3 steps, cut by the validation of an epoch; the first one is left out
        series = run.series["efficient/run_cost/step_ms"]
        assert series.steps == [
            6,
            8,
            11,
            14,
            16,
        ]
        values = {row.quantity: row.estimate.mean for row in found.rows()}
        assert 10 <= values["ms per step, median"] < 60  # 200 ms a validation, 100 ms the first step
        assert values["parameters"] == 15
        assert 20 < values["peak memory, MiB"] < 1e6


def test_the_memory_of_a_small_process_that_a_large_one_starts() -> None:
    """Such as every run of `ablate`, on a model that is smaller than `ablate` itself."""
    ours = peak_resident()
    assert ours is not None
    code = "from lightning_efficient.common.memory import peak_resident; print(peak_resident())"
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert 2**20 < int(told.stdout) < ours / 3


def test_accumulated_steps_are_steps_of_the_optimizer(tmp_path: Path) -> None:
    fit(tmp_path, RunCost(every_n_steps=1), accumulate_grad_batches=2, max_epochs=1)
    series = compare(tmp_path / "tb", ["val_loss"]).runs[0].series["efficient/run_cost/step_ms"]
    assert series.steps == [2, 3, 4]
    assert min(series.values) >= 20


def test_a_run_of_one_window_has_it(tmp_path: Path) -> None:
    fit(tmp_path, RunCost(every_n_steps=100), max_epochs=1)
    series = compare(tmp_path / "tb", ["val_loss"]).runs[0].series["efficient/run_cost/step_ms"]
    assert series.steps == [8]
    assert series.values[0] >= (100 + 7 * 10) / 8


def test_off_it_logs_nothing_and_bad_arguments_are_refused(tmp_path: Path) -> None:
    fit(tmp_path, RunCost(enabled=False), max_epochs=1)
    assert not [name for name in compare(tmp_path / "tb", ["val_loss"]).runs[0].series if "run_cost" in name]
    with pytest.raises(ValueError, match=r"`every_n_steps` is 0; expected at least 1\."):
        RunCost(every_n_steps=0)


def test_figures_of_the_exported_model(tmp_path: Path) -> None:
    trainer = fit(tmp_path, RunCost(), max_epochs=1)
    logged = log_exported(trainer.loggers, trainer.lightning_module, torch.ones(2, 4))
    assert logged["efficient/export/parameters"] == 15
    assert logged["efficient/export/macs_batch_1"] == 12
    for logger in trainer.loggers:
        logger.finalize("success")
    for name in ("tb", "csv"):
        values = {row.quantity: row.estimate.mean for row in compare(tmp_path / name, ["val_loss"]).rows()}
        assert values["exported: parameters"] == 15
        assert values["exported: latency, ms, batch 1"] > 0
        assert values["exported: size, MiB"] == pytest.approx(logged["efficient/export/size_mib"], rel=1e-4)


# -- TensorBoard -----------------------------------------------------------------------------------------------------


def plugin(folder: Path, tag: str) -> bytes | None:
    log = EventAccumulator(str(folder))
    log.Reload()
    return log.summary_metadata[tag].plugin_data.content if tag in log.summary_metadata else None


@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_hparams_are_one_record_without_an_experiment(default_hp_metric: bool, tmp_path: Path) -> None:
    """Without an experiment TensorBoard makes columns of all runs' keys and of every scalar."""
    seed_everything(7)
    logger = TensorBoardLogger(tmp_path, "tb", "seed_7", default_hp_metric=default_hp_metric)
    trainer = fit(tmp_path, RunCost(), CollapseMonitor(enabled=False), loggers=[logger], max_steps=2)
    assert trainer.enable_autolog_hparams
    assert plugin(tmp_path / "tb" / "seed_7", "_hparams_/experiment") is None
    content = plugin(tmp_path / "tb" / "seed_7", "_hparams_/session_start_info")
    keys = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert {f"efficient/{method}" for method in METHODS.with_callback} <= set(keys)
    assert (keys["lr"].number_value, keys["seed"].number_value) == (0.1, 7)
    assert (keys["efficient/run_cost"].bool_value, keys["efficient/collapse_monitor"].bool_value) == (True, False)
    log = EventAccumulator(str(tmp_path / "tb" / "seed_7"))
    log.Reload()
    assert "hp_metric" not in log.Tags()["scalars"]  # a column of -1 for everybody


def test_hparams_that_the_script_logs_by_itself_are_in_the_record(tmp_path: Path) -> None:
    """As a ``SaveConfigCallback`` does, before anybody else; ``ablate`` gives its loggers this switch."""

    class Tags(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            trainer.loggers[0].log_hyperparams({"team": "vision", "lr": 9.0})

    logger = TensorBoardLogger(tmp_path, "tb", "seed_0", default_hp_metric=False)
    fit(tmp_path, Tags(), RunCost(), loggers=[logger], max_steps=1)
    assert plugin(tmp_path / "tb" / "seed_0", "_hparams_/experiment") is None
    content = plugin(tmp_path / "tb" / "seed_0", "_hparams_/session_start_info")
    keys = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert keys["team"].string_value == "vision"
    assert keys["lr"].number_value == 0.1, "what the module was made with"
    assert keys["efficient/run_cost"].bool_value


def test_hparams_that_are_no_numbers(tmp_path: Path) -> None:
    class Nested(Slow):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters(
                {"optimizer": {"betas": [0.9, 0.99], "name": "adam"}, "none": None, "seed": 3, "_class_path": "x"}
            )

    fit(tmp_path, RunCost(), module=Nested(), max_steps=1)
    content = plugin(tmp_path / "tb" / "seed_0", "_hparams_/session_start_info")
    keys = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert keys["optimizer/betas"].string_value == "[0.9, 0.99]"
    assert (keys["optimizer/name"].string_value, keys["none"].string_value) == ("adam", "None")
    assert keys["seed"].number_value == 3  # the user's own
    assert "_class_path" not in keys  # LightningCLI's own


def test_charts_of_the_methods_that_are_on(tmp_path: Path) -> None:
    fit(tmp_path, RunCost(), CollapseMonitor(enabled=False), max_steps=1)
    log = EventAccumulator(str(tmp_path / "tb" / "seed_0"))
    log.Reload()
    layout = layout_pb2.Layout.FromString(log.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["run_cost"]
    assert [chart.title for chart in layout.category[0].chart] == list(METHODS["run_cost"].charts)
    assert layout.category[0].chart[0].multiline.tag == ["^efficient/run_cost/step_ms$"]
