"""PAGCPPruning inside a Trainer: budgets at decision time, a fit that does not notice, resume, bad input."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from sigma_runs import Do, differing, messages, trainer, written
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from two_heads import TwoTasks, train_loader, val_loader

from lightning_efficient import PAGCPPruning, SigmaReparam
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.methods import build_callback
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.testing.case import ResumableLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:PAGCPPruning pruned nothing"),
]

LOSSES = {"val_digit": 0.3, "val_parity": 0.3}
BOTH = {"val_digit": 0.3, "val_even": 0.05}


def fit(root: Path, *callbacks: Any, module: Any = None, shuffle: bool = False, **kwargs: Any) -> TwoTasks:
    module = TwoTasks() if module is None else module
    options = {"max_epochs": 4, "max_steps": -1} | kwargs
    trainer(root, *callbacks, **options).fit(module, train_loader(shuffle=shuffle), val_loader())
    return module


def judged(root: Path, module: LightningModule) -> dict[str, float]:
    """An independent validation of the same weights: a Trainer of its own."""
    other = TwoTasks()
    other.load_state_dict(module.state_dict())
    return dict(trainer(root).validate(other, val_loader(), verbose=False)[0])


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_every_budget_is_kept_when_it_is_decided(tmp_path: Path) -> None:
    """Metrics just before and just after a round, by a Trainer of their own: within the budget, and as reported."""
    callback = PAGCPPruning(budgets=BOTH, modes={"val_even": "max"}, start=0.5, rounds=2, every=8)
    seen: dict[str, list[dict[str, float]]] = {"before": [], "after": []}

    class Judge(Do):
        def on_train_batch_start(self, t: Any, m: Any, *_: Any) -> None:
            if t.global_step in (16, 24):
                seen[self.when].append(judged(tmp_path, m))

    before, after = Judge(), Judge()
    before.when, after.when = "before", "after"  # type: ignore[attr-defined]
    with messages() as said:
        module = fit(tmp_path, before, callback, after)
    assert [row["step"] for row in callback.history] == [16, 24]
    for i, row in enumerate(callback.history):
        assert row["kept"]
        for name, allowed in BOTH.items():
            was, now = seen["before"][i][name], seen["after"][i][name]
            assert row["baseline"][name] == pytest.approx(was, rel=1e-5)
            assert row["values"][name] == pytest.approx(now, rel=1e-5)
            assert (now / was <= 1 + allowed) if name == "val_digit" else (now >= was * (1 - allowed))
    assert callback.keep, "the budgets are wide enough for something"
    weights = dict(module.named_parameters())
    for name, group in callback.groups.found.items():
        kept = callback.keep.get(name, list(range(group.units)))
        assert (~group.zeros(weights)).nonzero().flatten().tolist() == kept, (
            "zero to the end of the run, and only those"
        )
    text = "\n".join(said)
    assert "round 1 of 2, before step 16" in text
    assert "Budget of val_even kept: " in text
    assert "5.00% allowed" in text
    assert "multiply-accumulates pruned; units left: " in text


class Deeper(TwoTasks):
    """Two hidden layers of one width."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net.drop = nn.Sequential(nn.Linear(16, 16), nn.ReLU())  # type: ignore[assignment]


def test_equal_widths_stay_equal_in_every_round(tmp_path: Path) -> None:
    callback = PAGCPPruning(budgets=LOSSES, start=0.5, rounds=2, every=8, most=0.5, topk=1.0, uniform=True)
    fit(tmp_path, callback, module=Deeper())
    kept = {name: len(callback.keep.get(name, range(g.units))) for name, g in callback.groups.found.items()}
    assert kept["net.hidden"] == kept["net.drop.0"] < 16
    assert callback.keep["net.hidden"] != callback.keep["net.drop.0"]  # each its own
    names = {row["name"] for entry in callback.history for row in entry["rows"]}
    assert "net.hidden and 1 alike" in names
    assert all(entry["kept"] for entry in callback.history)


def test_a_narrow_budget_prunes_less(tmp_path: Path) -> None:
    left = []
    for share in (0.01, 0.1, 1.0):
        callback = PAGCPPruning(budgets={"val_digit": share, "val_parity": share}, start=16, topk=1.0)
        fit(tmp_path, callback, max_epochs=3)
        left.append(1 - callback.history[0]["saved"])
    assert left[0] > left[1] > left[2]


def test_a_sample_searches_and_all_of_the_data_decides(tmp_path: Path) -> None:
    callback = PAGCPPruning(budgets={"val_digit": 0.2}, start=16, batches=1, topk=1.0)
    fit(tmp_path, callback, max_epochs=3)
    row = callback.history[0]
    assert row["kept"]
    assert row["values"]["val_digit"] <= 1.2 * row["baseline"]["val_digit"]


def test_what_is_logged(tmp_path: Path) -> None:
    callback = PAGCPPruning(budgets=LOSSES, start=16)
    logger = CSVLogger(tmp_path)
    fit(tmp_path, callback, logger=logger)
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    column = {n: [float(r[n]) for r in rows if r[n]] for n in rows[0] if n.startswith("efficient/pagcp_pruning/")}
    left, spent = column["efficient/pagcp_pruning/compute_left"], column["efficient/pagcp_pruning/val_digit_spent"]
    assert left == [1.0] * 16 + [pytest.approx(1 - callback.history[0]["saved"], abs=1e-6)] * 16
    assert spent == [pytest.approx(callback.history[0]["spent"]["val_digit"], abs=1e-6)] * 16
    assert column["efficient/pagcp_pruning/units_left"][-1] < 1


# -- a fit that does not notice ----------------------------------------------------------------------------------------


def everything(root: Path, *callbacks: Any) -> tuple[dict[str, Any], dict[str, float], Tensor, Any, Any]:
    """All that a run leaves behind, with dropout, shuffling, a sanity check, and a checkpoint chosen by a metric."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    best = ModelCheckpoint(
        root / "best", monitor="val_digit", filename="{epoch}-{val_digit:.6f}", save_weights_only=True
    )
    module = TwoTasks(dropout=0.3)
    options = {"max_epochs": 3, "max_steps": -1, "num_sanity_val_steps": 2, "enable_checkpointing": True}
    t = trainer(root, *callbacks, best, **options)
    t.fit(module, train_loader(shuffle=True), val_loader())
    numbers = {k: float(v) for k, v in t.callback_metrics.items() if "efficient" not in k}
    state = written(t, root / "end.ckpt")
    state = {k: v for k, v in state.items() if "lightning_efficient" not in k and not k.startswith("/callbacks")}
    return (
        state,
        numbers,
        torch.get_rng_state(),
        random.getstate(),
        (best.best_model_path.rpartition("/")[2], best.best_model_score),
    )


def test_an_oracle_that_decides_nothing_changes_nothing(tmp_path: Path) -> None:
    """Bit for bit: weights, optimizer, scheduler, buffers, metrics, the best checkpoint, every random state."""
    callback = PAGCPPruning(
        budgets={"val_digit": 1e-9, "val_parity": 1e-9}, start=5, rounds=3, every=7, most=0.5, step=0.5
    )
    ours = everything(tmp_path / "ours", callback)
    plain = everything(tmp_path / "plain")
    assert [row["step"] for row in callback.history] == [5, 12, 19]
    assert all(row["evaluations"] > 3 for row in callback.history)
    assert callback.keep == {}, "it decided something after all"
    assert differing(ours[0], plain[0]) == []
    assert ours[1] == plain[1]
    assert torch.equal(ours[2], plain[2])
    assert ours[3] == plain[3]
    assert ours[4] == plain[4]


def test_nothing_is_half_pruned_when_validation_fails(tmp_path: Path) -> None:
    class Fails(TwoTasks):
        calls = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            type(self).calls += self.global_step == 2  # in the round, not while the widths are looked for
            if type(self).calls > 12:
                raise RuntimeError("the disk is full")
            super().validation_step(batch, batch_idx)

    module, before = Fails(), {}
    keep = Do(on_train_batch_start=lambda t, m: before.update({k: v.clone() for k, v in m.state_dict().items()}))
    with pytest.raises(RuntimeError, match="the disk is full"):
        fit(tmp_path, keep, PAGCPPruning(budgets=LOSSES, start=2), module=module)
    assert differing(before, dict(module.state_dict())) == []
    assert module.net.training


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [10, 16, 20])
def test_resume_is_exact(tmp_path: Path, where: int) -> None:
    """Stopped before the rounds, right before one, and between two; mid-epoch, AdamW with a scheduler."""

    def run(name: str, *more: Any, ckpt_path: Any = None) -> tuple[dict[str, Any], PAGCPPruning]:
        callback = PAGCPPruning(budgets=LOSSES, start=0.5, rounds=2, every=0.2)
        torch.manual_seed(0)
        t = trainer(tmp_path, callback, *more, max_epochs=4, max_steps=-1)
        t.fit(TwoTasks(), ResumableLoader(train_loader()), val_loader(), ckpt_path=ckpt_path)
        return written(t, tmp_path / f"{name}.ckpt"), callback

    path = tmp_path / "middle.ckpt"
    save = Do(on_train_batch_end=lambda t, m: t.save_checkpoint(path) if t.global_step == where else None)
    whole, a = run("whole", save)
    resumed, b = run("resumed", ckpt_path=path)
    assert differing(whole, resumed) == []
    assert a.history == b.history
    assert a.keep == b.keep != {}
    entry = next(e for e in recipe.read(torch.load(tmp_path / "whole.ckpt", weights_only=True)))
    assert entry.config["keep"] == a.keep


def test_resume_with_another_length_or_other_budgets(tmp_path: Path) -> None:
    t = trainer(tmp_path, PAGCPPruning(budgets=LOSSES, start=0.5), max_epochs=2, max_steps=-1)
    t.fit(TwoTasks(), train_loader(), val_loader())
    t.save_checkpoint(tmp_path / "a.ckpt")
    longer = PAGCPPruning(budgets=LOSSES, start=0.5)
    again = trainer(tmp_path, longer, max_epochs=4, max_steps=-1)
    again.fit(TwoTasks(), train_loader(), val_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert [row["step"] for row in longer.history] == [8], "no second round where half of the longer run would be"
    other = trainer(tmp_path, PAGCPPruning(budgets={"val_digit": 0.1}, start=0.5), max_epochs=2, max_steps=-1)
    with pytest.raises(RecipeError, match=r"`budgets`: .* now. Resume with the saved values"):
        other.fit(TwoTasks(), train_loader(), val_loader(), ckpt_path=tmp_path / "a.ckpt")


def test_fit_again_goes_on_from_what_is_pruned(tmp_path: Path) -> None:
    callback = PAGCPPruning(budgets=LOSSES, start=4)
    module = fit(tmp_path, callback, max_epochs=2)
    first = {name: set(units) for name, units in callback.keep.items()}
    fit(tmp_path, callback, module=module, max_epochs=1)
    assert first
    assert all(set(callback.keep[name]) <= units for name, units in first.items())
    weights = dict(module.named_parameters())
    for name, kept in callback.keep.items():
        group = callback.groups.found[name]
        assert int((~group.zeros(weights)).sum()) == len(kept)


# -- with others -------------------------------------------------------------------------------------------------------


def test_averages_hold_the_zeros_too(tmp_path: Path) -> None:
    average = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))  # type: ignore[no-untyped-call]
    callback = PAGCPPruning(budgets=LOSSES, start=8)
    module = fit(tmp_path, average, callback, max_epochs=2)  # the averages are in the module at the end
    weights = dict(module.named_parameters())
    assert callback.keep
    assert all(len(k) == int((~callback.groups.found[n].zeros(weights)).sum()) for n, k in callback.keep.items())


def test_with_sigma_reparam(tmp_path: Path) -> None:
    callback = PAGCPPruning(budgets=LOSSES, start=8)
    module = fit(tmp_path, SigmaReparam(), callback, max_epochs=2)
    weights = dict(module.named_parameters())
    assert callback.keep
    assert all(len(k) == int((~callback.groups.found[n].zeros(weights)).sum()) for n, k in callback.keep.items())
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_yaml() -> None:
    callback = build_callback(
        "pagcp_pruning", {"budgets": {"val_acc": 0.02}, "modes": {"val_acc": "max"}, "batches": 4}
    )
    assert isinstance(callback, PAGCPPruning)
    assert callback.config()["budgets"] == {"val_acc": 0.02}
    assert callback.config()["modes"] == {"val_acc": "max"}
    assert build_callback("pagcp_pruning", True).config()["budgets"] == {"val_loss": 0.05}


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": {"val_loss": 0}}, "`budgets.'val_loss'.` is a share"),
        ({"budgets": {}}, "such as"),
        ({"most": 1.0}, "All of them would leave"),
        ({"rounds": 0}, "`rounds` must be a whole number from 1; got 0"),
        ({"batches": 0}, "`batches` must be a whole number from 1; got 0"),
        ({"batches": 2.5}, "`batches`"),
        ({"modes": {"val_acc": "max"}}, r"names \['val_acc'\], for which there is no budget"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PAGCPPruning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"names 'val_loss', which the validation of TwoTasks does not log; it logs \['val_accuracy', 'val_digit'"),
        ({"budgets": {"val_digits": 0.1}}, r"'val_digits' \(did you mean 'val_digit'"),
        ({"budgets": LOSSES, "start": 40}, "is at step 40, but the run has 32"),
        ({"budgets": LOSSES, "start": 0.9, "rounds": 3}, "`rounds`=3 make the last one begin at the end of the run"),
        ({"budgets": LOSSES, "start": 1.5}, "`start` as a fraction of the run"),
        ({"budgets": LOSSES, "every": -1, "rounds": 2}, "`every` must not be negative"),
        ({"budgets": LOSSES, "include": ["net.digit"]}, "nothing|match"),
        ({"budgets": LOSSES, "include": ["net.conv9"]}, "conv"),
    ],
)
def test_runs_that_cannot_work(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    module = TwoTasks()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, PAGCPPruning(**arguments), module=module)
    assert differing(before, dict(module.state_dict())) == []
    assert module.net.training


def test_no_validation_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checked on validation data, and there is none"):
        trainer(tmp_path, PAGCPPruning(budgets=LOSSES)).fit(TwoTasks(), train_loader())


def test_nothing_that_could_go(tmp_path: Path) -> None:
    """One unit in every layer: it has to stay."""

    class Narrow(TwoTasks):
        def __init__(self) -> None:
            super().__init__()
            net = self.net
            net.conv1, net.bn1 = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)
            net.conv2, net.bn2 = nn.Conv2d(1, 1, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(1)
            net.hidden, net.digit, net.parity = nn.Linear(16, 1), nn.Linear(1, 10), nn.Linear(1, 2)

    with pytest.raises(ValueError, match="can be cut"):
        fit(tmp_path, PAGCPPruning(budgets=LOSSES), module=Narrow(), max_epochs=1)


@pytest.mark.filterwarnings("default:PAGCPPruning pruned nothing")
def test_a_round_that_prunes_nothing_says_so(tmp_path: Path) -> None:
    callback = PAGCPPruning(budgets={"val_digit": 1e-9}, start=4, step=0.9)
    with pytest.warns(UserWarning, match="PAGCPPruning pruned nothing before step 4: no share of any layer's units"):
        fit(tmp_path, callback, max_epochs=1)
    assert callback.keep == {}
    assert callback.history[0]["kept"]


def test_a_run_that_ends_before_its_rounds(tmp_path: Path) -> None:
    stop = Do(on_train_batch_end=lambda t, m: setattr(t, "should_stop", t.global_step == 3))
    with pytest.warns(UserWarning, match="schedule ends at step 17: 1 of 1 rounds have not come"):
        fit(tmp_path, PAGCPPruning(budgets=LOSSES), stop)


def test_a_diverged_run(tmp_path: Path) -> None:
    def spoil(t: Trainer, m: LightningModule) -> None:
        if t.global_step == 3:
            m.net.digit.bias.data.fill_(torch.nan)  # type: ignore[union-attr]

    with pytest.raises(ValueError, match=r"'val_digit': nan.*has training diverged"):
        fit(tmp_path, Do(on_train_batch_start=spoil), PAGCPPruning(budgets=LOSSES, start=3))
