"""SAPPruning inside a Trainer: algorithm 1 against a loop without one, validation, collapse, stalls, several fits."""

from __future__ import annotations

import copy
import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from sigma_runs import Do, messages, trainer, weights
from torch import Tensor, nn
from zoo import Classifier, loader

from lightning_efficient.callbacks.magnitude_pruning import MagnitudePruning
from lightning_efficient.callbacks.sap_pruning import SAPPruning, sap_fits
from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.metrics.functional import pq_index
from lightning_efficient.pruning.sap import SapConfig, prune_count
from lightning_efficient.testing.case import Case
from lightning_efficient.testing.checks import assert_resume_exact
from lightning_efficient.trainer.tensorboard import plot_sap_curve

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

TARGETS = ["net.stem.weight", "net.conv.weight", "net.head.weight"]


class Scored(Classifier):
    """Logs a validation score that is dictated, epoch by epoch."""

    scores: list[float] = []  # noqa: RUF012

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.scores[self.current_epoch])


def scored(*scores: float) -> Scored:
    module = Scored("cnn")
    module.scores = list(scores)
    return module


def run(root: Path, *callbacks: Any, module: Classifier | None = None, **kwargs: Any) -> tuple[Trainer, Classifier]:
    module = module or Classifier("cnn")
    t = trainer(root, *callbacks, **{"max_steps": -1, "max_epochs": 6, **kwargs})
    t.fit(module, loader(2), loader(1))
    return t, module


# -- algorithm 1 -----------------------------------------------------------------------------------------------------


def by_hand(epochs: int, iterations: int) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """Algorithm 1 as published, global, without Lightning: masks by multiplication, everything made anew each time."""
    initial = Classifier("cnn").double().state_dict()
    mask = {name: torch.ones_like(initial[name]) for name in TARGETS}
    curve = []
    for iteration in range(iterations + 1):
        module = Classifier("cnn").double()
        made = module.configure_optimizers()
        optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
        params = dict(module.named_parameters())
        for name in TARGETS:
            params[name].data.mul_(mask[name])
        for _ in range(epochs):
            for x, y in loader(2):
                optimizer.zero_grad()
                F.cross_entropy(module(x.double()), y).backward()
                for name in TARGETS:
                    params[name].grad.mul_(mask[name])  # type: ignore[union-attr]
                optimizer.step()
                scheduler.step()
        flat = torch.cat([params[n].detach()[mask[n] > 0] for n in TARGETS])
        index = pq_index(flat, 1, 2)
        curve.append((len(flat) / sum(m.numel() for m in mask.values()), float(index)))
        if iteration < iterations:
            count = int(prune_count(index, torch.tensor(len(flat)), SapConfig(1, 2)))
            threshold = flat.abs().sort().values[count]
            mask = {n: ((params[n].detach().abs() >= threshold) & (mask[n] > 0)).double() for n in TARGETS}
    return {name: value.detach().clone() for name, value in module.state_dict().items()}, curve


@pytest.mark.parametrize("by", ["epochs", "parts"])
def test_algorithm_1(tmp_path: Path, by: str) -> None:
    expected, curve = by_hand(2, 2)
    divided: dict[str, Any] = {"epochs_per_iteration": 2} if by == "epochs" else {"iterations": 2}
    ours = SAPPruning(p=1.0, q=2.0, **divided)
    _, module = run(tmp_path, ours, module=Classifier("cnn").double(), precision="64-true")
    assert [row["step"] for row in ours.history] == [4, 8, 12]
    assert [row["left"] for row in ours.history] == [left for left, _ in curve]
    assert [row["pqi"] for row in ours.history] == pytest.approx([index for _, index in curve], abs=1e-9)
    assert 1.0 == curve[0][0] > curve[1][0] > curve[2][0]
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_everything_goes_back(tmp_path: Path) -> None:
    """Survivors, batch norm's buffers, optimizer and scheduler exactly, at every beginning."""
    seen: dict[int, Any] = {}

    def look(t: Trainer, m: LightningModule) -> None:
        scheduler = t.lr_scheduler_configs[0].scheduler
        state = (weights(m), copy.deepcopy(t.optimizers[0].state_dict()), copy.deepcopy(scheduler.state_dict()))
        seen[t.global_step] = state

    ours = SAPPruning(epochs_per_iteration=2)
    run(tmp_path, ours, Do(on_train_batch_start=look))
    model, optimizer, scheduler = seen[0]
    for step in (4, 8):
        assert seen[step][1] == optimizer
        assert seen[step][2] == scheduler
        for name, value in seen[step][0].items():
            mask = (value != 0) if name in TARGETS else torch.ones(())
            assert torch.equal(value, model[name] * mask.to(value.dtype)), name
    left = [sum(int((seen[s][0][n] != 0).sum()) for n in TARGETS) / 392 for s in (0, 4, 8)]
    assert left == pytest.approx([row["left"] for row in ours.history])
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize("scope", ["layer", "neuron"])
def test_scopes_prune_every_tensor_by_its_own_index(tmp_path: Path, scope: Any) -> None:
    dense: dict[str, Tensor] = {}
    probe = Do(on_train_batch_start=lambda t, m: dense.update(weights(m)) if t.global_step == 6 else None)
    run(tmp_path, probe, max_epochs=4)
    ours = SAPPruning(p=1.0, q=2.0, scope=scope, iterations=1)
    run(tmp_path, ours)
    for name in TARGETS:
        rows = dense[name].flatten(1) if scope == "neuron" else dense[name].reshape(1, -1)
        counts = prune_count(pq_index(rows, 1, 2, dim=0), torch.full((len(rows),), rows.shape[1]), SapConfig(1, 2))
        found = (~ours.masks[name]).reshape(rows.shape).sum(1)
        assert found.tolist() == counts.tolist()
        assert int(counts.sum()) > 0


def test_the_same_with_one_fit_an_iteration(tmp_path: Path) -> None:
    inside = SAPPruning(epochs_per_iteration=2)
    _, a = run(tmp_path, inside)
    outside, b = SAPPruning(iterations=0), Classifier("cnn")
    numbers: list[int] = []

    def make(iteration: int, pruning: SAPPruning) -> Trainer:
        numbers.append(iteration)
        return trainer(tmp_path, pruning, max_steps=-1, max_epochs=2)

    history = sap_fits(b, outside, make, 2, train_dataloaders=loader(2), val_dataloaders=loader(1))
    assert numbers == [0, 1, 2]
    compared = ("iteration", "left", "pqi", "pqi_scope", "next_pruned", "phase")
    assert [[r[k] for k in compared] for r in history] == [[r[k] for k in compared] for r in inside.history]
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_several_fits_are_checked(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"got iterations=5, epochs_per_iteration=None. Use SAPPruning\(iterations=0\)"
    ):
        sap_fits(Classifier("cnn"), SAPPruning(), lambda i, p: trainer(tmp_path, p), 2)
    with pytest.raises(ValueError, match="the Trainer lacks the callback"):
        sap_fits(Classifier("cnn"), SAPPruning(iterations=0), lambda i, p: trainer(tmp_path), 2)


# -- validation ------------------------------------------------------------------------------------------------------


def test_the_best_weights_on_validation_decide(tmp_path: Path) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    probe = Do(on_validation_end=lambda t, m: seen.update({t.global_step: weights(m)}))
    ours = SAPPruning(epochs_per_iteration=3, monitor="val_acc", mode="max", select="best")
    run(tmp_path, ours, probe, module=scored(0.5, 0.9, 0.6, 0.1, 0.2, 0.3))
    flat = torch.cat([seen[4][n].flatten() for n in TARGETS])
    assert ours.history[0]["pqi"] == pytest.approx(float(pq_index(flat)), abs=1e-12)
    assert [row["score"] for row in ours.history] == pytest.approx([0.9, 0.3])
    kept = torch.cat([ours.masks[n].flatten() for n in TARGETS])
    assert float(flat[kept].abs().min()) >= float(flat[~kept].abs().max())
    latest = torch.cat([seen[6][n].flatten() for n in TARGETS]).abs()
    assert float(latest[kept].min()) < float(latest[~kept].max()), "the test could not tell"


def test_collapse_stops_and_the_model_before_it_is_kept(tmp_path: Path) -> None:
    trained: dict[int, dict[str, Tensor]] = {}
    probe = Do(on_validation_end=lambda t, m: trained.update({t.current_epoch: weights(m)}))
    ours = SAPPruning(epochs_per_iteration=1, monitor="val_acc", mode="max", stop_at="collapse", scope="layer")
    with messages() as said:
        t, module = run(tmp_path, ours, probe, module=scored(0.9, 0.91, 0.88, 0.5, 0.9, 0.9))
    assert t.current_epoch == 3 + 1
    assert ours.stopped == "collapse"
    assert [row["phase"] for row in ours.history][-1] == "collapse"
    assert "val_acc collapsed in iteration 3; weights and masks of iteration 2 are back" in "\n".join(said)
    assert all(torch.equal(v, trained[2][k]) for k, v in module.state_dict().items())
    assert all(torch.equal(ours.masks[n], trained[2][n] != 0) for n in TARGETS)


def test_collapse_with_sigma_reparam_gives_the_weights_back_exactly(tmp_path: Path) -> None:
    trained: dict[int, dict[str, Tensor]] = {}
    probe = Do(on_validation_end=lambda t, m: trained.update({t.current_epoch: weights(m)}))
    ours = SAPPruning(epochs_per_iteration=1, monitor="val_acc", mode="max", stop_at="collapse")
    _, module = run(tmp_path, SigmaReparam(), ours, probe, module=scored(0.9, 0.91, 0.1, 0.5, 0.9, 0.9))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-6, atol=1e-8)


def test_a_stall_is_reported_and_stops(tmp_path: Path) -> None:
    ours = SAPPruning(epochs_per_iteration=1, scope="neuron", include=["net.head"])
    with pytest.warns(UserWarning, match=r"has stalled after iteration \d+ .*small fan-in"):
        t, _ = run(tmp_path, ours, max_epochs=30)
    assert ours.stopped == "stalled"
    assert t.current_epoch == len(ours.history) < 30
    assert ours.history[-1]["next_pruned"] == 0


# -- logs ------------------------------------------------------------------------------------------------------------


def test_the_curve_is_logged_and_drawn(tmp_path: Path) -> None:
    ours = SAPPruning(epochs_per_iteration=2, monitor="val_loss")
    logger = CSVLogger(tmp_path, name="csv")
    run(tmp_path, ours, logger=logger)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(lines) if row["efficient/sap_pruning/pqi"]]
    assert [float(row["efficient/sap_pruning/pqi"]) for row in rows] == pytest.approx([r["pqi"] for r in ours.history])
    assert [float(row["efficient/sap_pruning/left"]) for row in rows] == pytest.approx(
        [r["left"] for r in ours.history]
    )
    figure = plot_sap_curve(ours.history)
    assert [axes.get_ylabel() for axes in figure.axes] == ["PQ index", "validation"]
    assert len(figure.axes[0].lines[0].get_xdata()) == 3
    assert len(plot_sap_curve([{**row, "score": None} for row in ours.history]).axes) == 1


# -- resume ----------------------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "parts": {"iterations": 2},
    "at the cut": {"iterations": 1},
    "every step": {"iterations": 5, "p": 1.0, "q": 2.0},
    "neuron": {"iterations": 2, "scope": "neuron", "p": 1.0, "q": 2.0},
}


@pytest.mark.parametrize("arguments", RESUMED)
@pytest.mark.parametrize("company", ["alone", "sigma"])
def test_resume_is_exact(tmp_path: Path, arguments: str, company: str) -> None:
    def callbacks() -> tuple[Any, ...]:
        ours = SAPPruning(**RESUMED[arguments])
        return (SigmaReparam(), ours) if company == "sigma" else (ours,)

    case = Case(callbacks, {"plain": partial(Classifier, "cnn")}, lambda b, s, d: loader(b, s, dtype=d), tmp_path)
    assert_resume_exact(case)
    assert_resume_exact(case, max_epochs=1)


@pytest.mark.parametrize("select", ["last", "best"])
@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 4])
def test_resume_from_the_files_of_any_epoch(tmp_path: Path, epoch: int, select: Any) -> None:
    """ModelCheckpoint writes after validation, before our epoch has ended."""
    make = partial(SAPPruning, epochs_per_iteration=2, monitor="val_loss", select=select, p=1.0, q=2.0)
    whole = make()
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _, a = run(tmp_path, whole, every, enable_checkpointing=True)
    resumed, b = make(), Classifier("cnn")
    t = trainer(tmp_path, resumed, max_steps=-1, max_epochs=6)
    t.fit(b, loader(2), loader(1), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert resumed.history == whole.history
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert all(torch.equal(v, resumed.masks[k]) for k, v in whole.masks.items())


@pytest.mark.parametrize(
    ("arguments", "epochs", "match"),
    [
        ({"gamma": 1.5}, 6, "`gamma`: 1.0 then, 1.5 now"),
        ({"scope": "layer"}, 6, "`scope`: 'global' then, 'layer' now"),
        ({"iterations": 3}, 6, "`iterations`: 2 then, 3 now"),
    ],
)
def test_resuming_another_schedule_is_refused(tmp_path: Path, arguments: Any, epochs: int, match: str) -> None:
    t, _ = run(tmp_path, SAPPruning(iterations=2))
    t.save_checkpoint(tmp_path / "file.ckpt")
    again = trainer(tmp_path, SAPPruning(**{"iterations": 2, **arguments}), max_steps=-1, max_epochs=epochs)
    with pytest.raises(RecipeError, match=match):
        again.fit(Classifier("cnn"), loader(2), loader(1), ckpt_path=tmp_path / "file.ckpt")


def test_masks_of_another_method_are_not_lost_silently(tmp_path: Path) -> None:
    t, _ = run(tmp_path, SAPPruning(iterations=2))
    t.save_checkpoint(tmp_path / "file.ckpt")
    again = trainer(tmp_path, MagnitudePruning(), max_steps=-1, max_epochs=9)
    with pytest.raises(RecipeError, match=r"holds what .*SAPPruning.* pruned; this run has MagnitudePruning"):
        again.fit(Classifier("cnn"), loader(2), loader(1), ckpt_path=tmp_path / "file.ckpt")


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"p": 1.0}, "0 < p < q; got p=1.0, q=1.0"),
        ({"iterations": -1}, "`iterations` must be a whole number from 0; got -1"),
        ({"epochs_per_iteration": 0}, "`epochs_per_iteration` must be a whole number from 1; got 0"),
        ({"select": "best"}, "judge by a validation metric: name it"),
        ({"stop_at": "collapse"}, "judge by a validation metric"),
        ({"stop_at": "stall"}, "`stop_at` must be one of"),
        ({"mode": "acc"}, "`mode` must be null or one of"),
        ({"tolerance": -0.1}, "`tolerance` must not be negative"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SAPPruning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "kwargs", "match"),
    [
        ({"epochs_per_iteration": 6}, {}, "leaves no second iteration in a run of 6 epochs"),
        ({"iterations": 12}, {}, "12 `iterations` need more than 12 steps, but the run has 12"),
        ({"monitor": "val_f1"}, {}, r"`monitor`='val_f1' is not among the logged metrics \[.*'val_loss'\]"),
        ({"monitor": "val_los"}, {}, r"`monitor`='val_los' .did you mean 'val_loss'.. is not"),
        (
            {"monitor": "val_loss"},
            {"limit_val_batches": 0},
            r"`monitor`='val_loss' needs a validation",
        ),
    ],
)
def test_runs_that_do_not_fit(tmp_path: Path, arguments: Any, kwargs: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        run(tmp_path, SAPPruning(**arguments), **kwargs)


def test_weights_that_became_zero_have_no_index(tmp_path: Path) -> None:
    def zero(t: Trainer, m: LightningModule) -> None:
        for child in m.modules():
            if isinstance(child, (nn.Conv2d, nn.Linear)):
                child.weight.data.zero_()

    with pytest.raises(ValueError, match="PQ index of weights without a nonzero entry is undefined"):
        run(tmp_path, SAPPruning(iterations=1), Do(on_validation_end=zero))


def test_stock_cli_needs_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fit"])
    (tmp_path / "config.yaml").write_text(
        """
        trainer:
          accelerator: cpu
          max_epochs: 4
          logger: false
          enable_checkpointing: false
          enable_progress_bar: false
          enable_model_summary: false
          log_every_n_steps: 1
          callbacks:
            - class_path: lightning_efficient.SAPPruning
              init_args: {p: 1.0, q: 2.0, scope: layer, epochs_per_iteration: 2, exclude: ["net.head"]}
        model: {net: cnn}
        """
    )

    class Batches(LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    args = ["fit", "-c", str(tmp_path / "config.yaml")]
    cli = LightningCLI(Classifier, Batches, args=args, save_config_callback=None, seed_everything_default=False)
    ours = next(cb for cb in cli.trainer.callbacks if isinstance(cb, SAPPruning))  # type: ignore[attr-defined]
    assert list(ours.masks) == TARGETS[:2]
    params = dict(cli.model.named_parameters())
    assert all(torch.equal(params[name] != 0, mask) for name, mask in ours.masks.items())
    assert ours.history[1]["left"] < 1
