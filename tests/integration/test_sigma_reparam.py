"""SigmaReparam inside one run: what optimizers, precision plugins and other callbacks can do to it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder
from lightning.pytorch.plugins import MixedPrecision
from sigma_runs import Do, adamw, differing, sgd, trainer, transforms, weights, with_optimizers, written
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset
from zoo import Classifier, Manual, loader

from lightning_efficient import SigmaReparam
from lightning_efficient.lifecycle.state import attachment

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def refused(
    module: LightningModule, tmp_path: Path, match: str, *callbacks: Any, error: type[Exception] = ValueError
) -> Trainer:
    """``fit`` raises before any weight has changed, and leaves no hook behind."""
    before = {k: torch.nan_to_num(v) for k, v in weights(module).items()}
    t = trainer(tmp_path, *callbacks)
    with pytest.raises(error, match=match):
        t.fit(module, loader())
    assert not differing(before, {k: torch.nan_to_num(v) for k, v in weights(module).items()})
    for optimizer in t.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    return t


def one() -> SigmaReparam:
    """Changes every weight when it starts, so that a half-applied start is seen."""
    return SigmaReparam(init="one")


# -- optimizers ------------------------------------------------------------------------------------------------------


def test_lbfgs_is_refused_before_anything_changes(tmp_path: Path) -> None:
    module = with_optimizers(lambda m: torch.optim.LBFGS(m.parameters()))
    refused(module, tmp_path, r"LBFGS evaluates the model several times.*first-order.*enabled=False", one())


def test_a_weight_in_two_optimizers_is_refused(tmp_path: Path) -> None:
    module = with_optimizers(lambda m: [adamw(m), sgd(m.net.head)], automatic=False)
    t = refused(module, tmp_path, r"'net.head.weight' is in two optimizers \(AdamW, SGD\)", one())
    assert [len(o.param_groups) for o in t.optimizers] == [1, 1]


def test_weights_in_no_optimizer_are_left_alone_and_named(tmp_path: Path) -> None:
    module = with_optimizers(lambda m: sgd(m.net.head))
    callback = SigmaReparam()
    with pytest.warns(UserWarning, match=r"leaves 2 weight\(s\) alone: net.stem.weight \(in no optimizer\)") as caught:
        trainer(tmp_path, callback).fit(module, loader())
    assert sum("alone" in str(w.message) for w in caught) == 1
    module = with_optimizers(lambda m: torch.optim.SGD([m.net.head.bias], lr=0.1))
    refused(module, tmp_path, r"none of the 3 matched weights is in an optimizer.*configure_optimizers", one())


class Twice(torch.optim.SGD):
    """Evaluates its closure twice."""

    def step(self, closure: Any = None) -> Any:
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
        super().step()
        return loss


class FailsThird(torch.optim.SGD):
    """Fails in its third step, before it has moved anything."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.count += 1
        if self.count == 3:
            raise OSError("inside the third step")
        super().step()
        return loss


def test_a_closure_evaluated_twice_raises_and_leaves_the_network(tmp_path: Path) -> None:
    module = with_optimizers(lambda m: Twice(m.parameters(), lr=0.1), "encoder")
    start: dict[str, Tensor] = {}
    t = trainer(tmp_path, one(), Do(on_train_start=lambda t, m: start.update(weights(m))))
    with pytest.raises(RuntimeError, match=r"Twice evaluated its closure twice in one step.*enabled=False"):
        t.fit(module, loader())
    for name, value in weights(module).items():
        torch.testing.assert_close(value, start[name], rtol=2.4e-7, atol=0)  # 2 ulp: there and back


def test_an_exception_inside_the_step_leaves_the_network_and_a_next_fit(tmp_path: Path) -> None:
    module = with_optimizers(lambda m: FailsThird(m.parameters(), lr=0.1), "encoder")
    callback, seen = one(), {}
    watch = Do(on_train_batch_start=lambda t, m: seen.update(weights(m)))
    t = trainer(tmp_path, callback, watch)
    with pytest.raises(OSError, match="inside the third step"):
        t.fit(module, loader())
    assert t.global_step == 2
    for name, value in weights(module).items():
        torch.testing.assert_close(value, seen[name], rtol=2.4e-7, atol=0)
    left = t.optimizers[0]
    assert not left._optimizer_step_pre_hooks
    assert not left._optimizer_step_post_hooks

    gains = {name: s.gain.detach().clone() for name, s in transforms(callback).items()}
    start: dict[str, Any] = {}
    probe = Do(on_train_start=lambda t, m: start.update({n: s.gain.clone() for n, s in transforms(callback).items()}))
    trainer(tmp_path, callback, probe, max_steps=2).fit(module, loader())
    assert not differing(gains, start), "the state of the failed run goes on; init='one' must not reset it"


def probe_advances(callback: SigmaReparam) -> tuple[Do, list[tuple[int, str]]]:
    """A callback that notes every advance of every transform with the step it happened in."""
    noted: list[tuple[int, str]] = []

    def watch(t: Trainer, m: LightningModule) -> None:
        for name, transform in transforms(callback).items():

            def counting(weight: Tensor, name: str = name, advance: Any = transform.advance) -> None:
                noted.append((t.global_step, name))
                advance(weight)

            transform.advance = counting  # type: ignore[method-assign]

    return Do(on_train_start=watch), noted


def test_accumulation_advances_once_a_step(tmp_path: Path) -> None:
    callback = SigmaReparam()
    probe, noted = probe_advances(callback)
    t = trainer(tmp_path, callback, probe, accumulate_grad_batches=3, max_steps=-1, max_epochs=2)
    t.fit(Classifier("cnn"), loader(8))  # 8 batches: the last step of an epoch has two
    assert t.global_step == 6
    assert noted == [(step, name) for step in range(6) for name in transforms(callback)]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_step_without_a_loss(tmp_path: Path) -> None:
    """``None`` skips the batch: nothing moves, nothing advances; the run equals the one without such batches."""

    class Picky(Classifier):
        skip = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.skip and batch_idx % 2 else super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return adamw(self)

    results = []
    for skip, batches in ((True, 6), (False, 3)):
        callback, module = SigmaReparam(), Picky("encoder")
        module.skip = skip
        data = loader(6).dataset.tensors
        if not skip:
            data = tuple(torch.cat([x[8 * i : 8 * i + 4] for i in range(3)]) for x in data)
        probe, noted = probe_advances(callback)
        t = trainer(tmp_path, callback, probe, max_steps=-1, max_epochs=1)
        t.fit(module, DataLoader(TensorDataset(*data), batch_size=4))
        assert t.fit_loop.epoch_loop.batch_progress.total.completed == batches
        assert len(noted) == 3 * len(transforms(callback))
        results.append(weights(module))
    assert not differing(*results)


class Raw(Manual):
    """Manual optimization past Lightning's wrappers."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch))
            optimizer.optimizer.step()


class Toggled(Manual):
    """Manual optimization with toggling, closures and accumulation by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second):
            self.toggle_optimizer(optimizer)

            def closure(optimizer: Any = optimizer) -> Tensor:
                loss = self._loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)
            self.untoggle_optimizer(optimizer)


def test_manual_optimization_in_three_ways(tmp_path: Path) -> None:
    results = []
    for kind in (Manual, Raw, Toggled):
        callback, module = one(), kind("encoder")
        probe, noted = probe_advances(callback)
        t = trainer(tmp_path, callback, probe, max_steps=-1, max_epochs=1)
        t.fit(module, loader(4))
        assert len(noted) == 4 * len(transforms(callback))
        assert {name for _, name in noted} == set(transforms(callback))
        assert [len(o.param_groups) for o in t.optimizers] == [1, 1], "gains are visitors"
        results.append(weights(module))
    assert not differing(results[0], results[1]), "past the wrappers the optimizer's own hook does it"
    assert not differing(results[0], results[2])


def poisoned(bad: bool) -> DataLoader[Any]:
    x, y = loader(5).dataset.tensors
    if bad:
        x = torch.cat([x[:8], torch.full_like(x[:4], float("inf")), x[8:]])
        y = torch.cat([y[:8], y[:4], y[8:]])
    return DataLoader(TensorDataset(x, y), batch_size=4)


def test_a_step_skipped_by_the_grad_scaler_leaves_no_trace(tmp_path: Path) -> None:
    results = []
    for bad in (True, False):
        callback, module = one(), with_optimizers(adamw, "encoder")
        probe, noted = probe_advances(callback)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, backoff_factor=1 / 2, growth_interval=1000)

        def same_scale(t: Trainer, m: LightningModule, bad: bool = bad, scaler: Any = scaler) -> None:
            """What the bad batch does to the scale, as other scales round float16 gradients differently."""
            if t.global_step == 2 and not bad:
                scaler.update(128.0)

        more = [probe, Do(on_train_batch_end=same_scale)]
        t = trainer(
            tmp_path, callback, *more, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
            gradient_clip_val=0.1, max_steps=-1, max_epochs=1,
        )  # fmt: skip
        t.fit(module, poisoned(bad))
        assert len(noted) == 5 * len(transforms(callback)), "the skipped step must not advance the state"
        assert scaler.get_scale() == 128.0
        state = {f"{n}/{key}": v for n, s in transforms(callback).items() for key, v in s.state_dict().items()}
        results.append(weights(module) | state)
        assert all(torch.isfinite(value).all() for value in results[-1].values())
    assert not differing(*results)


def test_prebuilt_optimizers_fit_twice_without_dead_parameters(tmp_path: Path) -> None:
    """As LightningCLI makes them: one optimizer object for every fit."""

    class Prebuilt(Classifier):
        def __init__(self) -> None:
            super().__init__("encoder")
            self.made = adamw(self)

        def configure_optimizers(self) -> Any:
            return self.made

    module, callback = Prebuilt(), one()
    for _ in range(2):
        trainer(tmp_path, callback).fit(module, loader())
        assert len(module.made.param_groups) == 1
        assert {id(p) for p in module.made.state} == {id(p) for p in module.parameters()}
    entry = attachment(module).entry("sigma_reparam")
    assert entry is not None
    steps = {int(state["optimizer.step"]) for state in entry.tensors.values()}
    assert steps == {8}, "the gains' own optimizer state goes on too"


# -- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_narrow_weights_do_not_wear(precision: Any, tmp_path: Path) -> None:
    """A hundred steps with zero gradients: raw and network weights keep every bit."""
    module = with_optimizers(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "encoder")
    start: dict[str, Any] = {}

    def raw(t: Trainer) -> dict[str, Tensor]:
        return {n: v for n, v in written(t, tmp_path / "a.ckpt").items() if "/raw" in n or "/state_dict" in n}

    def zero(t: Trainer, m: LightningModule) -> None:
        for p in m.parameters():
            p.grad = torch.zeros_like(p)

    callback = SigmaReparam()
    hooks = Do(on_train_start=lambda t, m: start.update(raw(t)), on_after_backward=zero)
    t = trainer(tmp_path, callback, hooks, precision=precision, max_steps=100)
    t.fit(module, loader(100, size=1))
    assert t.global_step == 100
    assert len([name for name in start if name.endswith("/raw")]) == len(transforms(callback))
    assert not differing(start, raw(t))


# -- targets, inside a Trainer ---------------------------------------------------------------------------------------


def spoilt(change: Callable[[Any], Any]) -> Classifier:
    module = with_optimizers(sgd, "encoder")
    change(module.net)
    return module


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda n: n.head.weight.data.fill_(float("nan")), r"'net.head.weight' holds NaN"),
        (lambda n: setattr(n.head, "weight", nn.Parameter(n.head.weight.to(torch.complex64))), r"is torch.complex64"),
        (lambda n: [nn.init.zeros_(p) for p in n.parameters() if p.ndim > 1], r"no weight it can work on.*all zero"),
    ],
    ids=["nan", "complex", "all zero"],
)
def test_bad_weights_are_refused_before_anything_changes(change: Any, match: str, tmp_path: Path) -> None:
    refused(spoilt(change), tmp_path, match, one())


def test_a_mistyped_glob_is_refused_before_anything_changes(tmp_path: Path) -> None:
    refused(
        Classifier("encoder"), tmp_path, r"did you mean 'net.encoder'", SigmaReparam(init="one", include=["encodr"])
    )
    with pytest.raises(TypeError, match=r"exclude='head' is a string; write a list: exclude=\['head'\]"):
        SigmaReparam(exclude="head")


def alone(callback: SigmaReparam, module: LightningModule, tmp_path: Path) -> list[str]:
    """The one warning about weights left alone."""
    with pytest.warns(UserWarning, match="alone") as caught:
        trainer(tmp_path, callback).fit(module, loader())
    found = [str(w.message) for w in caught if "alone" in str(w.message)]
    assert len(found) == 1
    return found


def test_what_is_left_alone_is_said_once(tmp_path: Path) -> None:
    def mixed(net: Any) -> None:
        net.embed.requires_grad_(False)
        nn.init.zeros_(net.head.weight)
        parametrizations.weight_norm(net.encoder.layers[0].linear1)

    (said,) = alone(SigmaReparam(exclude=["*linear2"]), spoilt(mixed), tmp_path)
    assert "leaves 3 weight(s) alone" in said
    for words in ("net.embed.weight (frozen", "net.head.weight (all zero", "linear1.weight (computed by"):
        assert words in said
    assert "linear2" not in said, "what the user excluded is no surprise"


def test_include_is_no_surprise_either(tmp_path: Path) -> None:
    """Under pytest every warning is an error."""
    trainer(tmp_path, SigmaReparam(include=["net.head"])).fit(Classifier("encoder"), loader())


# -- modes -----------------------------------------------------------------------------------------------------------


def test_monitoring_changes_no_bit_and_logs(tmp_path: Path) -> None:
    results = []
    for precision in ("32-true", "bf16-true"):
        for callbacks in ([SigmaReparam(monitor_only=True, qkv="split")], []):
            module = Classifier("timm_vit")
            t = trainer(tmp_path, *callbacks, precision=precision, gradient_clip_val=0.1)
            t.fit(module, loader())
            results.append(weights(module))
            assert len(t.optimizers[0].param_groups) == 2
            if callbacks:
                assert set(t.callback_metrics) >= {f"efficient/sigma_reparam/{k}" for k in ("sigma_max", "sigma_mean")}
                assert "efficient/sigma_reparam/gain_max" not in t.callback_metrics
                true = torch.linalg.matrix_norm(module.net.head.weight.detach().float(), 2)
                torch.testing.assert_close(
                    transforms(callbacks[0])["net.head.weight"].sigma[0], true, rtol=1e-2, atol=0
                )
        assert not differing(results[-1], results[-2])


@pytest.mark.parametrize("init", ["preserve", "one"])
def test_constant_gains_are_in_no_optimizer(init: Any, tmp_path: Path) -> None:
    callback, module = SigmaReparam(learnable_gain=False, init=init), Classifier("encoder")
    start: dict[str, Any] = {}
    probe = Do(on_train_start=lambda t, m: start.update({n: s.gain.clone() for n, s in transforms(callback).items()}))
    t = trainer(tmp_path, callback, probe, max_steps=8)
    t.fit(module, loader(8))
    held = {id(p) for group in t.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    for name, transform in transforms(callback).items():
        assert torch.equal(transform.gain, start[name])
        true = torch.linalg.matrix_norm(module.get_parameter(name).detach(), 2).item()
        assert true == pytest.approx(start[name].item(), rel=0.02)


def test_init_one_starts_every_matrix_at_norm_one(tmp_path: Path) -> None:
    callback, module = one(), Classifier("timm_vit")
    start: dict[str, Tensor] = {}
    trainer(tmp_path, callback, Do(on_train_start=lambda t, m: start.update(weights(m)))).fit(module, loader())
    for name in transforms(callback):
        norm = torch.linalg.matrix_norm(start[name].flatten(1), 2).item()
        assert norm == pytest.approx(1.0, rel=1e-5), name


def test_a_second_fit_goes_on_and_another_module_starts_fresh(tmp_path: Path) -> None:
    callback, first = one(), Classifier("encoder")
    trainer(tmp_path, callback).fit(first, loader())
    before, gains = weights(first), {n: s.state_dict() for n, s in transforms(callback).items()}
    start: dict[str, Any] = {}

    def note(t: Trainer, m: LightningModule) -> None:
        start.update(weights=weights(m), gains={n: s.state_dict() for n, s in transforms(callback).items()})

    trainer(tmp_path, callback, Do(on_train_start=note)).fit(first, loader())
    assert not differing(before, start["weights"]), "init='one' must not rescale trained weights"
    assert not [name for name in gains if differing(gains[name], start["gains"][name])]

    trainer(tmp_path, callback, Do(on_train_start=note)).fit(Classifier("encoder"), loader())
    assert all(torch.equal(state["log_gain"], torch.zeros(1)) for state in start["gains"].values())
    expected: dict[str, Any] = {}
    fresh = Do(on_train_start=lambda t, m: expected.update(weights(m)))
    trainer(tmp_path, one(), fresh).fit(Classifier("encoder"), loader())
    assert not differing(expected, start["weights"])


def test_a_failed_resume_does_not_leak_into_the_next_fit(tmp_path: Path) -> None:
    callback = one()
    t = trainer(tmp_path, callback)
    t.fit(Classifier("encoder"), loader(8))
    t.save_checkpoint(tmp_path / "a.ckpt")

    class Fails(Classifier):
        def on_fit_start(self) -> None:
            raise OSError("on_fit_start")

        def configure_optimizers(self) -> Any:
            raise OSError("configure_optimizers")

    with pytest.raises(OSError, match="configure_optimizers"):  # the state of the file is loaded, fit has not begun
        trainer(tmp_path, callback, max_steps=8).fit(Fails("encoder"), loader(8), ckpt_path=tmp_path / "a.ckpt")
    module, expected = Classifier("encoder"), Classifier("encoder")
    trainer(tmp_path, callback).fit(module, loader())
    trainer(tmp_path, one()).fit(expected, loader())
    assert not differing(weights(module), weights(expected))


def test_nothing_of_a_run_keeps_its_module_alive(tmp_path: Path) -> None:
    callback, module = SigmaReparam(), Classifier("encoder")
    trainer(tmp_path, callback).fit(module, loader())
    alive = weakref.ref(module)
    for bound_by_lightning in ("log", "log_dict"):
        vars(callback).pop(bound_by_lightning)
    del module
    gc.collect()
    assert alive() is None


# -- other callbacks -------------------------------------------------------------------------------------------------


class Backboned(Classifier):
    def __init__(self) -> None:
        super().__init__("encoder")
        self.backbone = self.net.encoder

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen")
@pytest.mark.filterwarnings("ignore:The provided params to be freezed")
@pytest.mark.parametrize("learnable", [True, False])
def test_lightnings_finetuning(learnable: bool, tmp_path: Path) -> None:
    """It maps every parameter in the optimizer to its name in the module, and finds no other there."""
    module, callback = Backboned(), SigmaReparam(learnable_gain=learnable)
    frozen = weights(module)
    finetuning = BackboneFinetuning(2, lambda epoch: 1.5, verbose=False)
    first: dict[str, Tensor] = {}

    def note(t: Trainer, m: LightningModule) -> None:
        if t.current_epoch == 1:
            first.update(weights(m))

    t = trainer(tmp_path, finetuning, callback, Do(on_train_epoch_end=note), max_steps=-1, max_epochs=4)
    with pytest.warns(UserWarning, match=r"leaves \d+ weight\(s\) alone: net.encoder.*frozen") as caught:
        t.fit(module, loader())
    assert sum("alone" in str(w.message) for w in caught) == 1
    assert set(transforms(callback)) == {"net.embed.weight", "net.head.weight"}
    inside = [name for name in frozen if name.startswith("net.encoder")]
    assert not differing({n: frozen[n] for n in inside}, {n: first[n] for n in inside})
    moved = weights(module)
    assert all(n in differing(frozen, moved) for n in inside if n.endswith("weight"))


def test_unfreezing_in_hooks_of_the_module(tmp_path: Path) -> None:
    """The way the refusal points to: everything in the optimizer, ``requires_grad`` switched on later."""

    class Unfreezes(Classifier):
        def on_fit_start(self) -> None:
            self.net.encoder.requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.net.encoder.requires_grad_(self.current_epoch > 0)

    module, callback = Unfreezes("encoder"), SigmaReparam()
    frozen, first = weights(module), {}

    def note(t: Trainer, m: LightningModule) -> None:
        if t.current_epoch == 0:
            first.update(weights(m))

    trainer(tmp_path, callback, Do(on_train_epoch_end=note), max_steps=-1, max_epochs=2).fit(module, loader())
    assert "net.encoder.layers.0.linear1.weight" in transforms(callback)
    inside = [name for name in frozen if name.startswith("net.encoder")]
    assert not differing({n: frozen[n] for n in inside}, {n: first[n] for n in inside}), "no gradient, no change"
    assert set(inside) <= set(differing(first, weights(module)))


def test_batch_size_finder(tmp_path: Path) -> None:
    class Sized(Classifier):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return DataLoader(loader(8).dataset, batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return loader(1)

        def configure_optimizers(self) -> Any:
            return adamw(self)

    results = []
    for find in (True, False):
        module = Sized("encoder")
        more = [BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=2)] if find else []
        module.batch_size = 2 if find else results[0][1]
        t = trainer(tmp_path, one(), *more, max_steps=4)
        t.fit(module)
        results.append((weights(module), module.batch_size))
    assert results[0][1] > 2
    assert not differing(results[0][0], results[1][0])


# -- parameter groups ------------------------------------------------------------------------------------------------


def by_name(m: nn.Module) -> list[dict[str, Any]]:
    bare = [p for n, p in m.named_parameters() if "bias" in n or "norm" in n]
    rest = [p for n, p in m.named_parameters() if not ("bias" in n or "norm" in n)]
    return [{"params": rest, "weight_decay": 0.1, "lr": 0.01}, {"params": bare, "weight_decay": 0.0, "lr": 0.02}]


def by_ndim(m: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in m.parameters() if p.ndim > 1], "weight_decay": 0.1, "lr": 0.01},
        {"params": [p for p in m.parameters() if p.ndim <= 1], "weight_decay": 0.0, "lr": 0.02},
    ]


def by_type(m: nn.Module) -> list[dict[str, Any]]:
    """minGPT's: every parameter is in exactly one of the two sets."""
    decay, rest = {}, {}
    for module_name, module in m.named_modules():
        for name, p in module.named_parameters(recurse=False):
            kind = isinstance(module, (nn.Linear, nn.MultiheadAttention)) and name.endswith("weight")
            (decay if kind else rest)[f"{module_name}.{name}"] = p
    assert len(decay) + len(rest) == len(list(m.named_parameters()))
    return [
        {"params": list(decay.values()), "weight_decay": 0.1, "lr": 0.01},
        {"params": list(rest.values()), "weight_decay": 0.0, "lr": 0.02},
    ]


def by_attribute(m: Any) -> list[dict[str, Any]]:
    """Layer-wise rates, found by attribute access, and ``nn.init`` on the way."""
    nn.init.normal_(m.net.head.weight, std=0.1)
    layers = [m.net.embed, *m.net.encoder.layers, m.net.head]
    return [
        {"params": list(layer.parameters()), "lr": 0.01 * 0.7**i, "weight_decay": 0.1} for i, layer in enumerate(layers)
    ]


@pytest.mark.parametrize("grouping", [by_name, by_ndim, by_type, by_attribute])
@pytest.mark.parametrize("schedule", ["cosine", "own"])
def test_gains_follow_their_weights_in_any_grouping(grouping: Any, schedule: str, tmp_path: Path) -> None:
    class Triangle(torch.optim.lr_scheduler.LRScheduler):
        """A scheduler of the user's own."""

        def get_lr(self) -> list[float]:
            phase = abs((self.last_epoch % 8) - 4) / 4
            return [base * (0.1 + phase) for base in self.base_lrs]

    def configure(m: Any) -> Any:
        assert not [n for n, _ in m.named_parameters() if "gain" in n or "parametrizations" in n]
        optimizer = torch.optim.AdamW(grouping(m))
        cosine = schedule == "cosine"
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20) if cosine else Triangle(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    rates: dict[bool, list[list[float]]] = {True: [], False: []}
    placed: dict[str, Any] = {}
    for on in (True, False):
        callback = SigmaReparam(enabled=on)

        def note(t: Trainer, m: LightningModule, on: bool = on, callback: SigmaReparam = callback) -> None:
            rates[on].append([g["lr"] for g in t.optimizers[0].param_groups])

        def inside(t: Trainer, m: LightningModule, callback: SigmaReparam = callback) -> None:
            home = {id(p): g for g in t.optimizers[0].param_groups for p in g["params"]}
            for name, transform in transforms(callback).items():
                mine, weights_own = home[id(transform.theta)], home[id(m.get_parameter(name))]
                placed[name] = (mine["weight_decay"], mine["lr"] == weights_own["lr"], mine is weights_own)

        t = trainer(tmp_path, callback, Do(on_train_batch_start=note, on_before_optimizer_step=inside), max_steps=20)
        t.fit(with_optimizers(configure, "encoder"), loader(20))
    assert set(placed.values()) == {(0.0, True, False)}
    assert len(placed) == 10
    assert len(rates[True]) == 20
    assert rates[True] == rates[False], "between steps the groups are the user's own"
    assert len({step[0] for step in rates[True]}) > 4
