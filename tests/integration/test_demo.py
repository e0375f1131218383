"""The demo from end to end, a slice of it: both runs, logs, table, picture, exported files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_efficient.demo.run as demo
from lightning_efficient.demo.data import Digits
from lightning_efficient.demo.model import DigitsViT


def test_the_split_is_fixed_and_disjoint() -> None:
    first, second = Digits(), Digits(data_seed=5)
    for data in (first, second):
        data.setup("fit")
    rows = [tuple(part.indices) for part in first.parts]
    assert rows == [tuple(part.indices) for part in second.parts]
    assert sorted(sum(rows, ())) == list(range(1797))
    batches = [[labels.tolist() for _, labels in data.train_dataloader()] for data in (first, Digits(), second)[::2]]
    assert batches[0] != batches[1]
    again = Digits()
    again.setup("fit")
    assert [labels.tolist() for _, labels in again.train_dataloader()] == batches[0]


def test_quick_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK_EPOCHS", 2)
    screen = io.StringIO()
    comparison = demo.run(tmp_path, quick=True, console=Console(file=screen, width=100))
    shown = screen.getvalue()

    assert list(comparison.variants) == ["baseline", "sigma_reparam"]
    for name in demo.VARIANTS:
        events = EventAccumulator(str(tmp_path / "logs" / name / "seed_0")).Reload()
        assert {"train_loss", "val_acc", "test_acc"} <= set(events.Tags()["scalars"])
        assert "efficient/collapse_monitor/attention_entropy" in events.Tags()["images"]
    assert (tmp_path / "demo.png").stat().st_size > 20_000
    assert [text for text in ("36/36", "a demonstration, not evidence", "test accuracy") if text not in shown] == []
    assert f"tensorboard --logdir {tmp_path / 'logs'}" in shown
    assert "warning" not in shown.lower()

    # The exported program runs without this package and agrees with the checkpoint, loaded by the stock method.
    (checkpoint,) = (tmp_path / "logs/sigma_reparam/seed_0/checkpoints").glob("*.ckpt")
    model = DigitsViT.load_from_checkpoint(checkpoint).eval()
    program = torch.export.load(tmp_path / "exported" / "digits_vit.pt2").module()
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(program(images), model(images).detach())


def test_missing_scikit_learn_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-efficient\[demo\]'"):
        demo.run(tmp_path)
