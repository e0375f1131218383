"""CollapseGuard: when it checks, what it scores, what it does, and that a run in which it never trips is untouched."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forking import forked
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from sigma_runs import Do, differing, trainer, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity
from zoo import Classifier, Manual, loader

import lightning_efficient as le
import lightning_efficient.functional as LF
from lightning_efficient import CollapseGuard, MagnitudePruning, PRepBN, RecipeError
from lightning_efficient.lifecycle.methods import build_callback
from lightning_efficient.lifecycle.rollback import TrainingState, take_state
from lightning_efficient.testing.case import Case, ResumableLoader
from lightning_efficient.testing.checks import assert_resume_exact, flat

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


class Noisy(LightningModule):
    """Dropout, batch norm, a metric, a generator, outputs in a list, augmented batches. Faults: step → what happens."""

    def __init__(self, faults: dict[int, str] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)
            )
        self.accuracy, self.outputs, self.faults = MulticlassAccuracy(4), [], dict(faults or {})
        self.generator = torch.Generator().manual_seed(0)
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x + 0.1 * torch.randn(x.shape, generator=self.generator) + 0.1 * torch.randn_like(x)
        loss = F.cross_entropy(self.net(x), y)
        self.seen.append(float(loss.detach()))
        fault = self.faults.pop(self.global_step, None)
        return loss * math.nan if fault == "nan" else 1e6 * loss if fault == "scale" else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        self.outputs.append(logits)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log("val_kept", float(len(self.outputs)))
        self.outputs.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"}]


def fit(root: Path, guard: Any, module: Any = None, steps: int = 8, **kwargs: Any) -> tuple[Any, Trainer]:
    module = Noisy() if module is None else module
    listed = guard if isinstance(guard, tuple) else (guard,)
    t = trainer(root, *(cb for cb in listed if cb is not None), max_steps=steps, **kwargs)
    torch.manual_seed(0)
    t.fit(module, loader(64), loader(2, seed=3))
    return module, t


# -- never triggered -------------------------------------------------------------------------------------------------


SCORES = ("perplexity", "sequence_perplexity", "loss", "accuracy", "entropy", "rank", "val_acc", "val_loss")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_in_which_it_never_trips_is_untouched(score: str, accumulate: int, tmp_path: Path) -> None:
    found = []
    for every in (0, 2):
        mode = "max" if score == "val_acc" else "min"
        guard = CollapseGuard(every_n_steps=every, max_ratio=1e6, score=score, mode=mode) if every else None  # type: ignore[arg-type]
        module, t = fit(tmp_path, guard, accumulate_grad_batches=accumulate, val_check_interval=4, steps=6)
        logged = {k: v for k, v in t.callback_metrics.items() if "collapse_guard" not in k}
        drawn = {"torch": torch.get_rng_state(), "own": module.generator.get_state()}
        losses = {"seen": torch.tensor(module.seen)}
        found.append(weights(module) | {k: torch.as_tensor(v) for k, v in logged.items()} | drawn | losses)
        if guard is not None:
            assert (guard.trips, guard.history) == (0, [])
    assert differing(*found) == []


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_flags_and_frozen_parts_are_as_found(tmp_path: Path) -> None:
    module = Noisy()
    module.net[2].eval()
    module.net[1].weight.requires_grad_(False)

    def look(t: Trainer, m: Any) -> None:
        assert [p.training for p in m.net] == [True, True, False, True, True, True]
        assert not m.net[1].weight.requires_grad

    fit(tmp_path, (CollapseGuard(every_n_steps=1), Do(on_train_batch_end=look)), module)


# -- scores ----------------------------------------------------------------------------------------------------------


def test_perplexities_against_torchmetrics_and_by_hand() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 7, 11, dtype=torch.float64) * 3, torch.randint(0, 11, (3, 7))
    targets[0, 2:], targets[1, 5:] = -100, -100
    reference = Perplexity(ignore_index=-100)
    reference.update(logits.float(), targets)
    assert float(LF.perplexity(logits, targets)) == pytest.approx(float(reference.compute()), rel=1e-5)
    nll = [[-float(logits[b, t].log_softmax(0)[targets[b, t]]) for t in range(n)] for b, n in enumerate((2, 5, 7))]
    by_hand = sum(math.exp(sum(row) / len(row)) for row in nll) / 3
    assert float(LF.sequence_perplexity(logits, targets)) == pytest.approx(by_hand, rel=1e-12)
    uniform = torch.zeros(2, 5, 9)
    for f in (LF.perplexity, LF.sequence_perplexity):
        assert float(f(uniform, torch.randint(0, 9, (2, 5)))) == pytest.approx(9, rel=1e-6)
        with pytest.raises(ValueError, match=r"logits of shape \(2, 9, 5\) and targets"):
            f(uniform.mT, torch.zeros(2, 5, dtype=torch.long))


class Language(LightningModule):
    """A Hugging Face model that computes its own loss: shifted, padding marked by -100."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        self.lm = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2)).train()

    def training_step(self, batch: Any) -> Tensor:
        return self.lm(**batch).loss

    def validation_step(self, batch: Any) -> Tensor:
        return self.lm(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(0, 13, (4, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(8) < torch.tensor([8, 5, 3, 8])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


@pytest.mark.parametrize("score", ["perplexity", "sequence_perplexity", "loss", "accuracy", "entropy"])
def test_a_language_model_with_padding(score: str, tmp_path: Path) -> None:
    batch, model = tokens(), Language()
    with torch.no_grad():
        out = model.lm.eval()(**batch)
    model.train()
    logits, targets = out.logits[:, :-1], batch["labels"][:, 1:]
    kept = targets != -100
    mean = logits[kept].softmax(-1).mean(0)
    expected = {
        "perplexity": LF.perplexity(logits, targets), "sequence_perplexity": LF.sequence_perplexity(logits, targets),
        "loss": out.loss, "accuracy": (logits.argmax(-1) == targets)[kept].float().mean(),
        "entropy": -(mean * mean.log()).sum(),
    }[score]  # fmt: skip
    guard = CollapseGuard(canary=batch, score=score, every_n_steps=1, max_ratio=1e3)
    values: list[Any] = []
    look = Do(on_train_batch_start=lambda t, m: values.append(guard._best))
    trainer(tmp_path, guard, look, max_steps=1).fit(model, DataLoader([batch], None), DataLoader([batch], None))  # type: ignore[arg-type]
    assert values[0] == pytest.approx(float(expected), rel=1e-5)


def test_images_of_classes_on_the_second_axis_and_soft_targets(tmp_path: Path) -> None:
    class Segments(Noisy):
        def __init__(self, soft: bool) -> None:
            super().__init__()
            self.net, self.soft = nn.Conv2d(1, 3, 1), soft

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y = (batch[0][:, 0] > 0).long()
            target = F.one_hot(y, 3).movedim(-1, 1).float() if self.soft else y
            return F.cross_entropy(self.net(batch[0]), target)

        validation_step = training_step

    values = []
    for soft in (False, True):
        guard = CollapseGuard(every_n_steps=1, score="sequence_perplexity", max_ratio=1e6)
        torch.manual_seed(0)
        fit(tmp_path, guard, Segments(soft), steps=2)
        values.append(guard._best)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "step", "error"),
    [
        ({}, lambda m, b: F.mse_loss(m.net(b[0]), torch.ones(4, 4)), "score='perplexity' reads .* Use score='loss'"),
        ({"score": "los"}, lambda m, b: None, r"`score` is 'los'; expected one of .* it logs nothing"),
        ({"score": "loss"}, lambda m, b: None, "returns no loss and logs nothing"),
        ({"score": "val_los"}, lambda m, b: m.log("val_loss", 1.0), r"did you mean 'val_loss'\?"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_first_step(
    arguments: Any, step: Any, error: str, tmp_path: Path
) -> None:
    class Own(Noisy):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return step(self, batch)

        def on_validation_epoch_end(self) -> None: ...

    module = Own()
    before = weights(module)
    with pytest.raises(ValueError, match=error):
        fit(tmp_path, CollapseGuard(**arguments), module)
    assert differing(before, weights(module)) == []


def test_no_validation_and_no_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no validation data for a canary"):
        fit(tmp_path, CollapseGuard(), limit_val_batches=0)

    class Blind(LightningModule):
        training_step, configure_optimizers = Noisy.training_step, Noisy.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

    with pytest.raises(ValueError, match="which Blind does not have"):
        trainer(tmp_path, CollapseGuard()).fit(Blind(), loader(2))


# -- what it does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["nan", "scale"])
def test_one_trip_and_the_state_is_that_of_the_last_healthy_check(fault: str, tmp_path: Path) -> None:
    guard = CollapseGuard(every_n_steps=2, score="loss", max_ratio=3.0)
    states: dict[int, TrainingState] = {}

    def look(t: Trainer, m: Any) -> None:
        states[t.global_step] = take_state(t, m)

    with pytest.warns(UserWarning, match=r"after step 6; the limit is .* The training state of step 4 is back\."):
        module, t = fit(tmp_path, (guard, Do(on_train_batch_end=look)), Noisy({4: fault}))
    assert [(row["step"], row["back_to"]) for row in guard.history] == [(6, 4)]
    assert (guard.trips, guard.rollbacks, t.global_step) == (1, 1, 8)
    a, b = (flat(states[step].as_plain()) for step in (4, 6))
    assert differing(a, b) == []
    assert a["/snapshot/schedulers/0/last_epoch"] == b["/snapshot/schedulers/0/last_epoch"] == 4
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_checks_at_the_ends_of_steps_only(tmp_path: Path) -> None:
    guard, at = (
        CollapseGuard(canary=lambda m: at.append(m.trainer.fit_loop.total_batch_idx) or 1.0, every_n_steps=2),
        [],
    )  # type: ignore[func-returns-value,var-annotated]
    fit(tmp_path, guard, accumulate_grad_batches=3, steps=5)
    assert at == [-1, 5, 11, 14]  # before the first step, after steps 2 and 4, and after the last


def test_gradients_of_an_accumulation_are_not_of_the_state_that_is_left(tmp_path: Path) -> None:
    """The fault is in the middle of an accumulation; the next step is that of an undisturbed run on its batches."""
    guard = CollapseGuard(every_n_steps=1, score="loss", max_ratio=3.0)
    good, bad = list(loader(8)), [(math.nan * x, y) for x, y in loader(1, seed=9)]
    found = []
    for data, listed in ((good, ()), (good[:4] + bad + good[:1] + good[4:], (guard,))):
        module = Classifier("cnn")
        t = trainer(tmp_path, *listed, accumulate_grad_batches=2, max_steps=len(data) // 2)
        if listed:
            with pytest.warns(UserWarning, match="training state of step 2 is back"):
                t.fit(module, DataLoader(data, None), loader(1))  # type: ignore[arg-type]
        else:
            t.fit(module, DataLoader(data, None), loader(1))  # type: ignore[arg-type]
        found.append(weights(module))
    assert differing(*found) == []


def test_stop_and_warn(tmp_path: Path) -> None:
    guard = CollapseGuard(every_n_steps=2, action="stop")
    with pytest.warns(UserWarning, match=r"The run stops \(action='stop'\)"):
        _, t = fit(tmp_path, guard, Noisy({2: "nan"}))
    assert (t.global_step, guard.trips, guard.rollbacks) == (4, 1, 0)
    guard = CollapseGuard(every_n_steps=2, action="warn")
    with pytest.warns(UserWarning, match="CollapseGuard") as said:
        _, t = fit(tmp_path, guard, Noisy({2: "nan"}), steps=7)
    assert "is inf after step 4" in next(str(w.message) for w in said if "CollapseGuard" in str(w.message))
    assert (t.global_step, [row["step"] for row in guard.history]) == (7, [4, 6, 7])  # the last: after the last step
    assert guard._kept is None


def test_patience(tmp_path: Path) -> None:
    values = iter([1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 1.0, 1.0])
    guard = CollapseGuard(canary=lambda m: next(values), every_n_steps=1, patience=2)
    with pytest.warns(UserWarning, match="training state of step 3 is back"):
        fit(tmp_path, guard)
    assert [row["step"] for row in guard.history] == [5]


def test_after_the_last_rollback_it_stops_in_the_healthy_state(tmp_path: Path) -> None:
    guard = CollapseGuard(every_n_steps=1, max_rollbacks=2)
    with pytest.warns(UserWarning, match="CollapseGuard") as said:
        module, t = fit(tmp_path, guard, Noisy(dict.fromkeys(range(2, 60), "nan")), steps=20)
    assert "stops after 2 rollbacks (`max_rollbacks`). A lower learning rate" in str(said[-1].message)
    assert (guard.rollbacks, guard.trips, t.global_step) == (2, 3, 5)
    assert guard.history[-1]["stopped"]
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def sequential(optimizer: Any) -> Any:
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    return torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warm, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)], [5]
    )


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.9**s),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 40),
        sequential,
    ],
    ids=["lambda", "cosine", "one_cycle", "sequential"],
)  # fmt: skip
def test_rates_after_rollbacks(schedule: Any, tmp_path: Path) -> None:
    """Two rollbacks to one state, then the schedule goes on at a quarter of its rates."""

    class Scheduled(Noisy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]

    rates: list[list[float]] = []
    for faults, factor in ({}, 1.0), ({3: "nan", 4: "nan"}, 0.5):
        guard, seen = CollapseGuard(every_n_steps=1, lr_factor=factor, max_ratio=1e6), []  # type: ignore[var-annotated]
        look = Do(on_train_batch_start=lambda t, m, seen=seen: seen.append(t.optimizers[0].param_groups[0]["lr"]))
        if faults:
            with pytest.warns(UserWarning, match="training state of step 3 is back"):
                fit(tmp_path, (guard, look), Scheduled(faults), steps=14)
        else:
            fit(tmp_path, (guard, look), Scheduled(faults), steps=12)
        rates.append(seen)
    expected = rates[0][:4] + [0.5 * rates[0][3]] + [0.25 * rate for rate in rates[0][3:]]
    assert rates[1] == pytest.approx(expected[: len(rates[1])], rel=1e-9)


def test_skipped_batches_leave_no_trace(tmp_path: Path) -> None:
    guard = CollapseGuard(every_n_steps=1, score="loss", max_ratio=3.0, skip_batches=2)
    good, bad = list(loader(6)), [(f * x, y) for f, (x, y) in zip((math.nan, 1e5, 1e5), loader(3, seed=9), strict=True)]
    found = []
    for data, listed in ((good, ()), (good[:3] + bad + good[3:], (guard,))):
        module = Classifier("cnn")
        t = trainer(tmp_path, *listed, max_steps=len(data))
        if listed:
            with pytest.warns(UserWarning, match="training state of step 3 is back"):
                t.fit(module, DataLoader(data, None), loader(1))  # type: ignore[arg-type]
        else:
            t.fit(module, DataLoader(data, None), loader(1))  # type: ignore[arg-type]
        found.append(weights(module))
    assert differing(*found) == []
    assert guard.trips == 1


def test_manual_optimization(tmp_path: Path) -> None:
    def poison(t: Trainer, m: Any) -> None:
        if t.global_step == 8 and not guard.trips:
            m.net.head.weight.data.fill_(math.nan)

    guard = CollapseGuard(every_n_steps=4)
    with pytest.warns(UserWarning, match="training state of step 8 is back"):
        module, _ = fit(tmp_path, (guard, Do(on_train_batch_start=poison)), Manual("cnn"), steps=16)
    assert [(row["step"], row["back_to"]) for row in guard.history] == [(12, 8)]
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_collapsed_from_the_start(tmp_path: Path) -> None:
    module = Noisy()
    module.net[1].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="is inf before the first step of this run: the network has collapsed already"):
        fit(tmp_path, CollapseGuard(), module)


# -- with other methods ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*stalled")
@pytest.mark.parametrize(
    "make",
    [
        partial(le.SAPPruning, p=1.0, q=2.0, iterations=2),
        partial(MagnitudePruning, schedule="iterative", rounds=2, amount=0.3),
    ],
)
def test_weights_that_go_back_to_their_beginning_on_purpose_are_no_collapse(make: Any, tmp_path: Path) -> None:
    values: list[float] = []

    def canary(module: Any) -> float:  # falls as the weights leave their start
        values.append(1 / (1e-3 + float((module.net.bn.weight - 1).abs().sum())))
        return values[-1]

    guard = CollapseGuard(canary=canary, every_n_steps=1, max_ratio=1.5)
    fit(tmp_path, (guard, make()), Classifier("cnn"), steps=12)
    assert guard.trips == 0
    assert any(after > 1.5 * before for before, after in pairwise(values))


@pytest.mark.filterwarnings("ignore:MagnitudePruning. training ended at step 4")
def test_a_pruning_that_goes_too_far_is_undone_and_then_stops_the_run(tmp_path: Path) -> None:
    pruning = MagnitudePruning(amount=0.999, schedule="one_shot", start=5, scope="global")
    guard = CollapseGuard(every_n_steps=2, score="rank", max_ratio=1.5, max_rollbacks=2)
    with pytest.warns(UserWarning, match="CollapseGuard") as said:
        module, t = fit(tmp_path, (pruning, guard), Classifier("encoder"), steps=40)
    last = [str(w.message) for w in said if "max_rollbacks" in str(w.message)]
    assert "hardly a single batch" in last[0]
    assert "MagnitudePruning" in last[0]
    assert guard.rollbacks == 2
    assert [row["back_to"] for row in guard.history] == [4, 4, 4]
    assert not any(bool((mask == 0).any()) for mask in pruning.masks.values())
    assert t.global_step == 4 + 3 * 2
    assert float((module.net.head.weight == 0).float().mean()) == 0


def test_a_norm_transition_that_jumps_goes_back_into_the_transition(tmp_path: Path) -> None:
    """Statistics that a bad batch has ruined are the old ones again, and the blend as well."""
    swap = PRepBN(transition=6, hold=2, recalibrate=0, guard="off")
    guard = CollapseGuard(every_n_steps=1, score="loss", max_ratio=3.0)

    def ruin(t: Trainer, m: Any) -> None:
        if t.global_step == 5 and not guard.trips:
            for part in m.modules():
                if isinstance(getattr(part, "running_mean", None), Tensor):
                    part.running_mean.fill_(1e4)

    lam: list[float] = []
    look = Do(
        on_train_batch_start=lambda t, m: lam.append(float(next(p.lam for p in m.modules() if hasattr(p, "lam"))))
    )
    with pytest.warns(UserWarning, match="training state of step 5 is back"):
        module, _ = fit(tmp_path, (swap, look, guard, Do(on_train_batch_start=ruin)), Classifier("timm_vit"), steps=12)
    assert lam[:8] == pytest.approx([1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 3 / 6, 2 / 6], abs=1e-6)
    assert lam[-1] == 0
    means = [part.running_mean for part in module.modules() if isinstance(getattr(part, "running_mean", None), Tensor)]
    assert means
    assert max(float(mean.abs().max()) for mean in means) < 100


def test_what_was_cut_out_is_not_put_back(tmp_path: Path) -> None:
    def cut(t: Trainer, m: Any) -> None:
        if t.global_step == 3:
            groups = LF.find_groups(m, torch.zeros(2, 1, 8, 8))
            name = next(iter(groups.found))
            le.cut(m, {name: list(range(groups.found[name].units - 2))}, groups, t)
            m.net[-1].bias.data.fill_(math.nan)

    class Thin(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with pytest.raises(
        ValueError, match=r"CollapseGuard cannot go back to step 2 .*units were cut out of Thin .*action='stop'"
    ):
        fit(tmp_path, (CollapseGuard(every_n_steps=2), Do(on_train_batch_start=cut)), Thin())


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:MagnitudePruning. training ended at step 2")
@pytest.mark.parametrize(
    ("every", "method"),
    [(4, None), (2, None), (2, partial(MagnitudePruning, amount=0.5, start=1, length=2, every=1))],
)
def test_a_resumed_run_goes_back_to_where_the_other_one_would_have(every: int, method: Any, tmp_path: Path) -> None:
    """The fault is before the file is written (every 4), or after it (every 2)."""

    def ours() -> tuple[Any, ...]:
        fault = 2 if every == 4 else 4
        ruin = Do(on_train_batch_start=lambda t, m: t.global_step == fault and m.net.head.weight.data.fill_(math.nan))
        guard = CollapseGuard(every_n_steps=every, max_ratio=1e3)
        return tuple(cb for cb in (method and method(), guard, ruin) if cb is not None)

    case = Case(lambda: (), {"plain": partial(Classifier, "cnn")}, loader_like, tmp_path)
    with pytest.warns(UserWarning, match=f"training state of step {0 if every == 4 else 4} is back"):
        assert_resume_exact(case, callbacks=ours)


def loader_like(batches: int, size: int, dtype: torch.dtype) -> Any:
    return loader(batches, size, dtype=dtype)


def halfway(root: Path, **arguments: Any) -> Path:
    save = Do(on_train_batch_end=lambda t, m: t.global_step == 3 and t.save_checkpoint(root / "half.ckpt"))
    module = Classifier("cnn")
    guard = CollapseGuard(every_n_steps=2, max_ratio=1e3, **arguments)
    trainer(root, guard, save, max_steps=3).fit(module, ResumableLoader(loader(6)), loader(1))
    return root / "half.ckpt"


def test_without_the_copy_files_are_small_and_a_resumed_run_keeps_one_at_once(tmp_path: Path) -> None:
    path = halfway(tmp_path, save_snapshot=False)
    large = halfway(tmp_path / "large").stat().st_size
    assert large > 1.5 * path.stat().st_size
    guard = CollapseGuard(every_n_steps=2, max_ratio=1e3, save_snapshot=False)
    kept: list[Any] = []
    look = Do(on_train_batch_start=lambda t, m: kept.append(guard._kept and guard._kept.step))
    trainer(tmp_path, guard, look, max_steps=5).fit(
        Classifier("cnn"), ResumableLoader(loader(6)), loader(1), ckpt_path=path, weights_only=True
    )
    assert kept == [3, 4]


@pytest.mark.parametrize(
    ("then", "now", "kept"),
    [
        ({}, {"action": "warn", "patience": 2}, False),
        ({}, {"save_snapshot": False, "max_ratio": 5e2}, True),
        ({"action": "stop", "patience": 3}, {"patience": 1}, True),
    ],
    ids=str,
)
def test_a_resumed_run_may_act_otherwise(then: dict[str, Any], now: dict[str, Any], kept: bool, tmp_path: Path) -> None:
    path, guard = halfway(tmp_path, **then), CollapseGuard(**{"every_n_steps": 2, "max_ratio": 1e3, **now})
    seen: list[bool] = []
    look = Do(on_train_batch_start=lambda t, m: seen.append(guard._kept is not None))
    trainer(tmp_path, guard, look, max_steps=5).fit(
        Classifier("cnn"), ResumableLoader(loader(6)), loader(1), ckpt_path=path, weights_only=True
    )
    assert seen == [kept, kept]


def test_a_best_score_is_not_compared_with_scores_of_another_kind(tmp_path: Path) -> None:
    path = halfway(tmp_path)
    with pytest.raises(RecipeError, match=r"CollapseGuard.*`score`: 'perplexity' then, 'loss' now.*saved values"):
        trainer(tmp_path, CollapseGuard(score="loss"), max_steps=5).fit(
            Classifier("cnn"), ResumableLoader(loader(6)), loader(1), ckpt_path=path, weights_only=True
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("best",), math.nan), (("failed",), -1), (("history",), [{"step": 1}]), (("kept", "step"), 77),
        (("kept", "methods"), {"Gone": {}}), (("kept", "snapshot", "model", "net.head.weight"), torch.zeros(2)),
        (("kept", "snapshot", "optimizers"), []),
    ],
)  # fmt: skip
def test_spoilt_states_are_refused(field: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    path = halfway(tmp_path)
    content = torch.load(path, weights_only=True)
    part = content["callbacks"][CollapseGuard().state_key]
    for name in field[:-1]:
        part = part[name]
    part[field[-1]] = value
    torch.save(content, path)
    with pytest.raises(RecipeError, match=field[0]):
        trainer(tmp_path, CollapseGuard(every_n_steps=2), max_steps=5).fit(
            Classifier("cnn"), ResumableLoader(loader(6)), loader(1), ckpt_path=path, weights_only=True
        )


# -- arguments, logs, processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number from 1; got 0"),
        ({"max_ratio": 1.0}, "`max_ratio` must be a finite number"),
        ({"max_ratio": math.nan}, "`max_ratio` must be a finite number"),
        ({"action": "undo"}, "`action` must be one of"),
        ({"lr_factor": 0.0}, "`lr_factor` must be above 0 and at most 1"),
        ({"patience": True}, "`patience` must be a whole number.*got True"),
        ({"snapshot_device": "gpu"}, "gpu"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=error):
        CollapseGuard(**arguments)


def test_yaml() -> None:
    guard = build_callback("collapse_guard", {"score": "accuracy", "every_n_steps": 7, "snapshot_device": None})
    assert isinstance(guard, CollapseGuard)
    assert (guard.score, guard.every_n_steps, guard.snapshot_device) == ("accuracy", 7, None)
    with pytest.raises(ValueError, match="action"):
        build_callback("collapse_guard", {"action": "undo"})


def test_logs_every_check_and_can_be_monitored(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    stop = EarlyStopping(
        "efficient/collapse_guard/trips", stopping_threshold=-1, patience=99, check_on_train_epoch_end=True
    )
    with pytest.warns(UserWarning, match="is back"):
        _, t = fit(
            tmp_path, (CollapseGuard(every_n_steps=2), stop), Noisy({2: "nan"}), logger=logger, log_every_n_steps=3
        )
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("efficient/collapse_guard/canary")
    assert [math.isfinite(float(row.split(",")[column])) for row in rows[1:] if row.split(",")[column]] == [
        True, False, True, True,
    ]  # fmt: skip
    assert float(t.callback_metrics["efficient/collapse_guard/rollbacks"]) == 1


@pytest.mark.forks
def test_one_process_of_two_hears_it_and_both_go_back(tmp_path: Path) -> None:
    ended = forked(Path(__file__).parent / "scripts" / "guard_ddp.py", tmp_path, processes=2)
    assert ended.code == 0, ended.output
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert [(row["step"], row["back_to"]) for row in one["history"]] == [(4, 2)]
