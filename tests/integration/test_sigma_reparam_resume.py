"""SigmaReparam between runs: killed, resumed, refused, fine-tuned, averaged."""

from __future__ import annotations

import copy
import runpy
import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from forking import forked
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, WeightAveraging
from lightning.pytorch.tuner import Tuner
from sigma_runs import Do, adamw, differing, messages, sgd, trainer, transforms, weights, with_optimizers, written
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import get_ema_avg_fn
from zoo import Classifier, loader

from lightning_efficient import SigmaReparam
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.testing.case import ResumableLoader
from lightning_efficient.testing.checks import flat

SCRIPTS = Path(__file__).parent / "scripts"
TESTS = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# -- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, a new process from ``last.ckpt``: every tensor of the final file is equal."""
    script, folder, file = SCRIPTS / "killed.py", tmp_path / "killed", tmp_path / "killed.ckpt"
    killed = forked(script, folder, file, "--kill-after", "8")
    assert killed.code == -signal.SIGKILL, killed.output
    assert not file.exists()
    last = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6, "the last file is two steps older than the kill, inside the second epoch"
    resumed = forked(script, folder, file, "--resume")
    assert resumed.code == 0, resumed.output
    runpy.run_path(str(script))["train"](tmp_path / "whole", tmp_path / "whole.ckpt")

    a, b = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "killed"))
    assert a["global_step"] == b["global_step"] == 17
    assert len(recipe.read(a)[0].tensors) == len(recipe.read(b)[0].tensors) > 5
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert differing(flat(a), flat(b)) == []


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ours.ckpt`` with the callback, ``plain.ckpt`` without, both after four steps."""
    root = tmp_path_factory.mktemp("files")
    for name, callbacks in (("ours", [SigmaReparam(init="one")]), ("plain", [])):
        t, module = trainer(root, *callbacks), Classifier("encoder")
        t.fit(module, loader(8))
        t.save_checkpoint(root / f"{name}.ckpt")
    return root


def state(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True)["state_dict"])


def refused(path: Path, error: type[Exception], match: str, *callbacks: Any, net: str = "encoder") -> None:
    """Resuming raises; the module holds its own initial weights or the file's, and nothing in between."""
    module = Classifier(net)
    initial = weights(module)
    t = trainer(path.parent, *callbacks, max_steps=8)
    with pytest.raises(error, match=match):
        t.fit(module, loader(8), ckpt_path=path)
    held = weights(module)
    assert not differing(held, initial) or not differing(held, state(path))
    for optimizer in t.optimizers:
        assert not optimizer._optimizer_step_pre_hooks, "a hook was left behind"
    # Nor is anything left in the callback: a fresh run with it trains as if nothing had happened.
    if callbacks and callbacks[0].enabled:
        first, second = Classifier("encoder"), Classifier("encoder")
        trainer(path.parent, *callbacks).fit(first, loader())
        trainer(path.parent, *copy.deepcopy(callbacks)).fit(second, loader())
        assert not differing(weights(first), weights(second))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_changed_targets_are_refused_by_both_names(files: Path) -> None:
    both = r"trained with \[\"SigmaReparam\{'include': None.*this run has.*'include': \['net.encoder'\].*same `include`"
    refused(files / "ours.ckpt", RecipeError, both, SigmaReparam(init="one", include=["net.encoder"]))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_changed_exclude_is_refused(files: Path) -> None:
    both = r"'exclude': None.*this run has.*'exclude': \['net.head'\]"
    refused(files / "ours.ckpt", RecipeError, both, SigmaReparam(init="one", exclude=["net.head"]))
    refused(files / "ours.ckpt", RecipeError, both, SigmaReparam(enabled=False, exclude=["net.head"]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"qkv": "split"}, r"`qkv`: 'fused' then, 'split' now. Resume with the saved values"),
        ({"learnable_gain": False}, r"`learnable_gain`: True then, False now"),
        ({"monitor_only": True}, r"`monitor_only`: False then, True now"),
        ({"embeddings": True}, r"`embeddings`: False then, True now"),
        ({"gain": "linear"}, r"`gain`: 'log' then, 'linear' now. Resume with the saved values"),
        ({"gain_lr": 1.0}, r"`gain_lr`: 10.0 then, 1.0 now"),
    ],
)
def test_changed_arguments_are_refused(files: Path, change: dict[str, Any], match: str) -> None:
    refused(files / "ours.ckpt", RecipeError, match, SigmaReparam(**{"init": "one", **change}))


def test_init_may_change_because_it_is_over(files: Path) -> None:
    module = Classifier("encoder")
    at_start: dict[str, Any] = {}
    probe = Do(on_train_start=lambda t, m: at_start.update(weights(m)))
    trainer(files, SigmaReparam(init="preserve"), probe, max_steps=5).fit(
        module, loader(8), ckpt_path=files / "ours.ckpt"
    )
    assert not differing(at_start, state(files / "ours.ckpt"))


def test_a_file_from_before_there_were_rates_of_gains(tmp_path: Path) -> None:
    """It was trained as published, and goes on so, to the bit; as something else it is refused by name."""
    new, old = tmp_path / "new.ckpt", tmp_path / "old.ckpt"
    t = trainer(tmp_path, SigmaReparam(gain="linear", gain_lr=1.0))
    t.fit(Classifier("encoder"), loader(8))
    t.save_checkpoint(new)
    content = torch.load(new, weights_only=True)
    for name in ("gain", "gain_lr"):
        del content[recipe.KEY]["methods"][0]["config"][name]
    torch.save(content, old)
    ends = []
    for path in (new, old):
        module = Classifier("encoder")
        published = SigmaReparam(gain="linear", gain_lr=1.0)
        trainer(tmp_path, published, max_steps=8).fit(module, ResumableLoader(loader(8)), ckpt_path=path)
        ends.append(weights(module))
    assert not differing(*ends)
    assert differing(ends[0], state(old))
    match = r"`gain`: 'linear' then, 'log' now; `gain_lr`: 1.0 then, 10.0 now"
    refused(old, RecipeError, match, SigmaReparam())


def test_a_new_run_takes_gains_of_the_other_kind(tmp_path: Path) -> None:
    """Fine-tuning with ``log`` what was trained with ``linear``, and back: it starts from the same network."""
    module = Classifier("encoder")
    for gain in ("linear", "log", "linear"):
        trained, start = weights(module), {}
        callback = SigmaReparam(gain=gain, gain_lr=3.0)
        probe = Do(on_train_start=lambda t, m, start=start: start.update(weights(m)))
        trainer(tmp_path, callback, probe).fit(module, loader())
        assert not differing(trained, start)
        assert differing(trained, weights(module))
        assert all(t._gain.log is (gain == "log") for t in transforms(callback).values())


def test_a_gain_below_zero_has_no_logarithm(tmp_path: Path) -> None:
    module, callback = Classifier("encoder"), SigmaReparam(gain="linear")

    def turn(t: Trainer, m: LightningModule) -> None:
        transforms(callback)["net.head.weight"].theta.data.neg_()

    trainer(tmp_path, callback, Do(on_train_end=turn)).fit(module, loader())
    before = weights(module)
    with pytest.raises(RecipeError, match=r"'net.head.weight' does not fit: a gain of -.* no logarithm.*gain='linear'"):
        trainer(tmp_path, SigmaReparam(gain="log")).fit(module, loader())
    assert not differing(before, weights(module))


def test_switched_off_on_resume_is_refused(files: Path) -> None:
    match = r"trained with SigmaReparam.*switches off \(enabled=False\).*Classifier.load_from_checkpoint"
    refused(files / "ours.ckpt", RecipeError, match, SigmaReparam(init="one", enabled=False))


def test_without_the_callback_lightning_warns(files: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \[.*SigmaReparam\{"):
        trainer(tmp_path, max_steps=8).fit(Classifier("encoder"), loader(8), ckpt_path=files / "ours.ckpt")


def test_damaged_files_are_refused(files: Path, tmp_path: Path) -> None:
    whole = (files / "ours.ckpt").read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint" * 99}.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        module = Classifier("encoder")
        before = weights(module)
        with pytest.raises((RuntimeError, EOFError, OSError, UnpicklingError)):
            trainer(tmp_path, SigmaReparam(init="one")).fit(module, loader(), ckpt_path=path)
        assert not differing(before, weights(module))


def edited(files: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of ``ours.ckpt`` whose recipe entry was changed by ``edit``."""
    content = torch.load(files / "ours.ckpt", weights_only=True)
    edit(content[recipe.KEY]["methods"][0])
    torch.save(content, target)
    return target


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            lambda e: e["tensors"].update({"net.gone.weight": e["tensors"]["net.head.weight"]}),
            r"state for \d+ weights, of which 1 are no targets now: net.gone.weight \(not in the model\)",
        ),
        (
            lambda e: e["tensors"]["net.head.weight"].update({"left.0": torch.ones(3)}),
            r"saved state of 'net.head.weight' does not fit.*'left.0': \(4,\).*'left.0': \(3,\)",
        ),
        (
            lambda e: e["tensors"]["net.embed.weight"].update({"gain": torch.ones(3), "sigma": torch.ones(3)}),
            r"saved state of 'net.embed.weight' does not fit: a spectral state of 1 block.*Was `qkv`",
        ),
        (lambda e: e["tensors"]["net.embed.weight"].pop("sigma"), r"'net.embed.weight' does not fit"),
        (
            lambda e: e["tensors"]["net.head.weight"].update(raw=torch.ones(2, 2)),
            r"'net.head.weight', 'raw', should be .* of shape \(4, 16\)",
        ),
        (lambda e: e["tensors"].pop("net.head.weight"), r"sigma_reparam.*`tensors`, should name \d+ parameters"),
        (lambda e: e.update(method="sigma"), r"names the method 'sigma'.*which is not known here"),
        (
            lambda e: e["tensors"].update({"net.head.weight": [1, 2]}),
            r"\['net.head.weight'\], should be .* each value a tensor; got a list of 2",
        ),
    ],
    ids=[
        "unknown weight",
        "wrong vector",
        "wrong blocks",
        "missing tensor",
        "wrong raw",
        "one weight less",
        "unknown method",
        "no tensors",
    ],
)
def test_recipes_that_do_not_fit(files: Path, tmp_path: Path, edit: Any, match: str) -> None:
    path = edited(files, tmp_path / "edited.ckpt", edit)
    refused(path, RecipeError, match, SigmaReparam(init="one"))


def test_a_model_with_other_layers_is_refused_by_lightning(files: Path) -> None:
    refused(files / "ours.ckpt", RuntimeError, r"Missing key\(s\)", SigmaReparam(init="one"), net="decoder")


def test_frozen_since_is_refused_with_the_reason(files: Path) -> None:
    class Frozen(Classifier):
        def __init__(self) -> None:
            super().__init__("encoder")
            self.net.head.requires_grad_(False)

    with pytest.raises(RecipeError, match=r"1 are no targets now: net.head.weight \(frozen"):
        trainer(files, SigmaReparam(init="one"), max_steps=8).fit(Frozen(), loader(8), ckpt_path=files / "ours.ckpt")


def test_going_back_to_a_checkpoint_in_the_same_process(tmp_path: Path) -> None:
    """The same module and the same callback, both trained further since: the file's state counts."""
    callback, module, ends = SigmaReparam(init="one"), Classifier("encoder"), []
    keep = Do(on_train_batch_end=lambda t, m: t.global_step == 3 and t.save_checkpoint(tmp_path / "3.ckpt"))
    for ckpt in (None, tmp_path / "3.ckpt"):
        t = trainer(tmp_path, callback, *([] if ckpt else [keep]), max_steps=6)
        t.fit(module, ResumableLoader(loader(8)), ckpt_path=ckpt)
        ends.append(written(t, tmp_path / "end.ckpt"))
    assert differing(*ends) == []


# -- weights that were left alone at the start -----------------------------------------------------------------------


class ZeroHead(Classifier):
    """Starts from a zero output layer, as many published models do."""

    def __init__(self) -> None:
        super().__init__("encoder")
        nn.init.zeros_(self.net.head.weight)


def test_a_zero_layer_stays_ordinary_and_resumes_exactly(tmp_path: Path) -> None:
    def run(steps: int, ckpt: Path | None = None) -> dict[str, Any]:
        t = trainer(tmp_path, SigmaReparam(), max_steps=steps)
        t.fit(ZeroHead(), ResumableLoader(loader(8)), ckpt_path=ckpt)
        assert t.lightning_module.net.head.weight.abs().min() > 0, "it trains"
        return written(t, tmp_path / f"{steps}.ckpt")

    warning = r"SigmaReparam leaves 1 weight\(s\) alone: net.head.weight \(all zero"
    with pytest.warns(UserWarning, match=warning):
        run(3)
    with pytest.warns(UserWarning, match=warning):
        whole = run(6)
    with pytest.warns(UserWarning, match=r"alone: net.head.weight \(left alone when the checkpoint was written"):
        resumed = run(6, tmp_path / "3.ckpt")
    assert differing(whole, resumed) == []


@pytest.mark.filterwarnings("ignore:SigmaReparam leaves 1 weight")
def test_a_second_fit_takes_what_it_can_take_now(tmp_path: Path) -> None:
    module, callback = ZeroHead(), SigmaReparam()
    trainer(tmp_path, callback).fit(module, loader())
    assert "net.head.weight" not in transforms(callback)
    kept = {name: t.gain.detach().clone() for name, t in transforms(callback).items()}
    module.net.embed.requires_grad_(False)
    gains: dict[str, Any] = {}
    probe = Do(on_train_start=lambda t, m: gains.update({n: s.gain.clone() for n, s in transforms(callback).items()}))
    trainer(tmp_path, callback, probe).fit(module, loader())
    assert "net.head.weight" in gains
    assert "net.embed.weight" not in gains
    assert all(torch.equal(gains[name], kept[name]) for name in gains.keys() & kept.keys())


# -- a checkpoint without us: fine-tuning ----------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "none": lambda o: None,
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: min(1.0, (step + 1) / 12)),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=6), lrs.CosineAnnealingLR(o, 20)], milestones=[6]
    ),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, [0.004, 0.008, 0.002], total_steps=20),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 12, eta_min=1e-5),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=1e9),
}


def finetuned(schedule: str) -> Classifier:
    """Matrices in two groups with rates of their own, and the rest."""

    def configure(module: Any) -> Any:
        matrices = [p for p in module.parameters() if p.ndim > 1]
        groups = [
            {"params": matrices[:3], "lr": 0.004, "weight_decay": 0.1, "name": "early"},
            {"params": matrices[3:], "lr": 0.008, "weight_decay": 0.2, "name": "late"},
            {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0, "name": "rest"},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.002)
        scheduler = SCHEDULES[schedule](optimizer)
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "train_loss"},
        }

    return with_optimizers(configure, "encoder")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_plain_checkpoint_goes_on_with_the_callback(schedule: str, tmp_path: Path) -> None:
    t = trainer(tmp_path, max_steps=5)
    t.fit(finetuned(schedule), loader(20))
    t.save_checkpoint(tmp_path / "plain.ckpt")
    content = torch.load(tmp_path / "plain.ckpt", weights_only=True)

    rates: dict[bool, list[list[dict[str, Any]]]] = {True: [], False: []}
    callback, steps = SigmaReparam(), []

    def note(on: bool) -> Callable[[Trainer, LightningModule], None]:
        def function(t: Trainer, m: LightningModule) -> None:
            rates[on].append([{k: v for k, v in g.items() if k != "params"} for g in t.optimizers[0].param_groups])

        return function

    def inside(t: Trainer, m: LightningModule) -> None:
        optimizer = t.optimizers[0]
        gains = {id(s.theta): s for s in transforms(callback).values()}
        visitors = [p for g in optimizer.param_groups for p in g["params"] if id(p) in gains]
        assert len(visitors) == 10
        steps.append({int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in visitors})

    def check_start(t: Trainer, m: LightningModule) -> None:
        optimizer = t.optimizers[0]
        saved = content["optimizer_states"][0]
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        for i, p in zip(ids, (p for group in optimizer.param_groups for p in group["params"]), strict=True):
            assert optimizer.state[p].keys() == saved["state"][i].keys()
            assert not differing(dict(optimizer.state[p]), saved["state"][i])
        assert not differing(weights(m), content["state_dict"]), "the function is the file's"
        for name, transform in transforms(callback).items():
            true = torch.linalg.matrix_norm(m.get_parameter(name).detach().double(), 2)
            torch.testing.assert_close(transform.gain.detach().double(), true[None], rtol=1e-5, atol=0)

    with messages() as said:
        probe = Do(on_train_start=check_start, on_train_batch_start=note(True), on_before_optimizer_step=inside)
        resumed = trainer(tmp_path, callback, probe, max_steps=14)
        resumed.fit(finetuned(schedule), loader(20), ckpt_path=tmp_path / "plain.ckpt")
    assert "SigmaReparam: the checkpoint was trained without it; its weights are taken as they are." in said
    trainer(tmp_path, Do(on_train_batch_start=note(False)), max_steps=14).fit(
        finetuned(schedule), loader(20), ckpt_path=tmp_path / "plain.ckpt"
    )
    assert steps == [{step} for step in range(9)], "the gains are untrained"
    assert len(rates[True]) == len(rates[False]) == 9
    if schedule != "none":
        assert len({step[0]["lr"] for step in rates[True]}) > 3, "the schedule must have moved"
    if schedule != "ReduceLROnPlateau":  # which follows the loss
        assert rates[True] == rates[False]


def test_two_optimizers_go_on_from_a_plain_checkpoint(files: Path, tmp_path: Path) -> None:
    from zoo import Manual

    t = trainer(tmp_path, max_steps=8)
    t.fit(Manual("encoder"), loader(8))
    t.save_checkpoint(tmp_path / "plain.ckpt")
    callback = SigmaReparam()
    module = Manual("encoder")
    resumed = trainer(tmp_path, callback, max_steps=16)
    resumed.fit(module, loader(8), ckpt_path=tmp_path / "plain.ckpt")
    assert resumed.global_step == 16
    assert [len(o.param_groups) for o in resumed.optimizers] == [1, 1]
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_weights_of_a_plain_checkpoint_then_fit(files: Path, tmp_path: Path) -> None:
    module = Classifier.load_from_checkpoint(files / "plain.ckpt")
    at_start: dict[str, Any] = {}
    trainer(tmp_path, SigmaReparam(), Do(on_train_start=lambda t, m: at_start.update(weights(m)))).fit(module, loader())
    assert not differing(at_start, state(files / "plain.ckpt"))
    assert differing(weights(module), at_start)
    # and of one of ours, without us: an ordinary file
    stock = Classifier.load_from_checkpoint(files / "ours.ckpt")
    trainer(tmp_path).fit(stock, loader())


# -- files of earlier versions ---------------------------------------------------------------------------------------


def as_before(content: dict[str, Any]) -> dict[str, Any]:
    """The file as it was when gains were parameters of the optimizer, in groups behind the user's."""
    entry = content[recipe.KEY]["methods"][0]
    module = Classifier("encoder")
    names = {name: i for i, (name, _) in enumerate(module.named_parameters())}
    groups, states = (content["optimizer_states"][0][key] for key in ("param_groups", "state"))
    place = {i: group for group in groups for i in group["params"]}
    added: dict[int, dict[str, Any]] = {}
    for name in sorted(entry["tensors"], key=lambda n: [i for g in groups for i in g["params"]].index(names[n])):
        state = entry["tensors"][name]
        memory = {k.removeprefix("optimizer."): state.pop(k) for k in list(state) if k.startswith("optimizer.")}
        home = place[names[name]]
        group = added.setdefault(id(home), {**home, "params": [], "weight_decay": 0.0})
        group["params"].append(len(names) + len([i for g in added.values() for i in g["params"]]))
        states[group["params"][-1]] = memory
    groups += added.values()
    for scheduler in content["lr_schedulers"]:
        for key in ("base_lrs", "_last_lr"):
            scheduler[key] = [*scheduler[key], scheduler[key][0]]
    return content


def scheduled(module: Any) -> Any:
    optimizer = adamw(module)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": lrs.CosineAnnealingLR(optimizer, 12), "interval": "step"},
    }


def test_a_file_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    def run(steps: int, ckpt: Path | None = None) -> Trainer:
        t = trainer(tmp_path, SigmaReparam(init="one"), max_steps=steps)
        t.fit(with_optimizers(scheduled, "encoder"), ResumableLoader(loader(8)), ckpt_path=ckpt)
        return t

    run(3).save_checkpoint(tmp_path / "new.ckpt")
    old = as_before(torch.load(tmp_path / "new.ckpt", weights_only=True))
    assert len(old["optimizer_states"][0]["param_groups"]) == 2
    torch.save(old, tmp_path / "old.ckpt")
    found = [written(run(6, tmp_path / f"{name}.ckpt"), tmp_path / "end.ckpt") for name in ("new", "old")]
    assert any(name.endswith("/optimizer.exp_avg") for name in found[0])
    assert differing(*found) == []


# -- averaged weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_averaged_checkpoint_resumed_without_averaging(precision: Any, tmp_path: Path) -> None:
    ema = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    save = Do(on_train_batch_end=lambda t, m: t.global_step == 6 and t.save_checkpoint(tmp_path / "ema.ckpt"))
    t = trainer(tmp_path, ema, SigmaReparam(), save, max_steps=7, precision=precision)
    t.fit(Classifier("encoder", lr=0.02), loader(8))
    averaged = Classifier("encoder").to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    averaged.load_state_dict(state(tmp_path / "ema.ckpt"))
    file = weights(averaged)
    trained = torch.load(tmp_path / "ema.ckpt", weights_only=True)["current_model_state"]
    assert len(differing(file, trained)) > 20
    expected = trainer(tmp_path, precision=precision).test(averaged, loader(), verbose=False)

    seen: dict[str, Any] = {}
    module = Classifier("encoder", lr=0.02)

    def at_start(t: Trainer, m: LightningModule) -> None:
        seen["start"] = weights(m)

    def after_step(t: Trainer, m: LightningModule) -> None:
        seen.setdefault("step", weights(m))

    def no_rate(t: Trainer, m: LightningModule) -> None:
        """For the first step, so that what the method's own rescaling does to the weights shows alone."""
        if t.global_step == 6:
            for group in t.optimizers[0].param_groups:
                group["lr"] = 0.0

    still = Do(on_train_start=at_start, on_train_batch_start=no_rate, on_train_batch_end=after_step)
    t = trainer(tmp_path, SigmaReparam(), still, max_steps=12, precision=precision)
    with pytest.warns(UserWarning, match=r"weight\(s\) changed since the state of \['SigmaReparam'\]") as caught:
        t.fit(module, loader(8), ckpt_path=tmp_path / "ema.ckpt")
    assert sum("changed since" in str(w.message) for w in caught) == 1
    assert not differing(seen["start"], file), "the function at resume is the file's"
    again = copy.deepcopy(averaged)
    again.load_state_dict(seen["start"])
    assert trainer(tmp_path, precision=precision).test(again, loader(), verbose=False) == expected
    bound = 1e-3 if precision == "32-true" else 2**-7  # one unit in the last place of bfloat16
    for name, value in file.items():
        torch.testing.assert_close(seen["step"][name], value, rtol=bound, atol=1e-6)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert differing(weights(module), seen["step"])


# -- two of them -----------------------------------------------------------------------------------------------------


def two() -> tuple[SigmaReparam, SigmaReparam]:
    return SigmaReparam(include=["net.encoder"], qkv="split"), SigmaReparam(
        include=["net.head", "net.embed"], init="one"
    )


def test_two_of_them_resume_exactly_in_either_order(tmp_path: Path) -> None:
    def run(steps: int, ckpt: Path | None = None, turn: bool = False) -> dict[str, Any]:
        callbacks = two()[::-1] if turn else two()
        t = trainer(tmp_path, *callbacks, max_steps=steps)
        t.fit(Classifier("encoder"), ResumableLoader(loader(8)), ckpt_path=ckpt)
        assert not transforms(callbacks[0]).keys() & transforms(callbacks[1]).keys()
        found = written(t, tmp_path / f"{steps}.ckpt")
        return {name: value for name, value in found.items() if recipe.KEY not in name} | {
            f"{e.key}/{name}/{key}": value
            for e in recipe.read(torch.load(tmp_path / f"{steps}.ckpt", weights_only=True))
            for name, group in e.tensors.items()
            for key, value in group.items()
        }

    run(3)
    half = tmp_path / "3.ckpt"
    whole = run(6)
    assert differing(whole, run(6, half)) == []
    assert differing(whole, run(6, half, turn=True)) == []


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_one_of_two_missing_or_new_is_refused(tmp_path: Path) -> None:
    t = trainer(tmp_path, *two())
    t.fit(Classifier("encoder"), loader(8))
    t.save_checkpoint(tmp_path / "two.ckpt")
    refused(
        tmp_path / "two.ckpt", RecipeError, r"\['net.encoder'\].*\['net.head', 'net.embed'\].*this run has", two()[0]
    )
    t = trainer(tmp_path, two()[0])
    t.fit(Classifier("encoder"), loader(8))
    t.save_checkpoint(tmp_path / "one.ckpt")
    refused(tmp_path / "one.ckpt", RecipeError, r"trained with.*net.encoder.*this run has.*net.head", *two())


def test_overlapping_ones_are_refused_before_anything_changes(tmp_path: Path) -> None:
    module = Classifier("encoder")
    before = weights(module)
    overlapping = SigmaReparam(init="one"), SigmaReparam(init="one", include=["net.head"])
    t = trainer(tmp_path, *overlapping)
    with pytest.raises(ValueError, match=r"'net.head.weight' already has a 'spectral' transform.*disjoint"):
        t.fit(module, loader())
    assert not differing(weights(module), before)
    assert len(t.optimizers[0].param_groups) == 2


def test_identical_ones_are_refused_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `SigmaReparam`"):
        trainer(tmp_path, SigmaReparam(), SigmaReparam())


# -- tuners ----------------------------------------------------------------------------------------------------------

FINDER = r"LearningRateFinder runs before SigmaReparam starts.*without it"
finder = partial(LearningRateFinder, num_training_steps=6, update_attr=False)


@pytest.mark.parametrize("ours", [True, False], ids=["with us", "lightning alone"])
@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_a_learning_rate_finder_leaves_no_trace(how: str, ours: bool, tmp_path: Path) -> None:
    """The second parameter shows that Lightning itself guarantees it for this run."""

    def run(find: bool) -> tuple[dict[str, Any], list[str]]:
        callbacks: list[Any] = [SigmaReparam(init="one")] if ours else []
        module = with_optimizers(adamw, "encoder")
        if find and how == "callback":
            callbacks.append(finder())
        t = trainer(tmp_path, *callbacks, max_steps=6)
        if find and how == "tuner":
            Tuner(t).lr_find(module, loader(8), num_training=6, update_attr=False)
        with messages() as said:
            t.fit(module, loader(8))
        return written(t, tmp_path / "end.ckpt"), said

    expected, _ = run(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, said = run(True)
    assert any("LearningRateFinder runs before SigmaReparam" in str(w.message) for w in caught) is ours
    assert differing(expected, found) == []
    assert not any("trained without it" in line for line in said), "a tuner's own file is no fine-tuning"


class InTheMiddle(LearningRateFinder):
    """Looks for a rate before the second epoch, as Lightning's documentation shows."""

    def on_fit_start(self, *_: Any) -> None:
        """Not yet."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


@pytest.mark.filterwarnings("ignore:LearningRateFinder runs before")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("ours", [True, False], ids=["with us", "lightning alone"])
def test_a_learning_rate_finder_in_the_middle(ours: bool, precision: Any, tmp_path: Path) -> None:
    def run(*more: Any) -> dict[str, Any]:
        callbacks = [SigmaReparam(init="one")] if ours else []
        t = trainer(tmp_path, *callbacks, *more, max_steps=-1, max_epochs=3, precision=precision)
        t.fit(with_optimizers(adamw, "encoder"), loader(4))
        return written(t, tmp_path / "end.ckpt")

    expected = run()
    found = run(InTheMiddle(num_training_steps=4, update_attr=False))
    kept = {name for name in expected if name.startswith(("/state_dict", "/optimizer_states", f"/{recipe.KEY}"))}
    assert len(kept) > 40
    assert differing({n: expected[n] for n in kept}, {n: found[n] for n in kept}) == []


@pytest.mark.filterwarnings("ignore:LearningRateFinder runs before")
@pytest.mark.filterwarnings("ignore:LearningRateFinder tries a run")
def test_a_finder_does_not_lose_the_state_of_a_checkpoint(files: Path, tmp_path: Path) -> None:
    """Lightning itself drops the optimizer state here; the method's own state stays."""
    saved = recipe.read(torch.load(files / "ours.ckpt", weights_only=True))[0].tensors
    callback, seen = SigmaReparam(init="one"), {}
    probe = Do(on_train_start=lambda t, m: seen.update({n: s.state_dict() for n, s in transforms(callback).items()}))
    trainer(tmp_path, callback, finder(), probe, max_steps=8).fit(
        Classifier("encoder"), loader(8), ckpt_path=files / "ours.ckpt"
    )
    assert seen.keys() == saved.keys()
    own = {n: {k: v for k, v in state.items() if not k.startswith("optimizer.")} for n, state in saved.items()}
    assert not [name for name in own if differing(seen[name], own[name])]


def test_memory_of_the_checkpoint_is_let_go(files: Path, tmp_path: Path) -> None:
    callback = SigmaReparam(init="one")
    held: list[Any] = []
    probe = Do(on_train_start=lambda t, m: held.append((callback._file, attachment(m).entries)))
    for name in ("ours", "plain"):
        trainer(tmp_path, callback, probe, max_steps=5).fit(
            Classifier("encoder"), loader(8), ckpt_path=files / f"{name}.ckpt"
        )
    assert held == [(None, []), (None, [])]


def test_sgd_resumes_in_half_precision(tmp_path: Path) -> None:
    def run(steps: int, ckpt: Path | None = None) -> dict[str, Any]:
        t = trainer(tmp_path, SigmaReparam(init="one"), max_steps=steps, precision="16-true")
        t.fit(with_optimizers(sgd, "encoder"), ResumableLoader(loader(8)), ckpt_path=ckpt)
        return written(t, tmp_path / f"{steps}.ckpt")

    run(3)
    whole = run(6)
    assert any(name.endswith("/raw") for name in whole)
    assert differing(whole, run(6, tmp_path / "3.ckpt")) == []
