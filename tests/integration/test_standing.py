"""What a run resumes from, beyond the table of histories: refusals before anything changes, smoke runs, short runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import Classifier, loader

from lightning_efficient import (
    Distillation,
    HESSOPruning,
    MagnitudePruning,
    PAGCPPruning,
    PRepBN,
    RunCost,
    SAPPruning,
    SigmaReparam,
    TempScale,
    cut,
    load_from_checkpoint,
)
from lightning_efficient.functional import find_groups
from lightning_efficient.lifecycle.recipe import RecipeError


def trainer(folder: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    options: dict[str, Any] = {"max_steps": 6, "accelerator": "cpu", "devices": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**options, **quiet, **kwargs})


class Reader(nn.Module):
    """Two hidden widths, layer norm, no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Mlp(Classifier):
    """A Classifier whose network is a Reader."""

    def _make(self) -> nn.Module:
        torch.manual_seed(0)
        return Reader()


def zeros(module: nn.Module) -> float:
    weights = [p for n, p in module.named_parameters() if p.ndim > 1]
    return float(sum((w == 0).sum() for w in weights)) / sum(w.numel() for w in weights)


# -- refused before anything changes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PRepBN, SigmaReparam, MagnitudePruning])
def test_a_method_that_is_switched_off_to_resume_is_named_before_anything_changes(method: Any, tmp_path: Path) -> None:
    first = trainer(tmp_path, method())
    first.fit(Mlp(), loader(6), loader(1))
    first.save_checkpoint(tmp_path / "on.ckpt")
    module = Mlp()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RecipeError, match=rf"trained with {method.__name__}.*switches off \(enabled=False\)"):
        trainer(tmp_path, method(enabled=False), max_steps=12).fit(
            module, loader(6), loader(1), ckpt_path=tmp_path / "on.ckpt"
        )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    trainer(tmp_path, method(enabled=False)).fit(module, loader(6), loader(1))
    assert "on_load_checkpoint" not in vars(module)


def test_a_refused_resume_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    """The file holds a smaller model, and a callback of the run refuses it: nothing is cut by then."""
    module = Mlp()
    groups = find_groups(module, next(iter(loader()))[0])
    name = next(iter(groups.found))
    cut(module, {name: range(5)}, groups)
    t = trainer(tmp_path, HESSOPruning(target=0.3, periods=2, duration=0.5))
    t.fit(module, loader(6), loader(1))
    t.save_checkpoint(tmp_path / "small.ckpt")
    fresh = Mlp()
    before = {n: p.clone() for n, p in fresh.named_parameters()}
    other = HESSOPruning(target=0.4, periods=2, duration=0.5)
    with pytest.raises(RecipeError, match=r"`target`: 0.3 then, 0.4 now"):
        trainer(tmp_path, other).fit(fresh, loader(6), loader(1), ckpt_path=tmp_path / "small.ckpt")
    after = dict(fresh.named_parameters())
    assert {n: p.shape for n, p in before.items()} == {n: p.shape for n, p in after.items()}
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_state_from_a_spoilt_file_is_refused_before_anything_changes(tmp_path: Path) -> None:
    t, module = trainer(tmp_path, MagnitudePruning(amount=0.5)), Mlp()
    t.fit(module, loader(6), loader(1))
    t.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (key,) = content["callbacks"]
    content["callbacks"][key]["standing"]["schedule"] = [0, "four", 1, 0]
    torch.save(content, tmp_path / "spoilt.ckpt")
    fresh = Mlp()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(RecipeError, match=r"state of MagnitudePruning.*'schedule'.*whole number.*got 'four'"):
        trainer(tmp_path, MagnitudePruning(amount=0.5)).fit(
            fresh, loader(6), loader(1), ckpt_path=tmp_path / "spoilt.ckpt"
        )
    assert all(torch.equal(before[n], v) for n, v in fresh.state_dict().items())


CHANGED: list[tuple[Callable[..., Callback], dict[str, Any], dict[str, Any], str]] = [
    (PRepBN, {"transition": 0.5}, {"transition": 0.7}, "PRepBN.*`transition`: 0.5 then, 0.7 now"),
    (PRepBN, {"transition": 0.5}, {"transition": 4, "shape": "cosine"}, "`transition`: 0.5 then, 4 now; `shape`: 'lin"),
    (PRepBN, {}, {"eps": 1e-3}, "`eps`: 1e-05 then, 0.001 now"),
    (
        partial(Distillation, schedule="linear"),
        {},
        {"length": 0.5},
        "Distillation.*`length`: 1.0 then, 0.5 now",
    ),
]


@pytest.mark.parametrize(("make", "then", "now", "said"), CHANGED, ids=lambda v: str(v)[:40])
def test_other_arguments_than_those_of_the_run_are_named_before_anything_changes(
    make: Any, then: dict[str, Any], now: dict[str, Any], said: str, tmp_path: Path
) -> None:
    t = trainer(tmp_path, make(**then))
    t.fit(Mlp(), loader(6), loader(1))
    t.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Mlp()
    before = [(p, p.detach().clone()) for p in fresh.parameters()]
    with pytest.raises(RecipeError, match=said):
        trainer(tmp_path, make(**now), max_steps=9).fit(fresh, loader(6), loader(1), ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(now, then) for now, then in before)


# -- a model that was pruned elsewhere ---------------------------------------------------------------------------------


def pruned(tmp_path: Path) -> Path:
    t, module = trainer(tmp_path, MagnitudePruning(amount=0.6)), Mlp()
    t.fit(module, loader(6), loader(1))
    t.save_checkpoint(tmp_path / "pruned.ckpt")
    assert zeros(module) == pytest.approx(0.6, abs=0.01)
    return tmp_path / "pruned.ckpt"


def test_zeros_of_unknown_origin_are_named_and_can_be_kept(tmp_path: Path) -> None:
    path = pruned(tmp_path)
    stock = Mlp.load_from_checkpoint(path)  # knows nothing of masks
    with pytest.warns(UserWarning, match=r"59.9% of the weights are zero already.*keep_zeros=True"):
        trainer(tmp_path, MagnitudePruning(amount=0.2)).fit(stock, loader(6), loader(1))
    assert zeros(stock) == pytest.approx(0.2, abs=0.01)
    for make in (MagnitudePruning, partial(SAPPruning, iterations=1)):
        stock = Mlp.load_from_checkpoint(path)
        where = {n: p == 0 for n, p in stock.named_parameters() if p.ndim > 1}
        trainer(tmp_path, make(keep_zeros=True)).fit(stock, loader(6), loader(1))
        assert all(bool((dict(stock.named_parameters())[n][w] == 0).all()) for n, w in where.items())


def test_masks_pass_from_one_method_to_another_in_a_new_run(tmp_path: Path) -> None:
    module = load_from_checkpoint(Mlp, pruned(tmp_path))
    trainer(tmp_path, SAPPruning(iterations=1)).fit(module, loader(6), loader(1))
    assert zeros(module) >= 0.59


def test_training_on_without_the_callback_says_what_is_lost(tmp_path: Path) -> None:
    module = load_from_checkpoint(Mlp, pruned(tmp_path))
    t = trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"Mlp was pruned \(MagnitudePruning.*it will grow again"):
        t.fit(module, loader(6), loader(1))
    t.save_checkpoint(tmp_path / "dense.ckpt")
    again = load_from_checkpoint(Mlp, tmp_path / "dense.ckpt")
    trainer(tmp_path, MagnitudePruning(amount=0.1)).fit(again, loader(6), loader(1))  # believes no old masks
    assert zeros(again) == pytest.approx(0.1, abs=0.01)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_callback_that_only_looks_knows_what_is_in_the_weights_that_it_resumes(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Mlp was pruned \(MagnitudePruning.*it will grow again"):
        trainer(tmp_path, RunCost(), max_steps=8).fit(Mlp(), loader(6), loader(1), ckpt_path=pruned(tmp_path))
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    t = trainer(tmp_path, TempScale(tau=0.5))
    t.fit(Classifier("encoder"), loader(6), loader(1))
    t.save_checkpoint(first)
    t = trainer(tmp_path, RunCost(), max_steps=8)
    t.fit(Classifier("encoder"), loader(6), loader(1), ckpt_path=first)
    t.save_checkpoint(second)
    again = load_from_checkpoint(Classifier, second)
    with pytest.raises(ValueError, match=r"its weights hold that temperature.*`tau`: 0.5 then, 0.25 now"):
        trainer(tmp_path, TempScale(tau=0.25)).fit(again, loader(6), loader(1))


# -- an optimizer that has gained a group ------------------------------------------------------------------------------


class Tuned(LightningModule):
    """A backbone that is unfrozen after an epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("rewind", ["weights", "learning_rate"])
def test_rewinding_after_a_group_was_added(tmp_path: Path, rewind: Any) -> None:
    module = Tuned()
    callbacks = [
        MagnitudePruning(amount=0.5, schedule="iterative", rounds=3, rewind=rewind, include=["head"]),
        BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0),
    ]
    trainer(tmp_path, *callbacks, max_steps=-1, max_epochs=4).fit(module, loader(4))
    head = [p for p in module.head.parameters() if p.ndim > 1]
    assert sum(int((p == 0).sum()) for p in head) == sum(p.numel() for p in head) // 2
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


# -- short runs, smoke runs, runs that end early -----------------------------------------------------------------------

DEFAULTS: dict[str, Callable[[], Any]] = {
    "sigma_reparam": SigmaReparam,
    "norm_swap": PRepBN,
    "temp_scale": partial(TempScale, tau=0.5, transition=0.3),
    "magnitude": MagnitudePruning,
    "iterative": partial(MagnitudePruning, schedule="iterative"),
    "one_shot": partial(MagnitudePruning, schedule="one_shot", start=100),
    "sap": SAPPruning,
    "hesso": HESSOPruning,
    "pagcp": PAGCPPruning,
}


@pytest.mark.parametrize("how", [{"fast_dev_run": True}, {"fast_dev_run": 3}, {"overfit_batches": 2, "max_epochs": 1}])
@pytest.mark.parametrize("method", DEFAULTS)
def test_smoke_runs_run(tmp_path: Path, method: str, how: dict[str, Any]) -> None:
    options = {"max_steps": -1, "enable_checkpointing": False, **how}
    net = "encoder" if method != "hesso" and method != "pagcp" else "cnn"
    data = loader(8, size=8)
    trainer(tmp_path, DEFAULTS[method](), **options).fit(Classifier(net), data, data)


def test_a_smoke_run_says_that_its_schedule_is_cut_off(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, SAPPruning(iterations=5), fast_dev_run=2, max_steps=-1).fit(Mlp(), loader(6), loader(1))
    assert "a smoke run of 2 step(s) is too short for its schedule" in caplog.text
    with pytest.raises(ValueError, match="5 `iterations` need more than 5 steps"):
        trainer(tmp_path, SAPPruning(iterations=5), max_steps=2).fit(Mlp(), loader(6), loader(1))


def test_hesso_with_its_defaults_in_32_steps(tmp_path: Path) -> None:
    callback, module = HESSOPruning(), Classifier("cnn")
    trainer(tmp_path, callback, max_steps=32).fit(module, loader(32), loader(1))
    assert callback.standing.schedule == (3, 7, 7)
    assert sum(len(stay) for stay in callback.keep.values()) > 0


@pytest.mark.parametrize("method", ["temp_scale", "magnitude", "iterative", "hesso", "pagcp", "norm_swap"])
def test_an_unfinished_schedule_is_reported(tmp_path: Path, method: str) -> None:
    stop = type("Stop", (Callback,), {"on_train_batch_end": lambda s, t, *_: setattr(t, "should_stop", True)})()
    make = {**DEFAULTS, "norm_swap": partial(PRepBN, target="dyt"), "pagcp": partial(PAGCPPruning, start=8)}[method]
    net = "cnn" if method in ("hesso", "pagcp") else "timm_vit"
    with pytest.warns(UserWarning, match=r"training ended at step 1"):
        trainer(tmp_path, make(), stop, max_steps=20).fit(Classifier(net), loader(20), loader(1))


FRESH: dict[str, Callable[[], list[Callback]]] = {
    "weights": lambda: [SigmaReparam(), MagnitudePruning(amount=0.5)],
    "norms": lambda: [PRepBN(hold=1)],
    "units": lambda: [HESSOPruning(target=0.3, periods=2, start=1, duration=4)],
}


@pytest.mark.parametrize("file", ["missing", "empty", "of something else"])
@pytest.mark.parametrize("case", FRESH)
def test_a_wrong_ckpt_path_leaves_no_trace(case: str, file: str, tmp_path: Path) -> None:
    """Lightning says what is wrong with the file; the same objects then train as if it had not been named."""
    path = tmp_path / "some.ckpt"
    if file != "missing":
        torch.save({"a": 1}, path) if file != "empty" else path.write_bytes(b"")
    modules = [Mlp(), Mlp()]
    t = trainer(tmp_path, *FRESH[case]())
    with pytest.raises((FileNotFoundError, EOFError, KeyError)):
        t.fit(modules[0], loader(6), loader(1), ckpt_path=path)
    t.fit(modules[0], loader(6), loader(1))
    trainer(tmp_path, *FRESH[case]()).fit(modules[1], loader(6), loader(1))
    tensors = [{**dict(module.named_parameters()), **dict(module.named_buffers())} for module in modules]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert t.enable_autolog_hparams


class Interrupts(Callback):
    """Stands for Ctrl-C in a notebook, once."""

    def __init__(self, at: int) -> None:
        self.at: int | None = at

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            self.at = None
            raise KeyboardInterrupt


def test_an_interrupted_fit_run_once_more(tmp_path: Path) -> None:
    """The same callbacks and the same Trainer; and bit for bit where the state is saved first."""

    def hesso() -> HESSOPruning:
        return HESSOPruning(target=0.3, periods=2, start=2, duration=6)

    whole = Mlp()
    trainer(tmp_path, hesso(), max_steps=12).fit(whole, loader(6), loader(1))
    module = Mlp()
    t = trainer(tmp_path, hesso(), Interrupts(6), max_steps=12)
    with pytest.raises(SystemExit):
        t.fit(module, loader(6), loader(1))
    t.save_checkpoint(tmp_path / "now.ckpt")
    t.fit(module, loader(6), loader(1), ckpt_path=tmp_path / "now.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), module.parameters(), strict=True))

    t = trainer(tmp_path, hesso(), Interrupts(9), max_steps=12)
    with pytest.raises(SystemExit):
        t.fit(Mlp(), loader(6), loader(1))
    with pytest.raises(ValueError, match=r"the run has 3 steps.*This Trainer had done 9 steps before.*save_checkpoint"):
        t.fit(module, loader(6), loader(1))


def test_a_run_of_no_steps_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    for make in (SigmaReparam, PRepBN, MagnitudePruning):
        t = trainer(tmp_path, make(), max_steps=0)
        assert t.enable_autolog_hparams
        t.fit(Classifier("encoder"), loader(2), loader(1))
        assert t.enable_autolog_hparams


def test_scheduled_metrics_are_logged_once_a_step(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    class Recorded(Classifier):
        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if name == "efficient/norm_swap/lam":
                seen.append((self.trainer.global_step, float(value)))
            super().log(name, value, *args, **kwargs)

    t = trainer(tmp_path, PRepBN(target="dyt", transition=2, hold=1), max_steps=4, accumulate_grad_batches=3)
    t.fit(Recorded("timm_vit"), loader(12), loader(1))
    assert seen == [(1, 1.0), (2, 0.5), (3, 0.0), (4, 0.0)]


# -- two names for one module ------------------------------------------------------------------------------------------


class Aliased(Classifier):
    """Keeps a second name for a part of its network, as finetuning callbacks ask for."""

    def __init__(self) -> None:
        super().__init__("timm_vit")
        self.backbone = self.net.blocks


def test_an_alias_is_no_tied_weight(tmp_path: Path) -> None:
    for make in (SigmaReparam, partial(MagnitudePruning, amount=0.5), HESSOPruning, partial(TempScale, tau=0.5)):
        states = []
        for cls in (partial(Classifier, "timm_vit"), Aliased):
            module = cls()
            trainer(tmp_path, make()).fit(module, loader(6), loader(1))
            states.append({n: t for n, t in module.state_dict().items() if n.startswith("net.")})
        assert all(torch.equal(states[0][n], states[1][n]) for n in states[0]), make


def test_batches_of_another_size_and_a_further_loader(tmp_path: Path) -> None:
    """A second model on the same Trainer with shorter epochs: the schedule is that of its own steps."""
    t = trainer(tmp_path, MagnitudePruning(amount=0.5), max_steps=-1, max_epochs=2)
    t.fit(Mlp(), loader(10), loader(1))
    t.fit_loop.max_epochs = 4
    second = Mlp()
    data = DataLoader(TensorDataset(*(torch.stack(c) for c in zip(*loader(3).dataset, strict=True))), batch_size=4)
    t.fit(second, data, loader(1))
    assert zeros(second) == pytest.approx(0.5, abs=0.01)


def test_the_first_argument_is_the_switch() -> None:
    with pytest.raises(TypeError, match=r"`enabled`, the first argument of MagnitudePruning.*got 0.6.*by name"):
        MagnitudePruning(0.6)  # type: ignore[arg-type]
