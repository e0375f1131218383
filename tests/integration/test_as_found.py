"""Running the user's module outside its loop leaves everything as it was found."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from sigma_runs import Do, trainer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset
from torchmetrics import MeanMetric

from lightning_efficient.common.running import float64_copy
from lightning_efficient.functional import apply_norm_swap
from lightning_efficient.trainer.example import example_of, first_batch, whole_step_of
from lightning_efficient.trainer.replay import Replay
from lightning_efficient.trainer.statistics import recalibrate_in
from lightning_efficient.trainer.validation import ValidationOracle

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode")


class Inner(pl.LightningModule):
    """A module in a module that draws from its own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.layer(x)) + torch.rand(1, generator=self.generator).to(x)


class Messy(pl.LightningModule):
    """Counts, draws, collects, logs, and writes to its own networks and batches, in steps and in batch hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.bn, self.momentum = Inner(), nn.BatchNorm1d(4), nn.Linear(4, 4).requires_grad_(False)
        self.frozen, self.norm, self.fails = nn.Linear(4, 4).eval(), nn.LayerNorm(4), False
        self.metric, self.loose = MeanMetric(), {"mean": [MeanMetric()]}
        self.recent: deque[float] = deque(maxlen=3)
        self.nested: dict[str, list[int]] = {"seen": []}
        self.noise, self.dice, self.calls = np.random.default_rng(0), random.Random(0), 0

    def _everything(self, batch: Any) -> Tensor:
        x = batch[0].mul_(2.0)
        self.calls += 1
        self.momentum.weight.data = 0.9 * self.momentum.weight.data + 0.1 * self.inner.layer.weight.data
        self.inner.layer.weight.data.clamp_(-0.1, 0.1)
        self.frozen.requires_grad_(not self.frozen.weight.requires_grad).train()
        self.bn.running_mean = self.bn.running_mean * 0.5 + 1
        self.bn.running_var.add_(1)
        drawn = random.random() + np.random.rand() + self.noise.random() + self.dice.random()
        out = self.momentum(self.bn(self.inner(x))) + self.frozen(x) + torch.randn_like(x) * drawn
        loss = self.norm(out).square().mean() + out.mean()
        self.metric.update(loss.detach())
        self.loose["mean"][0].update(loss.detach())
        self.recent.append(loss.item())
        self.nested["seen"].append(1)
        self.log_dict({"loss": loss, "metric": self.metric})
        if self.logger is not None:
            self.logger.log_metrics({"direct": 1.0}, step=0)
        if self.fails:
            raise IndexError("it fails")
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._everything(batch)
        if torch.is_grad_enabled():
            loss.backward(retain_graph=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._everything(batch)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls += 1
        batch[0].add_(float(np.random.rand()))
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def traces(t: pl.Trainer, m: Messy, batch: Any) -> dict[str, Any]:
    """Whatever a run of the module could have changed."""
    means = (m.metric, m.loose["mean"][0])
    return {
        "parameters": [p.detach().clone() for p in m.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in m.parameters()],
        "requires_grad": [p.requires_grad for p in m.parameters()],
        "buffers": {name: b.clone() for name, b in m.named_buffers() if "norm.target" not in name},
        "identity": [id(tensor) for tensor in (*m.parameters(), *m.buffers())],
        "training": [x.training for x in m.modules()],
        "metrics": [(x.update_count, x.mean_value.clone()) for x in means],
        "collected": (list(m.recent), list(m.nested["seen"]), m.calls),
        "drawn by torch": (torch.get_rng_state(), m.inner.generator.get_state()),
        "drawn by others": (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            m.dice.getstate(),
            str(m.noise.bit_generator.state),
        ),
        "batch": batch[0].clone(),
        "logged": (dict(t.callback_metrics), dict(t.logged_metrics)),
        "logger": (t.loggers[0], len(t.loggers[0].experiment.metrics), t.state.stage),
        "data": t.train_dataloader.dataset.tensors[0].clone(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def replayed(t: Any, m: Any, stage: Any) -> None:
    replay = Replay(t, m, stage)
    with replay.quiet():
        for number, given in enumerate(replay.batches(t.train_dataloader, 2)):
            replay.step(given, number)


WAYS: dict[str, Callable[[Any, Any, Any], object]] = {
    "a replay of fit": lambda t, m, batch: replayed(t, m, "fit"),
    "a replay of validation": lambda t, m, batch: replayed(t, m, "validate"),
    "first batch": lambda t, m, batch: first_batch(t),
    "example": lambda t, m, batch: example_of(t, m, "fit", batch),
    "whole step": lambda t, m, batch: whole_step_of(t, m, "validate", batch),
    "statistics": lambda t, m, batch: averaged(t, m),
    "oracle": lambda t, m, batch: asked(ValidationOracle(t, m, ["loss"])),
    "a step that fails": lambda t, m, batch: failing(t, m),
}


def asked(oracle: ValidationOracle) -> None:
    with oracle.quiet():
        oracle()


def averaged(t: Any, m: Any) -> None:
    before = m.norm.target.bn.running_mean.clone()
    assert recalibrate_in(t, m, 3, "test")
    assert not torch.equal(before, m.norm.target.bn.running_mean)


def failing(t: Any, m: Any) -> None:
    m.fails = True
    with pytest.warns(UserWarning, match="not recalibrated .IndexError: it fails"):
        assert not recalibrate_in(t, m, 3, "test")
    with pytest.raises(ValueError, match="it fails"):
        example_of(t, m, "fit", first_batch(t))
    m.fails = False


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("way", WAYS)
def test_everything_is_as_found(tmp_path: Path, way: str, precision: Any) -> None:
    looked: list[int] = []

    def look(t: Any, m: Any, *_: Any) -> None:
        batch = (torch.randn(4, 4, dtype=m.bn.weight.dtype), torch.zeros(4))
        before = traces(t, m, batch)
        WAYS[way](t, m, batch)
        after = traces(t, m, batch)
        assert [name for name in before if not same(before[name], after[name])] == []
        looked.append(sum(grad is not None for grad in before["gradients"]))

    data = DataLoader(TensorDataset(torch.randn(32, 4), torch.zeros(32)), 4, shuffle=True)
    hooks = Do(on_train_batch_start=look, on_train_batch_end=look, on_train_epoch_end=look)
    t = trainer(
        tmp_path, hooks, max_steps=2, accumulate_grad_batches=2, logger=CSVLogger(tmp_path), precision=precision
    )
    module = Messy()
    apply_norm_swap(module, {"include": ["norm"]})
    t.fit(module, data, DataLoader(data.dataset, 4))
    assert len(looked) == 9
    assert max(looked) > 0, "in the middle of an accumulation"


# -- loaders -----------------------------------------------------------------------------------------------------------


class Seen(pl.LightningModule):
    """Remembers which samples it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.order = nn.Linear(1, 1), []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.order += batch[0].flatten().tolist()
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class NumpyShuffle(Sampler[int]):
    """Draws its order from numpy."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        return iter(np.random.permutation(self.size).tolist())

    def __len__(self) -> int:
        return self.size


LOADERS: dict[str, Callable[[Any], Any]] = {
    "shuffled": lambda data: DataLoader(data, 4, shuffle=True),
    "own generator": lambda data: DataLoader(data, 4, shuffle=True, generator=torch.Generator()),
    "batch sampler": lambda data: DataLoader(
        data, batch_sampler=BatchSampler(RandomSampler(data, generator=torch.Generator()), 4, False)
    ),
    "numpy": lambda data: DataLoader(data, 4, sampler=NumpyShuffle(len(data))),
    "workers that stay": lambda data: DataLoader(data, 4, shuffle=True, num_workers=1, persistent_workers=True),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_loader_goes_on_as_if_it_had_not_been_read(tmp_path: Path, kind: str) -> None:
    orders = []
    for looks in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        module = Seen()

        def look(t: Any, m: Any, *_: Any, looks: bool = looks) -> None:
            if looks:
                first_batch(t)

        data = TensorDataset(torch.arange(32.0)[:, None])
        t = trainer(tmp_path, Do(on_fit_start=look, on_train_batch_start=look), max_steps=-1, max_epochs=2)
        t.fit(module, LOADERS[kind](data))
        orders.append(module.order)
    assert orders[0] == orders[1]
    assert sorted(orders[0][:32]) == list(range(32))


# -- a step as one module ----------------------------------------------------------------------------------------------


class Autoencoder(pl.LightningModule):
    """Calls no network whole: a layer of its own, an encoder and a decoder with something between, a list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = nn.Module()
        self.vae.encoder, self.vae.decoder = nn.Linear(6, 4), nn.Linear(4, 6)
        self.gain = nn.Parameter(torch.ones(4))
        self.extra = nn.ModuleList([nn.Linear(4, 4)])
        self.plain = [self.extra[0]]
        self.error = MeanMetric()

    def encode(self, x: Tensor) -> Tensor:
        return self.plain[0](torch.tanh(self.vae.encoder(x)) * self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.decoder(self.encode(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        code = self.encode(batch[0])
        self.log("spread", code.std())
        return (self.vae.decoder(code) - batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        error = (self(batch[0]) - batch[0]).abs().mean()
        self.error.update(error)
        self.log_dict({"error": error, "mean": self.error})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("stage", ["fit", "validate", "forward"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_step_as_one_module(tmp_path: Path, stage: Any, precision: Any) -> None:
    """A float64 copy computes the step from its own weights, all of them, and says so by gradients."""
    looked = []

    def look(t: Any, m: Any) -> None:
        example = whole_step_of(t, m, stage, first_batch(t))
        assert type(example.model).__name__ == "Autoencoder"
        assert {n: id(p) for n, p in example.model.named_parameters()} == {n: id(p) for n, p in m.named_parameters()}
        twin = float64_copy(example.model).train(stage == "fit")
        (batch,) = example.args
        x = batch[0].double()
        returned, logged = twin((x,))
        expected = twin.vae.decoder(twin.extra[0](torch.tanh(twin.vae.encoder(x)) * twin.gain))
        outputs = {
            "fit": (returned, (expected - x).square().mean()),
            "validate": (logged.get("error"), (expected - x).abs().mean()),
            "forward": (returned, expected),
        }
        torch.testing.assert_close(*outputs[stage], rtol=1e-12, atol=0)
        outputs[stage][0].sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in twin.parameters())
        assert all(p.grad is None for p in m.parameters())
        assert ("spread" in logged) == (stage == "fit")
        assert m.error.update_count == 0
        looked.append(True)

    data = DataLoader(TensorDataset(torch.randn(8, 6)), 4)
    t = trainer(tmp_path, Do(on_fit_start=look), max_steps=1, precision=precision)
    t.fit(Autoencoder(), data, data)
    assert looked == [True]


def test_a_step_that_does_not_run_says_why(tmp_path: Path) -> None:
    def look(t: Any, m: Any) -> None:
        whole_step_of(t, m, "fit", ())

    data = DataLoader(TensorDataset(torch.randn(8, 6)), 4)
    with pytest.raises(ValueError, match=r"Autoencoder.training_step does not run .* \(IndexError: .*networks cannot"):
        trainer(tmp_path, Do(on_fit_start=look)).fit(Autoencoder(), data, data)
