"""The temperature tuned by what a LightningModule logs in its validation, from Python and from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score
from zoo import CLASSES, Classifier

import lightning_efficient.demo
from lightning_efficient import TempScale
from lightning_efficient.cli import main
from lightning_efficient.demo.model import DigitsViT
from lightning_efficient.functional import apply_temp_scale, remove_temp_scale
from lightning_efficient.lifecycle.recipe import Entry
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.tuning import validation
from lightning_efficient.tuning.validation import tune_on_validation

BASELINE = Path(lightning_efficient.demo.__file__).parent / "baseline.yaml"


def trainer(*callbacks: Any, **kwargs: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(callbacks=list(callbacks), **{**quiet, "enable_model_summary": False, **kwargs})


def loader(samples: int = 22, size: int = 4, **kwargs: Any) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, 1, 8, 8, generator=g), torch.randint(0, CLASSES, (samples,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=size, **kwargs)


class TwoLoaders(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class WithF1(Classifier):
    """A metric that is no mean over batches, and a call counter."""

    def __init__(self) -> None:
        super().__init__("timm_vit")
        self.f1 = MulticlassF1Score(CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.f1(self(batch[0]), batch[1])
        self.log("val_f1", self.f1)


def losses(module: Classifier, data: Any, tau: float) -> list[float]:
    module.eval()
    if tau != 1.0:
        apply_temp_scale(module, tau, example=next(iter(data))[0])
    with torch.no_grad():
        found = [float(F.cross_entropy(module(x), y)) for x, y in data]
    if tau != 1.0:
        remove_temp_scale(module)
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_curve_is_that_of_the_module_at_each_temperature(shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = Classifier("timm_vit"), loader(shuffle=shuffle, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(validation, "_PARTS", 1)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.warns(UserWarning, match="shuffling") if shuffle else torch.no_grad():
        found = tune_on_validation(trainer(), module, "val_loss", [0.5, 0.8], dataloaders=data, resamples=200)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert (found.unit, found.maximize, found.scores.shape) == ("batches", False, (3, 6))
    data = loader(shuffle=shuffle, generator=torch.Generator().manual_seed(3))
    batches = list(data)
    expected = np.array([losses(module, batches, tau) for tau in (1.0, 0.8, 0.5)])
    if shuffle:  # in some order, but the same one for every temperature
        assert sorted(found.scores[0]) != pytest.approx(sorted(expected[0]))  # other batches than in file order
        assert np.abs(np.diff(found.scores, axis=0)).max() < 0.5 * found.scores.std(axis=1).min()
    else:
        np.testing.assert_allclose(found.scores, expected, rtol=1e-5)
        weights = np.array([4, 4, 4, 4, 4, 2]) / 22
        assert [row.score for row in found.rows] == pytest.approx(expected @ weights, rel=1e-5)
    assert "There are 6 batches only" in found.verdict


def test_few_batches_are_cut_into_parts() -> None:
    found = tune_on_validation(trainer(), Classifier("timm_vit"), "val_loss", [0.5], dataloaders=loader(22, 11))
    assert (found.unit, found.scores.shape) == ("groups of samples", (2, 22))
    assert found.plain.score == pytest.approx(losses(Classifier("timm_vit"), loader(22, 22), 1.0)[0], rel=1e-5)
    x = torch.arange(5)
    assert [part["x"].tolist() for part in validation._parts({"x": x, "y": [x + 1]}, 2)] == [[0, 1], [2, 3, 4]]
    for whole in ((x, ["a", "b"]), (x, torch.arange(3)), {"x": x, "n": 3}, []):
        assert validation._parts(whole, 2) == [whole]


def test_what_is_no_mean_over_batches_has_no_interval() -> None:
    module, data = WithF1(), loader()
    found = tune_on_validation(trainer(), module, "val_f1", [0.5], dataloaders=data, resamples=200)
    assert found.scores.shape == (2, 1)
    assert "is not the mean over its parts" in found.verdict
    assert "one number per τ" in found.verdict or "Keep it" in found.verdict
    metric = MulticlassF1Score(CLASSES)
    with torch.no_grad():
        metric(module.eval()(data.dataset.tensors[0]), data.dataset.tensors[1])
    assert found.plain.score == pytest.approx(float(metric.compute()), abs=1e-6)


def test_it_is_left_as_it_was_when_validation_fails() -> None:
    class Fails(Classifier):
        calls = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.calls += 1
            if self.calls > 20:
                raise RuntimeError("the disk is full")
            super().validation_step(batch, batch_idx)

    module = Fails("timm_vit")
    before = {name: t.clone() for name, t in module.state_dict().items()}
    runs = trainer()
    callbacks = list(runs.callbacks)
    with pytest.raises(RuntimeError, match="the disk is full"):
        tune_on_validation(runs, module, "val_loss", [0.5, 0.8], dataloaders=loader(), resamples=200)
    assert module.calls == 21
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert "_temp_scale" not in vars(module)
    assert list(runs.callbacks) == callbacks


def held(module: LightningModule) -> LightningModule:
    attachment(module).leave(Entry("temp_scale", "", {}))
    return module


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"metric": "val_acc"}, r"does not log 'val_acc'.*It logs \['val_loss'\]"),
        ({"metric": "val_los", "maximize": False}, "Did you mean 'val_loss'"),
        ({"metric": "frobs"}, "cannot be told from its name: give `maximize`"),
        ({"dataloaders": [loader(), loader()], "module": TwoLoaders("timm_vit")}, "2 validation loaders"),
        ({"trainer": trainer(limit_val_batches=0)}, "no validation batches"),
        ({"trainer": trainer(limit_val_batches=0.5)}, "limit_val_batches=0.5"),
        ({"trainer": trainer(TempScale(tau=0.8))}, "take it out"),
        ({"taus": []}, "`taus` is empty"),
        ({"taus": [0.5, -1.0]}, "is -1.0"),
        ({"module": held(Classifier("timm_vit"))}, "hold its temperature"),
        ({"exclude": ["nothing"]}, "matches no attention"),
    ],
)
def test_refusals(given: dict[str, Any], says: str) -> None:
    usual = {"trainer": trainer(), "module": Classifier("timm_vit"), "metric": "val_loss", "dataloaders": loader(8)}
    usual["taus"] = [0.5]
    with pytest.raises(ValueError, match=says):
        tune_on_validation(**usual | given, resamples=200)


# -- the command line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the console script in this process; the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["lightning-efficient", "tune-temperature", *map(str, args)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


SMALL = ["-c", BASELINE, "--model.depth=1", "--model.embed_dim=16", "--model.num_heads=2"]


def test_the_command(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = DigitsViT(depth=1, embed_dim=16, num_heads=2, pool="avg")
    with torch.no_grad():
        module.net.blocks[0].attn.qkv.weight.mul_(5)
    saver = trainer(max_epochs=0)
    saver.strategy.connect(module)
    saver.save_checkpoint(tmp_path / "a.ckpt")
    out = ["--ckpt_path=a.ckpt", "--metric=val_acc", "--taus", "0.9,0.5", "--resamples=200"]
    assert run(*SMALL, *out, "--png=out/c.png", "--json=out/c.json") == 0
    shown = capsys.readouterr().out
    assert "val_acc by temperature, 50 groups of samples" in shown
    assert "any τ beats 1" in shown
    data = json.loads((tmp_path / "out" / "c.json").read_text())
    assert [row["tau"] for row in data["rows"]] == [1.0, 0.9, 0.5]
    assert (tmp_path / "out" / "c.png").stat().st_size > 10_000
    assert not (tmp_path / "lightning_logs").exists()
    from lightning_efficient.demo.data import Digits

    digits = Digits()
    digits.prepare_data()
    digits.setup("validate")
    batches = list(digits.val_dataloader())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = []
    for tau in (1.0, 0.9, 0.5):
        apply_temp_scale(module.eval(), tau, example=images[:2])
        with torch.no_grad():
            expected.append(float((module(images).argmax(1) == labels).float().mean()))
        remove_temp_scale(module)
    assert [row["score"] for row in data["rows"]] == pytest.approx(expected, abs=1e-6)


def test_the_command_refuses(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("--metric=val_ac", "--mode=max"): "Did you mean 'val_acc'",
        ("--metric=val_acc", "--taus=[0]"): "`tau`) is 0",
        ("--metric=val_acc", "--taus=[]"): "`taus` is empty",
        ("--metric=val_acc", "--temp_scale.mode=log_n"): "a sweep sets a constant one",
        ("--metric=val_acc", "--ckpt_path=nowhere.ckpt"): "nowhere.ckpt",
        ("--metric=val_acc", "--taus=cold"): "taus",
        ("--taus=[0.5]",): "metric",
    }
    for args, says in cases.items():
        assert run(*SMALL, *args) != 0, args
        error = capsys.readouterr().err
        assert says in " ".join(error.split()), (args, error)


def test_help(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "--metric NAME" in capsys.readouterr().out
