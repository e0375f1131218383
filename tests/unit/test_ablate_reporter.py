"""The callback inside a run: exact to resume from, silent for the training, honest about its progress."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient._switch import callbacks_from_environment
from lightning_efficient.ablation.files import CHECKPOINT, EXPORT, PROGRESS, START, read_json
from lightning_efficient.ablation.reporter import ExportedCost, Reporter, _digest
from lightning_efficient.ablation.resume import _RANDOM, ResumePoint
from lightning_efficient.common.names import RUN_VARIABLE

EPOCHS, BATCHES = 4, 3


class Net(LightningModule):
    """Draws from all three global generators, steps its schedule by epoch, remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.seen: list[tuple[float, ...]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        drawn = random.random() + np.random.rand()
        loss = self.net(batch[0]).square().mean() * (1 + drawn)
        self.seen.append((batch[0].sum().item(), drawn, loss.item(), self.optimizers().param_groups[0]["lr"]))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Data(LightningDataModule):
    def _loader(self, shuffle: bool) -> DataLoader[Any]:
        data = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(data), 4, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(False)


class KilledError(Exception):
    pass


class Kill(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2 * BATCHES + 2:
            raise KilledError


def patience() -> EarlyStopping:
    """Never better than the first time, never out of patience."""
    return EarlyStopping("val_loss", min_delta=1e9, patience=100)


def fit(
    folder: Path, *callbacks: Callback, every: float | None = None, ckpt_path: Path | None = None, **options: Any
) -> tuple[Net, Trainer]:
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(3)
    folder.mkdir(exist_ok=True)
    options = {"max_epochs": EPOCHS, "enable_checkpointing": False, **options}
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=list(callbacks), **options,
    )  # fmt: skip
    # As Lightning does with the callbacks of an entry point: after it has looked at `enable_checkpointing`.
    trainer.callbacks += [] if every is None else [ResumePoint(str(folder), every)]
    net = Net()
    trainer.fit(net, Data(), ckpt_path=ckpt_path)
    return net, trainer


def test_killed_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path / "plain")
    whole, _ = fit(tmp_path / "whole", Reporter(str(tmp_path / "whole")), patience(), every=0.0)
    assert whole.seen == plain.seen, "the reporter changes nothing"
    folder = tmp_path / "killed"
    with pytest.raises(KilledError):
        fit(folder, Reporter(str(folder)), patience(), Kill(), every=0.0)
    file = folder / CHECKPOINT
    content = torch.load(file, weights_only=True)
    assert content["global_step"] == 2 * BATCHES
    resumed, _ = fit(folder, Reporter(str(folder)), stopper := patience(), every=0.0, ckpt_path=file)
    assert resumed.seen == whole.seen[2 * BATCHES :]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert stopper.wait_count == EPOCHS - 1, "the state of callbacks that look at an epoch's end is that of its end"
    report, undisturbed = (read_json(tmp_path / name / PROGRESS) for name in ("killed", "whole"))
    assert report["metrics"] == undisturbed["metrics"]
    assert read_json(folder / START) == read_json(tmp_path / "whole" / START)


def test_what_is_reported(tmp_path: Path) -> None:
    outside = ModelCheckpoint(tmp_path / "elsewhere" / "best", monitor="val_loss")
    folder = tmp_path / "run"
    net, trainer = fit(folder, Reporter(str(folder)), outside, every=1e9, enable_checkpointing=True)
    report = read_json(folder / PROGRESS)
    steps = EPOCHS * BATCHES
    assert {k: report[k] for k in ("epoch", "epochs", "step", "steps", "seconds_left", "fitted", "has_test")} == {
        "epoch": EPOCHS, "epochs": EPOCHS, "step": steps, "steps": steps, "seconds_left": 0, "fitted": True,
        "has_test": False,
    }  # fmt: skip
    assert report["metrics"] == {"val_loss": pytest.approx(float(trainer.callback_metrics["val_loss"]))}
    best = Path(report["best"])
    assert best.parent == folder / "checkpoints" / "best"
    assert not (tmp_path / "elsewhere").exists()
    assert _RANDOM not in torch.load(best, weights_only=True)
    assert not (folder / CHECKPOINT).exists(), "the user's checkpoints are enough, and it was too early for ours"
    start = read_json(folder / START)
    assert list(start["batches"]) == [str(epoch) for epoch in range(EPOCHS)]
    assert len(set(start["batches"].values())) == EPOCHS
    assert list(start["weights"]) == [name for name, _ in net.named_parameters()]
    trainer.test(net, Data().val_dataloader(), verbose=False)
    assert set(read_json(folder / PROGRESS)["metrics"]) == {"val_loss", "test_loss"}


def test_without_checkpoints_the_last_weights_are_kept(tmp_path: Path) -> None:
    net, _ = fit(tmp_path, every=1e9)
    content = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert all(torch.equal(content["state_dict"][name], p) for name, p in net.named_parameters())


def test_a_script_that_builds_its_trainer_when_asked_for_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_VARIABLE, json.dumps({"probe": True}))
    with pytest.raises(RuntimeError, match="`ablate` runs LightningCLI scripts"):
        callbacks_from_environment()


class Deployed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def measured(folder: Path, net: LightningModule) -> None:
    logger = CSVLogger(folder, name="", version="")
    Trainer(
        accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False, max_steps=2,
        enable_checkpointing=False, callbacks=[ExportedCost(str(folder), True)],
    ).fit(net, Data())  # fmt: skip


def test_the_exported_model_is_measured(tmp_path: Path) -> None:
    measured(tmp_path / "net", net := Deployed())
    lines = (tmp_path / "net" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    logged = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    assert float(logged["efficient/export/parameters"]) == sum(p.numel() for p in net.net.parameters())
    assert float(logged["efficient/export/latency_ms_batch_1"]) > 0
    assert logged["step"] == "2"
    assert not (tmp_path / "net" / EXPORT).exists()

    wrong = Deployed()
    wrong.example_input_array = torch.zeros(2, 5)
    measured(tmp_path / "wrong", wrong)  # trained nevertheless
    assert "2x5" in read_json(tmp_path / "wrong" / EXPORT)["error"]


def test_what_cannot_be_measured_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give Net an `example_input_array`"):
        measured(tmp_path, net := Net())
    assert not net.seen


def test_digests_see_values_shapes_and_types() -> None:
    one = torch.arange(4.0)
    assert _digest({"a": one, "b": [one.bfloat16()]}) == _digest({"a": one.clone(), "b": [one.bfloat16()]})
    assert len({_digest(x) for x in (one, one + 1, one.view(2, 2), one.int(), [one, one], torch.tensor(1.0))}) == 6
