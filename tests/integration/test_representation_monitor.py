"""RepresentationMonitor in a real Trainer: what it reads, what it logs, and that it changes nothing."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import RepresentationMonitor
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.metrics.functional import alignment, lidar, participation_ratio, rankme, uniformity

PREFIX = "efficient/representation_monitor"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists"),
]
WIDTH = 12


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """As Hugging Face's: a mapping and a dataclass, the loss first."""

    loss: Any = None
    last_hidden_state: Any = None
    attentions: Any = None

    def __post_init__(self) -> None:
        for name in ("loss", "last_hidden_state", "attentions"):
            self[name] = getattr(self, name)


class Backbone(nn.Module):
    """Nine pixels to embeddings, in the form that is asked for."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.map = nn.Linear(9, WIDTH * (4 if form not in ("rows", "tuple", "dict") else 1))
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        z = self.drop(self.map(x.flatten(1)))
        tokens = z.unflatten(1, (4, WIDTH)) if z.shape[1] > WIDTH else z
        return {
            "rows": z,
            "tuple": (z, (z * 2, z * 3)),
            "dict": {"logits": z, "features": z * 2},
            "tokens": tokens,
            "tokens first": tokens.transpose(0, 1) if tokens.dim() == 3 else None,
            "map": tokens.transpose(1, -1).reshape(-1, WIDTH, 2, 2) if tokens.dim() == 3 else None,
            "map last": tokens.reshape(-1, 2, 2, WIDTH) if tokens.dim() == 3 else None,
            "hf": Output(tokens.mean(), tokens, tokens) if tokens.dim() == 3 else None,
        }[self.form]


def rows_of(out: Any) -> Tensor:
    """A row per sample, as the user's own head takes it."""
    out = out["last_hidden_state"] if isinstance(out, Output) else out
    out = out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
    return out if out.dim() == 2 else out.flatten(1)


class Model(LightningModule):
    def __init__(self, form: str = "rows", views: int = 1, masked: bool = False, **traits: bool) -> None:
        super().__init__()
        self.backbone = Backbone(form)
        self.head = nn.LazyLinear(3) if form == "tokens first" else nn.Linear(self.backbone.map.out_features, 3)
        self.views, self.masked, self.traits = views, masked, traits
        self.automatic_optimization = not traits.get("manual", False)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        kwargs = {"attention_mask": (x[:, 0, 0, :3].new_ones(len(x), 4) > 0) & mask_of(x)} if self.masked else {}
        if self.traits.get("checkpointing") and torch.is_grad_enabled():
            return checkpoint(self.backbone, x, use_reentrant=False)
        return self.backbone(x, **kwargs)

    def loss(self, batch: Any) -> Tensor:
        outs = [self(batch[0] + 0.1 * view) for view in range(self.views)]
        self.seen += [deepcopy_of(out) for out in outs] if not self.training else []
        rows = rows_of(outs[0])
        return nn.functional.cross_entropy(self.head(rows if self.backbone.form != "tokens first" else
                                                     outs[0].transpose(0, 1).flatten(1)), batch[1])  # fmt: skip

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def on_validation_epoch_start(self) -> None:
        self.seen = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def mask_of(x: Tensor) -> Tensor:
    """Between one and four tokens of each sample."""
    return torch.arange(4) < 1 + (x.flatten(1).sum(1, keepdim=True).abs() * 10).long() % 4


def deepcopy_of(out: Any) -> Any:
    return out.detach().clone() if isinstance(out, Tensor) else out


def data(count: int = 48, seed: int = 3) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(torch.randn(count, 1, 3, 3, generator=g), torch.arange(count) % 3), 8)


def fit(
    root: Path, *callbacks: Callback, model: LightningModule | None = None, val: Any = None, **options: Any
) -> tuple[Trainer, Any]:
    seed_everything(5, verbose=False)
    model = model or Model()
    kept = {"max_epochs": 2, "enable_checkpointing": False, "logger": False} | options
    trainer = Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        callbacks=list(callbacks), **kept,
    )  # fmt: skip
    trainer.fit(model, data(), data(28, 4) if val is None else val)
    return trainer, model


def logged(trainer: Trainer) -> dict[str, float]:
    return {k.removeprefix(f"{PREFIX}/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(PREFIX)}


# -- what is read ------------------------------------------------------------------------------------------------------


def test_values_are_those_of_the_embeddings_of_the_last_epoch(tmp_path: Path) -> None:
    names = ["rankme", "effective_rank", "stable_rank", "participation_ratio", "alpha_req", "uniformity"]
    trainer, model = fit(tmp_path, RepresentationMonitor(module="backbone", metrics=names))
    z = torch.cat(model.seen).double()
    found = logged(trainer)
    assert set(found) == {*names, "samples"}
    assert found["samples"] == len(z) == 28  # of the last epoch only, and not of the sanity check
    assert found["rankme"] == pytest.approx(float(rankme(z)), rel=1e-6)
    assert found["participation_ratio"] == pytest.approx(float(participation_ratio(z)), rel=1e-6)
    assert found["uniformity"] == pytest.approx(float(uniformity(z)), rel=1e-5)


FORMS: list[tuple[str, dict[str, Any], Any]] = [
    ("rows", {}, lambda z: z),
    ("rows", {"pool": "cls"}, lambda z: z),
    ("tuple", {}, lambda out: out[0]),
    ("tuple", {"output": "1.0"}, lambda out: out[1][0]),
    ("dict", {"output": "features"}, lambda out: out["features"]),
    ("hf", {}, lambda out: out["last_hidden_state"].mean(1)),
    ("hf", {"pool": "cls"}, lambda out: out["last_hidden_state"][:, 0]),
    ("hf", {"output": "attentions"}, lambda out: out["attentions"].mean(1)),
    ("tokens", {"pool": "flatten"}, lambda z: z.flatten(1)),
    ("tokens", {"pool": None}, lambda z: z.flatten(0, 1)),
    ("tokens first", {}, lambda z: z.mean(0)),
    ("map", {}, lambda z: z.mean((2, 3))),
    ("map", {"pool": "flatten"}, lambda z: z.flatten(1)),
    ("map", {"pool": None}, lambda z: z.permute(0, 2, 3, 1).flatten(0, 2)),
    ("map last", {"channels_last": True}, lambda z: z.mean((1, 2))),
]


@pytest.mark.parametrize(("form", "options", "read"), FORMS, ids=lambda v: str(v) if not callable(v) else "")
def test_whatever_the_module_returns(tmp_path: Path, form: str, options: dict[str, Any], read: Any) -> None:
    monitor = RepresentationMonitor(module="backbone", metrics=["rankme"], **options)
    trainer, model = fit(tmp_path, monitor, model=Model(form), max_epochs=1)
    z = torch.cat([read(out) for out in model.seen]).double()
    assert logged(trainer) == pytest.approx({"rankme": float(rankme(z)), "samples": len(z)}, rel=1e-6)


@pytest.mark.parametrize("pool", ["mean", None])
def test_padded_tokens_are_left_out(tmp_path: Path, pool: Any) -> None:
    monitor = RepresentationMonitor(module="backbone", metrics=["rankme"], pool=pool)
    val = data(28, 4)
    trainer, model = fit(tmp_path, monitor, model=Model("tokens", masked=True), max_epochs=1, val=val)
    masks = [mask_of(x) for x, _ in val]
    rows = [out[mask] for out, mask in zip(model.seen, masks, strict=True)]
    if pool == "mean":
        rows = [
            torch.stack([o[m].mean(0) for o, m in zip(*pair, strict=True)])
            for pair in zip(model.seen, masks, strict=True)
        ]
    assert logged(trainer)["rankme"] == pytest.approx(float(rankme(torch.cat(rows).double())), rel=1e-6)


def test_views_are_the_calls_of_a_step(tmp_path: Path) -> None:
    monitor = RepresentationMonitor(module="backbone", metrics=["LiDAR", "alignment", "rankme"])
    trainer, model = fit(tmp_path, monitor, model=Model(views=3), max_epochs=1)
    views = torch.stack([torch.cat(model.seen[i::3]) for i in range(3)], 1).double()
    found = logged(trainer)
    assert found["lidar"] == pytest.approx(float(lidar(views)), rel=1e-6)
    assert found["alignment"] == pytest.approx(float(alignment(views[:, 0], views[:, 1])), rel=1e-5)
    assert found["rankme"] == pytest.approx(float(rankme(views.flatten(0, 1))), rel=1e-6)
    assert found["samples"] == 84
    with pytest.raises(ValueError, match=r"\['alignment'\] compare views.*once in a step"):
        fit(tmp_path, RepresentationMonitor(module="backbone", metrics=["alignment"]))


def test_at_most_so_many_samples(tmp_path: Path) -> None:
    trainer, model = fit(tmp_path, RepresentationMonitor(module="backbone", metrics=["rankme"], max_samples=13))
    assert logged(trainer) == pytest.approx(
        {"samples": 13, "rankme": float(rankme(torch.cat(model.seen)[:13].double()))}, rel=1e-6
    )


@pytest.mark.parametrize("traits", [{}, {"checkpointing": True}, {"manual": True}])
def test_training_batches(tmp_path: Path, traits: dict[str, bool]) -> None:
    """Recomputation in the backward pass is no further call."""
    seen: list[Tensor] = []

    class Kept(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.clear()
            self.handle = pl_module.backbone.register_forward_hook(self.keep)

        def keep(self, module: Any, args: Any, out: Tensor) -> None:
            if module.training and torch._C._current_graph_task_id() == -1:
                seen.append(out.detach().clone())

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.handle.remove()

    monitor = RepresentationMonitor(module="backbone", stage="train", metrics=["rankme"])
    trainer, _ = fit(tmp_path, monitor, Kept(), model=Model(**traits))
    assert logged(trainer)["samples"] == 48
    assert logged(trainer)["rankme"] == pytest.approx(float(rankme(torch.cat(seen).double())), rel=1e-6)


def test_the_stages_of_a_trainer_without_fit(tmp_path: Path) -> None:
    trainer, model = fit(tmp_path, max_epochs=1)
    for stage, run in (("val", trainer.validate), ("test", trainer.test)):
        trainer.callbacks = [RepresentationMonitor(module="backbone", stage=stage, metrics=["rankme"])]
        (result,) = run(model, data(), verbose=False)
        assert result[f"{PREFIX}/samples"] == 48
        other = [RepresentationMonitor(module="backbone", stage="train", metrics=["rankme"])]
        trainer.callbacks = other
        assert not [name for name in run(model, data(), verbose=False)[0] if name.startswith(PREFIX)]


# -- that it changes nothing -------------------------------------------------------------------------------------------


class Trace(Callback):
    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.steps += [torch.cat([p.detach().flatten() for p in pl_module.parameters()]), torch.get_rng_state()]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.callback_metrics["val_loss"].clone())


@pytest.mark.parametrize("stage", ["val", "train"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("enabled", [True, False])
def test_the_run_is_the_same_to_the_bit(tmp_path: Path, stage: Any, options: dict[str, Any], enabled: bool) -> None:
    traces = [Trace(), Trace()]
    _, plain = fit(tmp_path, traces[0], **options)
    monitor = RepresentationMonitor(enabled=enabled, module="backbone", stage=stage)
    trainer, watched = fit(tmp_path, monitor, traces[1], **options)
    assert len(traces[0].steps) == len(traces[1].steps) > 12
    assert all(torch.equal(a, b) for a, b in zip(traces[0].steps, traces[1].steps, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
    assert bool(logged(trainer)) == enabled
    assert pickle.loads(pickle.dumps(monitor)).config() == monitor.config()


@pytest.mark.parametrize("inside", [True, False], ids=["inside compiled", "compiled"])
def test_compiled_modules(tmp_path: Path, inside: bool) -> None:
    model = Model()
    torch._dynamo.reset()
    if inside:
        model.net = nn.Sequential(model.backbone)
        model.net = torch.compile(model.net, backend="aot_eager")
        model.forward = lambda x: model.net(x)  # type: ignore[method-assign]
    else:
        model.backbone = torch.compile(model.backbone, backend="aot_eager")
    for monitor in (RepresentationMonitor(module="net.0" if inside else "backbone", metrics=["rankme"]),):
        trainer, model = fit(tmp_path, monitor, model=model)
        z = torch.cat(model.seen).double()
        assert logged(trainer)["rankme"] == pytest.approx(float(rankme(z)), rel=1e-5)


# -- what it logs ------------------------------------------------------------------------------------------------------


def test_readable_by_stopping_and_checkpoints_and_drawn(tmp_path: Path) -> None:
    class Collapses(Model):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                nn.init.ones_(self.backbone.map.weight)
                nn.init.zeros_(self.backbone.map.bias)

    stop = EarlyStopping(f"{PREFIX}/rankme", mode="max", patience=10, stopping_threshold=None, divergence_threshold=4.0)
    best = ModelCheckpoint(tmp_path / "best", monitor=f"{PREFIX}/rankme", mode="max")
    loggers = [TensorBoardLogger(tmp_path, name="", version="tb"), CSVLogger(tmp_path, name="", version="csv")]
    trainer, _ = fit(
        tmp_path, stop, best, RepresentationMonitor(module="backbone"), model=Collapses(), max_epochs=6, logger=loggers,
        enable_checkpointing=True,
    )  # fmt: skip
    assert trainer.current_epoch == 3
    assert "Divergence" in stop.stopping_reason_message
    assert best.best_model_score > 5
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0})
    events.Reload()
    scalars = events.Scalars(f"{PREFIX}/rankme")
    assert [s.step for s in events.Images(f"{PREFIX}/spectrum")] == [6, 12, 18]
    assert len(scalars) == 3
    assert scalars[-1].value < 4 < scalars[0].value
    assert f"{PREFIX}/rankme" in (tmp_path / "csv" / "metrics.csv").read_text()


def test_two_monitors_are_told_apart_by_name(tmp_path: Path) -> None:
    both = (
        RepresentationMonitor(module="backbone", metrics=["rankme"]),
        RepresentationMonitor(module="head", metrics=["rankme"], name="head"),
    )
    trainer, _ = fit(tmp_path, *both)
    assert {f"{PREFIX}/rankme", f"{PREFIX}/head/rankme"} <= set(trainer.callback_metrics)
    with pytest.raises(
        ValueError, match=r"2 enabled RepresentationMonitor log under efficient/representation_monitor/"
    ):
        fit(tmp_path, RepresentationMonitor(module="backbone"), RepresentationMonitor(module="head"))


def test_the_modules_own_forward(tmp_path: Path) -> None:
    trainer, model = fit(tmp_path, RepresentationMonitor(metrics=["rankme"]))
    assert logged(trainer)["rankme"] == pytest.approx(float(rankme(torch.cat(model.seen).double())), rel=1e-6)


# -- what cannot be read -----------------------------------------------------------------------------------------------


def test_a_module_that_is_never_called_is_told_once(tmp_path: Path) -> None:
    class Idle(Model):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(3, 3)

    with pytest.warns(UserWarning, match="'idle' was not called in any val batch of the epoch") as caught:
        trainer, _ = fit(tmp_path, RepresentationMonitor(module="idle"), model=Idle(), max_epochs=3)
    assert len([w for w in caught if "RepresentationMonitor" in str(w.message)]) == 1
    assert not logged(trainer)


def test_diverged_embeddings_are_nan_and_told_once(tmp_path: Path) -> None:
    class Diverges(Model):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                nn.init.constant_(self.backbone.map.bias, math.nan)

    monitor = RepresentationMonitor(module="backbone", metrics=["rankme", "uniformity"])
    with pytest.warns(UserWarning, match="are NaN or infinite") as caught:
        trainer, _ = fit(tmp_path, monitor, model=Diverges(), max_epochs=3)
    assert len([w for w in caught if "RepresentationMonitor" in str(w.message)]) == 1
    assert math.isnan(logged(trainer)["rankme"])
    assert math.isnan(logged(trainer)["uniformity"])


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(
        NoMatchError, match=r"RepresentationMonitor: `module` 'bakbone' matches no module name.*'backbone'"
    ):
        fit(tmp_path, RepresentationMonitor(module="bakbone"))
    with pytest.raises(ValueError, match=r"logits \(8, 12\), features \(8, 12\)\): say which one by `output`"):
        fit(tmp_path, RepresentationMonitor(module="backbone"), model=Model("dict"))
    with pytest.raises(ValueError, match=r"`output='x'` is not in the tuple that it returned; it has 0 \(8, 12\)"):
        fit(tmp_path, RepresentationMonitor(module="backbone", output="x"), model=Model("tuple"))
    with pytest.raises(ValueError, match=r"shape \(8, 12, 2, 2\) and `pool` is 'cls'.*use 'mean'"):
        fit(tmp_path, RepresentationMonitor(module="backbone", pool="cls"), model=Model("map"))
    for argument, value in (("metrics", ["rank_me"]), ("metrics", []), ("metrics", "rankme"), ("pool", "max"),
                            ("stage", "fit"), ("max_samples", 0)):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{argument}`"):
            RepresentationMonitor(**{argument: value})


# -- two processes -----------------------------------------------------------------------------------------------------


class Outcome(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        torch.save((sorted(logged(trainer).items()), weights), self.folder / f"rank{trainer.global_rank}.pt")


class NoDropout(Model):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.drop.p = 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", ["backbone", ""])
def test_two_processes_equal_one(tmp_path: Path, module: str) -> None:
    names = ["rankme", "participation_ratio", "uniformity"]
    monitor = RepresentationMonitor(module=module, metrics=names, max_samples=21)
    torch.manual_seed(1)
    model = NoDropout()
    trainer, _ = fit(tmp_path, deepcopy(monitor), model=deepcopy(model), max_epochs=1)
    fit(
        tmp_path, monitor, Outcome(tmp_path), model=model, max_epochs=1, devices=2, strategy="ddp_fork",
        num_sanity_val_steps=0,
    )  # fmt: skip
    (first, weights), (second, same) = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    assert first == second
    assert torch.equal(weights, same)
    assert dict(first) == pytest.approx(logged(trainer), rel=1e-6)
