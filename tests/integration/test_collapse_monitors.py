"""NeuralCollapseMonitor and PosteriorCollapseMonitor in a real Trainer."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Accuracy

from lightning_efficient import NeuralCollapseMonitor, PosteriorCollapseMonitor
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.metrics import NeuralCollapse, PosteriorCollapse

NC, PC = "efficient/neural_collapse_monitor", "efficient/posterior_collapse_monitor"
K, D = 3, 6


class Model(LightningModule):
    """A classifier with two linear layers before its head, and what users add to it."""

    def __init__(self, *traits: str) -> None:
        super().__init__()
        self.traits = traits
        self.body = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, D))
        self.idle = nn.Linear(D, 7)  # called last, feeds nothing
        self.classify, self.other = nn.Linear(D, K), nn.Linear(D, K)
        self.accuracy = Accuracy("multiclass", num_classes=K)
        self.automatic_optimization = "manual" not in traits
        self.seen: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = (batch["x"], batch["target"])
        h = self.body(x)
        if not self.training:
            self.seen.append(h.detach().clone())
        logits = self.classify(h)
        self.idle(h.detach())
        self.accuracy(logits, y)
        loss = nn.functional.cross_entropy(logits, y, ignore_index=-100)
        if "two heads" in self.traits:
            loss = loss + nn.functional.cross_entropy(self.other(h), y)
        if "penalty" in self.traits:
            loss = loss + 0.1 * h.square().mean()
        return loss

    def training_step(self, batch: Any, index: int) -> Any:
        loss = self.loss(batch)
        if self.automatic_optimization:
            return {"loss": loss, "more": 1}
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_loss", loss)
        return None

    def validation_step(self, batch: Any, index: int) -> None:
        loss = self.loss(batch)
        if "silent" not in self.traits:
            self.log("val_loss", loss)
        self.log("val_acc", self.accuracy)

    def on_validation_epoch_start(self) -> None:
        self.seen = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def data(count: int = 45, ignored: bool = False) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(3)
    y = torch.randint(0, K, (count,), generator=g)
    x = torch.randn(count, 5, generator=g) + nn.functional.one_hot(y, 5)
    group = torch.randint(0, K, (count,), generator=g)  # an integer that is no label
    y = y.masked_fill(torch.arange(count) % 4 == 0, -100) if ignored else y
    return DataLoader([{"group": c, "x": a, "target": b} for a, b, c in zip(x, y, group, strict=True)], 8)  # type: ignore[arg-type]


def fit(root: Path, *callbacks: Callback, model: Any = None, val: Any = None, **options: Any) -> tuple[Trainer, Any]:
    seed_everything(5, verbose=False)
    model = model or Model()
    trainer = Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        callbacks=list(callbacks), **{"max_epochs": 2, "enable_checkpointing": False, "logger": False} | options,
    )  # fmt: skip
    trainer.fit(model, data(48), data() if val is None else val)
    return trainer, model


def logged(trainer: Trainer, prefix: str) -> dict[str, float]:
    names = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
    return {name.removeprefix(f"{prefix}/"): value for name, value in names.items()}


def expected(model: Any, val: Any) -> dict[str, float]:
    h, y = torch.cat(model.seen[-6:]), torch.cat([batch["target"] for batch in val])
    metric = NeuralCollapse(K)
    metric.update(h[y >= 0], y[y >= 0], model.classify.weight, model.classify.bias)
    return {name: float(value) for name, value in metric.compute().items()} | {"samples": int((y >= 0).sum())}


@pytest.mark.parametrize("ignored", [False, True])
def test_head_and_labels_are_found_and_measured(tmp_path: Path, ignored: bool) -> None:
    monitor, val = NeuralCollapseMonitor(), data(ignored=ignored)
    trainer, model = fit(tmp_path, monitor, val=val)
    found = logged(trainer, NC)
    assert found == pytest.approx(expected(model, val), rel=1e-4, nan_ok=True)
    assert monitor.watched() == {"head": "classify"}


@pytest.mark.parametrize("traits", [(), ("manual",)])
def test_in_training(tmp_path: Path, traits: tuple[str, ...]) -> None:
    trainer, _ = fit(tmp_path, NeuralCollapseMonitor(stage="train"), model=Model(*traits))
    found = logged(trainer, NC)
    assert found["samples"] == 48
    assert found["classes"] == 3
    assert math.isfinite(found["nc1"])
    assert 0 <= found["nc4"] <= 1


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        (("two heads",), r"depends on 'other', and not through it alone: on \['body.0', 'body.3', 'classify'\]"),
        (("penalty",), r"depends on 'classify', and not through it alone: on \['body.0', 'body.3'\]"),
        (("silent",), r"no linear layer was found whose output changes.*Name the classifier by `head`"),
    ],
)
def test_what_is_not_clear_has_to_be_named(tmp_path: Path, traits: tuple[str, ...], message: str) -> None:
    with pytest.raises(NoMatchError, match=message):
        fit(tmp_path, NeuralCollapseMonitor(), model=Model(*traits))
    val = data()
    named = NeuralCollapseMonitor(head="classify", labels="target")
    trainer, model = fit(tmp_path, named, model=Model(*traits), val=val)
    assert logged(trainer, NC)["nc1"] == pytest.approx(expected(model, val)["nc1"], rel=1e-4)


def test_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(NoMatchError, match="NeuralCollapseMonitor: `head` 'clasify' matches no module name"):
        fit(tmp_path, NeuralCollapseMonitor(head="clasify"))
    with pytest.raises(ValueError, match=r"labels='y' is not in the batch; it has \['group', 'x', 'target'\]"):
        fit(tmp_path, NeuralCollapseMonitor(head="classify", labels="y"))
    with pytest.raises(ValueError, match="`global_mean`"):
        NeuralCollapseMonitor(global_mean="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`mu` is not given"):
        fit(tmp_path, PosteriorCollapseMonitor(), model=Vae("two"))
    with pytest.raises(NoMatchError, match="`mu` 'men'"):
        fit(tmp_path, PosteriorCollapseMonitor(mu="men"), model=Vae("two"))
    with pytest.raises(ValueError, match=r"mu='mean' returned \[\(8, 3\)\]; expected means and log variances"):
        fit(tmp_path, PosteriorCollapseMonitor(mu="mean"), model=Vae("two"))


# -- variational autoencoders ------------------------------------------------------------------------------------------


class Vae(Model):
    """Three latent units; means and log variances from two modules, from halves of one, or from a tuple."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.mean, self.spread = nn.Linear(5, 3), nn.Linear(5, 3)
        self.both = Pair(form)
        self.decode = nn.Linear(3, 5)
        self.posteriors: list[tuple[Tensor, Tensor]] = []

    def loss(self, batch: Any) -> Tensor:
        x = batch["x"]
        if self.form == "two":
            mu, logvar = self.mean(x), self.spread(x)
        else:
            out = self.both(x)
            mu, logvar = out if isinstance(out, tuple) else out.chunk(2, 1)
        if not self.training:
            self.posteriors.append((mu.detach().flatten(1), logvar.detach().flatten(1)))
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).flatten(1).sum(1)
        return (kl + (self.decode(z.flatten(1)[:, :3]) - x).square().sum(1)).mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_validation_epoch_start(self) -> None:
        self.posteriors = []


class Pair(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.map = form, nn.Linear(5, 6 if form != "map" else 24)

    def forward(self, x: Tensor) -> Any:
        out = self.map(x)
        return tuple(out.chunk(2, 1)) if self.form == "tuple" else out.view(-1, 6, 2, 2) if self.form == "map" else out


@pytest.mark.parametrize("form", ["two", "halves", "tuple", "map"])
def test_posteriors_are_read(tmp_path: Path, form: str) -> None:
    where = {"mu": "mean", "logvar": "spread"} if form == "two" else {"mu": "both"}
    trainer, model = fit(tmp_path, PosteriorCollapseMonitor(**where), model=Vae(form))
    metric = PosteriorCollapse()
    for pair in model.posteriors:
        metric.update(*pair)
    found = metric.compute()
    names = ("active_units", "collapsed", "active_pairs", "kl_total", "units", "samples")
    assert logged(trainer, PC) == pytest.approx({name: float(found[name]) for name in names}, rel=1e-5)
    assert found["samples"] == 45


def test_a_prior_that_is_the_posterior_has_collapsed(tmp_path: Path) -> None:
    same = PosteriorCollapseMonitor(mu="mean", logvar="spread", prior_mu="mean", prior_logvar="spread")
    trainer, _ = fit(tmp_path, same, model=Vae("two"))
    assert logged(trainer, PC)["collapsed"] == 1
    assert logged(trainer, PC)["kl_total"] == pytest.approx(0, abs=1e-9)


# -- both --------------------------------------------------------------------------------------------------------------


class Trace(Callback):
    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.steps += [torch.cat([p.detach().flatten() for p in pl_module.parameters()]), torch.get_rng_state()]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps += [v.clone() for k, v in sorted(trainer.callback_metrics.items()) if k.startswith("val")]


CASES: dict[str, tuple[Any, Any]] = {
    "neural": (NeuralCollapseMonitor, Model),
    "posterior": (lambda **kw: PosteriorCollapseMonitor(mu="both", **kw), lambda: Vae("halves")),
}


@pytest.mark.parametrize("stage", ["val", "train"])
@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same_to_the_bit(tmp_path: Path, case: str, stage: str) -> None:
    make, build = CASES[case]
    results = []
    for callbacks in ([], [make(stage=stage)]):
        seed_everything(1, verbose=False)
        trace = Trace()
        _, model = fit(tmp_path, *callbacks, trace, model=build())
        results.append((trace.steps, list(model.state_dict().values())))
    for one, two in zip(*results, strict=True):
        assert len(one) == len(two) > 6
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_pictures_and_stopping(tmp_path: Path) -> None:
    stop = EarlyStopping(f"{NC}/nc1", mode="min", patience=1, stopping_threshold=1e9)
    loggers = [TensorBoardLogger(tmp_path, name="", version=version) for version in ("nc", "pc")]
    trainer, _ = fit(tmp_path, NeuralCollapseMonitor(), stop, logger=loggers[0], max_epochs=4)
    assert trainer.current_epoch == 1
    fit(tmp_path, PosteriorCollapseMonitor(mu="both"), model=Vae("tuple"), logger=loggers[1], max_epochs=1)
    for version, image, scalar in (
        ("nc", f"{NC}/cosines", f"{NC}/nc2_weight_angles"), ("pc", f"{PC}/units", f"{PC}/kl_total")
    ):  # fmt: skip
        events = EventAccumulator(str(tmp_path / version))
        events.Reload()
        assert image in events.Tags()["images"]
        assert scalar in events.Tags()["scalars"]


class Outcome(Callback):
    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(sorted(logged(trainer, self.prefix).items()), self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(tmp_path: Path, case: str) -> None:
    make, build = CASES[case]
    prefix = NC if case == "neural" else PC
    torch.manual_seed(1)
    model = build()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.0)
    monitor = make(max_samples=31)
    trainer, _ = fit(tmp_path, deepcopy(monitor), model=model, max_epochs=1)
    options = {
        "devices": 2,
        "strategy": "ddp_fork_find_unused_parameters_true",
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    fit(tmp_path, monitor, Outcome(tmp_path, prefix), model=model, **options)
    first, second = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    assert first == second
    assert dict(first) == pytest.approx(logged(trainer, prefix), rel=1e-5, nan_ok=True)
