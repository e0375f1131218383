"""PRepBN in a Trainer: recalibration, the finished form's metrics, the guard; nothing of the user's is disturbed."""

from __future__ import annotations

import csv
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from zoo import Classifier, Manual, loader

from lightning_efficient import export, load_from_checkpoint
from lightning_efficient.callbacks.prepbn import PRepBN
from lightning_efficient.deploy.export import ExportError
from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.testing.case import ResumableLoader

pytestmark = [
    # said of ModelCheckpoint, and of our hooks on the instance
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides the configure_model"),
]


def trainer(tmp_path: Any, *callbacks: Callback, **kwargs: Any) -> Trainer:
    options = {"max_steps": 8, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return Trainer(callbacks=list(callbacks), **{**options, "num_sanity_val_steps": 0, **quiet, **kwargs})


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in module.named_buffers() if n.endswith(("running_mean", "running_var"))}


def averaged(module: nn.Module, batches: Any) -> dict[str, Tensor]:
    """Reference: mean and unbiased variance of each batch at each BatchNorm, in evaluation otherwise, averaged."""
    copy, seen = deepcopy(module).eval(), {}

    def look(name: str) -> Any:
        def hook(norm: nn.Module, args: Any) -> None:
            norm.train()
            seen.setdefault(name, []).append((args[0].mean(0), args[0].var(0)))

        return hook

    for name, part in copy.named_modules():
        if isinstance(part, nn.BatchNorm1d):
            part.register_forward_pre_hook(look(name))
            part.train()
    with torch.no_grad():
        for x, _ in batches:
            copy(x)
    out = {}
    for name, values in seen.items():
        out[f"{name}.running_mean"] = torch.stack([m for m, _ in values]).mean(0)
        out[f"{name}.running_var"] = torch.stack([v for _, v in values]).mean(0)
    return out


class Counting(Classifier):
    """Metrics as attributes and outputs in lists, as users have them; logs in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.ModuleDict({"fit": MeanMetric(), "val": MeanMetric()})
        self.outputs: list[list[Tensor]] = [[]]
        self.train_calls = self.val_calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen["fit"].update(loss.detach())
        self.train_calls += 1
        self.log("train_metric", self.seen["fit"], on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self._loss(batch)
        self.seen["val"].update(loss)
        self.outputs[0].append(loss)
        self.val_calls += 1
        self.log_dict({"val_loss": loss}, prog_bar=False)
        self.log("val_metric", self.seen["val"])

    def on_validation_epoch_end(self) -> None:
        self.log("val_own", torch.stack(self.outputs[0]).mean())
        self.log("val_count", float(len(self.outputs[0])))
        self.outputs[0].clear()


@pytest.mark.parametrize("validated", [True, False])
def test_statistics_are_averaged_at_the_end(tmp_path: Any, validated: bool) -> None:
    module = Classifier()
    data = loader(batches=8)
    checked = {"limit_val_batches": int(validated)}
    trainer(tmp_path, PRepBN(transition=3, hold=1), **checked).fit(module, data, loader(1))
    expected = averaged(module, data)
    found = statistics(module)
    assert found.keys() == expected.keys()
    assert len(found) == 10
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    moving = Classifier()
    trainer(tmp_path, PRepBN(transition=3, hold=1, recalibrate=0), **checked).fit(moving, data, loader(1))
    assert all(torch.equal(a, b) for a, b in zip(moving.parameters(), module.parameters(), strict=True))
    assert not torch.allclose(next(iter(statistics(moving).values())), next(iter(found.values())), rtol=1e-3)


def test_only_as_many_batches_as_asked_for(tmp_path: Any) -> None:
    module, data = Classifier(), loader(batches=8)
    trainer(tmp_path, PRepBN(transition=3, hold=1, recalibrate=2)).fit(module, data, loader(1))
    for name, value in averaged(module, list(data)[:2]).items():
        torch.testing.assert_close(statistics(module)[name], value, rtol=1e-5, atol=1e-6)


def test_the_last_file_and_the_last_validation_have_them(tmp_path: Any) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", filename="best")
    module = Classifier()
    t = trainer(tmp_path, PRepBN(transition=3, hold=1), saver, enable_checkpointing=True)
    t.fit(module, loader(batches=8), loader(1))
    logged = float(t.callback_metrics["val_loss"])
    (saved,) = trainer(tmp_path, PRepBN()).validate(Classifier(), loader(1), ckpt_path=saver.best_model_path)
    assert saved["val_loss"] == pytest.approx(logged, rel=1e-6)
    loaded = load_from_checkpoint(Classifier, saver.best_model_path)
    assert all(torch.equal(a, b) for a, b in zip(statistics(loaded).values(), statistics(module).values(), strict=True))


def test_without_validation_the_file_of_the_last_epoch_has_them(tmp_path: Any) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="last-epoch")
    module = Classifier()
    t = trainer(tmp_path, PRepBN(transition=3, hold=1), saver, enable_checkpointing=True, limit_val_batches=0)
    t.fit(module, loader(batches=8), loader(1))
    loaded = load_from_checkpoint(Classifier, tmp_path / "last-epoch.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(statistics(loaded).values(), statistics(module).values(), strict=True))


def test_the_averaged_model_has_its_own(tmp_path: Any) -> None:
    module, data = Classifier(), loader(batches=8)
    ema = WeightAveraging(avg_fn=get_ema_avg_fn(0.8))
    t = trainer(tmp_path, PRepBN(transition=3, hold=1), ema)
    t.fit(module, data, loader(1))
    for name, value in averaged(module, data).items():
        torch.testing.assert_close(statistics(module)[name], value, rtol=1e-5, atol=1e-6)
    (again,) = trainer(tmp_path, PRepBN()).validate(module, loader(1), verbose=False)
    assert again["val_loss"] == pytest.approx(float(t.callback_metrics["val_loss"]), rel=1e-6)


def test_nothing_of_the_users_is_disturbed(tmp_path: Any) -> None:
    """Metrics, outputs, logs, random numbers and the order of a shuffled, seeded loader are those of a run without."""
    results = []
    for extras in (False, True):
        module, generator = Counting(), torch.Generator().manual_seed(5)
        data = DataLoader(loader(batches=8).dataset, 4, shuffle=True, generator=generator)
        torch.manual_seed(1)
        options = {"recalibrate": 100 if extras else 0, "finished_metrics": extras}
        t = trainer(tmp_path, PRepBN(transition=12, hold=2, **options), max_steps=-1, max_epochs=2)
        t.fit(module, data, loader(2))
        ours = ("efficient/", "val_")  # of the last validation, which has the averages
        logged = {k: float(v) for k, v in t.callback_metrics.items() if not k.startswith(ours)}
        counts = [module.train_calls, module.val_calls, len(module.outputs[0]), torch.rand(3).tolist()]
        results.append((logged, counts, generator.get_state().tolist(), list(module.parameters())))
    (logs, counts, state, a), (logs2, counts2, state2, b) = results
    assert logs == logs2
    assert {"train_metric", "train_loss"} <= set(logs)
    assert counts == counts2
    assert counts[:3] == [16, 4, 0]
    assert state == state2
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_loader_with_a_position_keeps_it(tmp_path: Any) -> None:
    data = ResumableLoader(loader(batches=8))
    trainer(tmp_path, PRepBN(transition=2, hold=1, recalibrate=3), max_steps=5).fit(Classifier(), data, loader(1))
    assert data.position == 5


def test_manual_optimization_is_recalibrated_without_steps(tmp_path: Any) -> None:
    module, data = Manual("timm_vit"), loader(batches=8)
    t = trainer(tmp_path, PRepBN(transition=3, hold=1), max_steps=16)
    t.fit(module, data, loader(1))
    assert t.global_step == 16, "recalibration must not step"
    for name, value in averaged(module, data).items():
        torch.testing.assert_close(statistics(module)[name], value, rtol=1e-5, atol=1e-6)


def test_a_step_that_cannot_run_alone_costs_a_warning_and_no_statistics(tmp_path: Any) -> None:
    class Strict(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not self.training:
                raise RuntimeError("train mode only")
            return super().training_step(batch, batch_idx)

    module, moving = Strict(), Strict()
    with pytest.warns(UserWarning, match="not recalibrated .RuntimeError: train mode only"):
        trainer(tmp_path, PRepBN(transition=3, hold=1)).fit(module, loader(batches=8), loader(1))
    trainer(tmp_path, PRepBN(transition=3, hold=1, recalibrate=0)).fit(moving, loader(batches=8), loader(1))
    assert all(torch.equal(a, b) for a, b in zip(statistics(module).values(), statistics(moving).values(), strict=True))


@pytest.mark.parametrize("options", [{"frozen": True, "hold": 2}, {"hold": 0}])
def test_running_statistics_are_warm_before_the_first_step(tmp_path: Any, options: Any) -> None:
    class First(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.statistics = statistics(pl_module)

    data, fresh, first = loader(batches=8), Classifier(), First()
    trainer(tmp_path, PRepBN(transition=4, **options), first).fit(fresh, data, loader(1))
    untrained = Classifier()  # at lam = 1 its function is the original's, so that plain hooks see the norms' inputs
    rows: dict[str, list[Tensor]] = {}
    for name, part in untrained.named_modules():
        if isinstance(part, nn.LayerNorm):
            part.register_forward_pre_hook(lambda _, args, name=name: rows.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for x, _ in data:
            untrained(x)
    for name, values in rows.items():
        mean = torch.stack([v.reshape(-1, v.shape[-1]).mean(0) for v in values]).mean(0)
        found = first.statistics[f"{name}.target.bn.running_mean"]
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)


# -- the finished form -------------------------------------------------------------------------------------------------


def test_the_finished_forms_metrics_are_logged_beside_the_blends(tmp_path: Any) -> None:
    expected: dict[float, float] = {}

    class Twice(Callback):
        """Validates a finished copy by hand, before the batch is validated."""

        def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
            copy = deepcopy(pl_module)
            lam = float(next(iter(blend_norms(copy).values())).lam)
            for norm in blend_norms(copy).values():
                norm.finish()
            expected[lam] = float(copy._loss(batch))

    logged: dict[float, dict[str, float]] = {}

    class Read(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            lam = float(next(iter(blend_norms(pl_module).values())).lam)
            logged[lam] = {k: float(v) for k, v in trainer.callback_metrics.items() if "val" in k}

    t = trainer(tmp_path, PRepBN(transition=4, hold=2), Twice(), Read(), val_check_interval=2)
    module = Counting()
    t.fit(module, loader(batches=8), loader(1))
    assert module.val_calls == 4, "the second run is the stand-in's"
    assert set(logged) == {1.0, 0.5, 0.0}
    half = logged[0.5]
    for lam in (1.0, 0.5):
        for name in ("val_loss", "val_metric", "val_own"):
            assert logged[lam][f"efficient/norm_swap/finished/{name}"] == pytest.approx(expected[lam], rel=1e-5)
    assert half["val_loss"] != pytest.approx(expected[0.5], rel=1e-4)
    assert half["val_count"] == half["efficient/norm_swap/finished/val_count"] == 1


@pytest.mark.parametrize("loaders", [1, 2])
def test_no_value_of_the_transition_stays_behind_as_the_last_one(tmp_path: Any, loaders: int) -> None:
    class Several(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self._loss(batch) + dataloader_idx)

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    monitor = "efficient/norm_swap/finished/val_loss" + "/dataloader_idx_1" * (loaders > 1)
    best = ModelCheckpoint(tmp_path / "best", monitor=monitor)
    t = trainer(
        tmp_path, PRepBN(transition=4, hold=0), best, val_check_interval=2, logger=logger, enable_checkpointing=True
    )
    t.fit(Several(), loader(batches=8), [loader(1), loader(1)][:loaders])
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text(encoding="utf-8").splitlines()))
    names = [name for name in t.callback_metrics if name.startswith("val_loss")]
    assert len(names) == loaders
    for name in names:
        finished = f"efficient/norm_swap/finished/{name}"
        assert t.callback_metrics[finished] == t.callback_metrics[name]
        logged = {key: [float(row[key]) for row in rows if row.get(key)] for key in (name, finished)}
        assert logged[finished][-2:] == logged[name][-2:], "at the two validations after the transition"
        assert logged[finished][0] != logged[name][0], "within it"
    assert best.best_model_score == min(t.callback_metrics[monitor], best.best_model_score)


def test_who_monitors_the_finished_form_finds_it_at_every_validation(tmp_path: Path) -> None:
    """While the old norms are held, in a run that resumes after the transition, and in a second fit."""

    def run(module: Any, steps: int, **kwargs: Any) -> Trainer:
        monitor = "efficient/norm_swap/finished/val_loss"
        watching = EarlyStopping(monitor, patience=99)  # which stops the run with an error where there is no value
        t = trainer(tmp_path, PRepBN(transition=2, hold=4), watching, max_steps=steps, val_check_interval=2)
        t.fit(module, ResumableLoader(loader(batches=12)), loader(1), **kwargs)
        assert t.callback_metrics[monitor] == pytest.approx(float(t.callback_metrics["val_loss"]), rel=1e-4)
        return t

    module = Counting()
    run(module, 8).save_checkpoint(tmp_path / "over.ckpt")
    resumed = Counting()
    run(resumed, 12, ckpt_path=tmp_path / "over.ckpt")
    run(module, 8)


def test_several_validation_loaders(tmp_path: Any) -> None:
    class Several(Counting):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("loss", self._loss(batch) + dataloader_idx)

        def on_validation_epoch_end(self) -> None: ...

    t = trainer(tmp_path, PRepBN(transition=6, hold=2), max_steps=8, val_check_interval=4, limit_val_batches=1)
    t.fit(Several(), loader(batches=8), [loader(1), loader(1)])
    first, second = (f"efficient/norm_swap/finished/loss/dataloader_idx_{i}" for i in (0, 1))
    assert float(t.callback_metrics[second]) == pytest.approx(float(t.callback_metrics[first]) + 1, abs=1e-5)


def test_a_second_validation_that_fails_costs_one_warning(tmp_path: Any) -> None:
    class Once(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if "log" in self.__dict__:
                raise RuntimeError("once only")
            super().validation_step(batch, batch_idx)

    t = trainer(tmp_path, PRepBN(transition=6, hold=1), val_check_interval=2)
    with pytest.warns(UserWarning, match="no metrics of the finished form.*RuntimeError: once only") as caught:
        t.fit(Once(), loader(batches=8), loader(2))
    assert len([w for w in caught if "finished form" in str(w.message)]) == 1
    assert "val_loss" in t.callback_metrics


# -- the guard ---------------------------------------------------------------------------------------------------------


class Trouble(Classifier):
    """Multiplies the loss of some steps."""

    def __init__(self, steps: dict[int, float]) -> None:
        super().__init__()
        self.steps = steps
        self.lams: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.lams.append(float(next(iter(blend_norms(self).values())).lam))
        loss = super().training_step(batch, batch_idx) * self.steps.get(self.global_step, 1.0)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def run(tmp_path: Any, steps: dict[int, float], *more: Callback, ckpt_path: Any = None, **options: Any) -> Trouble:
    module = Trouble(steps)
    options = {"transition": 40, "hold": 0, "guard_length": 3, "recalibrate": 0, **options}
    t = trainer(tmp_path, PRepBN(**options), *more, max_steps=60, limit_val_batches=0)
    t.fit(module, ResumableLoader(loader(batches=60)), loader(1), ckpt_path=ckpt_path)
    return module


def test_without_trouble_the_guard_does_nothing(tmp_path: Any) -> None:
    module = run(tmp_path, {})
    assert module.lams == pytest.approx([max(0.0, 1 - i / 40) for i in range(60)])


def test_a_jump_pauses_the_transition(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match=r"gradient norm is .* median; loss is .* after step 31.*3 steps"):
        module = run(tmp_path, {30: 100.0})
    expected = [1 - min(i, 31) / 40 for i in range(34)] + [1 - (i - 3) / 40 for i in range(34, 43)] + [0.0] * 17
    assert module.lams == pytest.approx(expected, abs=1e-6)


def test_a_jump_rolls_the_transition_back(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match=r"stays at lam = 0.400 .it was 0.225."):
        module = run(tmp_path, {30: 100.0}, guard="rollback", guard_length=7, transition=40)
    assert module.lams[30:33] == pytest.approx([10 / 40, 16 / 40, 16 / 40])


def test_the_guard_can_be_off(tmp_path: Any) -> None:
    module = run(tmp_path, {30: 100.0}, guard="off", guard_length=0.05)
    assert module.lams == pytest.approx([max(0.0, 1 - i / 40) for i in range(60)])


def test_a_loss_that_is_not_finite_is_never_silent(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="PRepBN") as caught:
        run(tmp_path, {5: math.nan})
    messages = [str(w.message) for w in caught]
    assert any("loss is nan after step 6" in m for m in messages)
    assert any(m.startswith("PRepBN: training ended") and "The guard held it up" in m for m in messages)


def test_a_jump_that_a_checkpoint_interrupts_is_not_forgotten(tmp_path: Any) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step in (31, 33):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    with pytest.warns(UserWarning, match="after step 31"):
        whole = run(tmp_path, {30: 100.0}, Save())
    for at in (31, 33):
        resumed = run(tmp_path, {30: 100.0}, ckpt_path=tmp_path / f"{at}.ckpt")
        assert resumed.lams == whole.lams[at:]


def test_jumps_are_counted_in_the_log(tmp_path: Any) -> None:
    class Read(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.jumps = float(trainer.callback_metrics["efficient/norm_swap/jumps"])

    read = Read()
    with pytest.warns(UserWarning, match="after step 31"):
        run(tmp_path, {30: 100.0}, read)
    assert read.jumps == 2, "gradient norm and loss"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": "stop"}, "`guard` must be one of 'pause', 'rollback', 'off'; got 'stop'"),
        ({"guard_length": 0}, "`guard_length` must be steps .int from 1. or a share"),
        ({"guard_length": 1.5}, "got 1.5"),
        ({"guard_factor": 1.0}, "must be a number above 1; got 1.0"),
        ({"recalibrate": -1}, "number of batches from 0; got -1"),
        ({"recalibrate": 0.5}, "`recalibrate` must be a whole number; got 0.5"),
    ],
)
def test_bad_arguments(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRepBN(**options)


def test_a_resumed_run_of_another_length_keeps_its_transition(tmp_path: Any, caplog: Any) -> None:
    """A transition given as a share of the run would begin again when a finished run is made longer."""

    def train(epochs: int, **options: Any) -> list[float]:
        module = Trouble({})
        t = trainer(tmp_path, PRepBN(transition=0.5, hold=0.25), max_steps=-1, max_epochs=epochs, limit_val_batches=0)
        t.fit(module, ResumableLoader(loader(batches=8)), loader(1), **options)
        t.save_checkpoint(tmp_path / "end.ckpt")
        return module.lams

    assert train(1) == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    with caplog.at_level("INFO"):
        assert train(2, ckpt_path=tmp_path / "end.ckpt") == [0.0] * 8
    assert "PRepBN: its schedule ended at step 6 of the resumed run, and holds." in caplog.text


# -- what evaluation must not depend on --------------------------------------------------------------------------------


def test_evaluation_does_not_depend_on_batch_mates(tmp_path: Any) -> None:
    for target in ("repbn", "affine", "un", "dyt", "rms"):
        module = Classifier()
        way: Any = {"target": target, "transition": 3, "hold": 1} | ({"warmup": 4} if target == "un" else {})
        trainer(tmp_path, PRepBN(**way)).fit(module, loader(batches=8), loader(1))
        x = next(iter(loader(size=4)))[0]
        for model in (module.double().eval(), export(module, x.double())):
            alone = torch.cat([model(row[None].double()) for row in x])
            torch.testing.assert_close(model(x.double()), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"target": "affine"}, {"allow_causal": True}])
def test_editing_the_last_token_changes_no_earlier_output(tmp_path: Any, options: Any) -> None:
    module = Classifier("decoder")
    trainer(tmp_path, PRepBN(transition=3, hold=1, **options)).fit(module, loader(batches=8), loader(1))
    net: Any = module.net.double().eval()
    hidden: list[Tensor] = []
    net.down.register_forward_hook(lambda *args: hidden.append(args[2]))
    x = next(iter(loader(size=2)))[0].double()
    edited = x.clone()
    edited.flatten(1)[:, 9] += 1  # the decoder reads ten tokens
    net(x)
    net(edited)
    assert torch.equal(hidden[0][:, :-1], hidden[1][:, :-1])
    assert not torch.equal(hidden[0][:, -1], hidden[1][:, -1])


# -- on export ---------------------------------------------------------------------------------------------------------


def test_export_averages_statistics_over_a_loader(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    data = loader(batches=8)
    moving, whole = Classifier(), Classifier()
    trainer(tmp_path, PRepBN(transition=3, hold=1, recalibrate=0)).fit(moving, data, loader(1))
    trainer(tmp_path, PRepBN(transition=3, hold=1)).fit(whole, data, loader(1))
    x, before = next(iter(data))[0], statistics(moving)
    with caplog.at_level("INFO"):
        plain = export(moving, x, recalibrate=data)
    assert "5 norms averaged over 8 batches" in caplog.text
    torch.testing.assert_close(plain(x), export(whole, x)(x), rtol=0, atol=1e-5)
    assert not torch.allclose(plain(x), export(moving, x)(x), atol=1e-4)
    assert all(torch.equal(a, before[k]) for k, a in statistics(moving).items()), "the model itself must stay"


def test_export_says_what_is_wrong_with_the_batches(tmp_path: Any) -> None:
    module = Classifier()
    trainer(tmp_path, PRepBN(transition=3, hold=1)).fit(module, loader(batches=8), loader(1))
    x = next(iter(loader()))[0]
    with pytest.raises(ExportError, match="fails on a batch of `recalibrate`"):
        export(module, x, recalibrate=[torch.ones(2, 3)])
    with pytest.raises(ExportError, match="got no batches"):
        export(module, x, recalibrate=[])
    with pytest.warns(UserWarning, match="no norm of the model uses batch statistics"):
        export(Classifier(), x, recalibrate=loader())
