"""The scenarios of the battery: each trains a fresh module with the callback on and asserts one promise."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader

from lightning_efficient.deploy.export import export
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.load import load_from_checkpoint
from lightning_efficient.testing.case import Case, Dealt, FixedStatistics
from lightning_efficient.testing.checks import (
    assert_close,
    assert_equal,
    assert_finite,
    assert_moved,
    assert_resume_exact,
    check_optimizer,
    inner,
    plain_state,
    saved,
)


def plain(case: Case) -> None:
    """Train, save, load without the package (if it folds) and with it, evaluate, export."""
    untouched = case.modules["plain"]()
    trainer, module = case.fit()
    check_optimizer(trainer, module)
    path = case.root / "plain.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert recipe.read(content), "the checkpoint carries no recipe"
    assert_moved(untouched, module)
    x = next(iter(case.data()))[0]
    module.eval()
    with torch.no_grad():
        expected = module(x)
        if case.folds:
            assert set(content["state_dict"]) == set(untouched.state_dict()), "the file's keys are not the user's"
            stock = type(module).load_from_checkpoint(path)
            stock.eval()
            assert_equal({"stock": stock(x)}, {"stock": expected})
        ours = load_from_checkpoint(type(module), path)
        ours.eval()
        assert_equal({"ours": ours(x)}, {"ours": expected})
    with_us = case.trainer().test(module, case.data(), verbose=False)
    if case.folds:
        bare = case.trainer(with_callback=False)
        assert bare.test(case.modules["plain"](), case.data(), ckpt_path=path, verbose=False) == with_us
    exported = export(module, (x,))
    assert not [m for m in exported.modules() if type(m).__module__.startswith("lightning_efficient")]


def disabled(case: Case) -> None:
    """``enabled=False``: bit-identical to a run without the callback, random state included."""
    off = case.ours()
    for callback in off:
        callback.enabled = False
    torch.manual_seed(1)
    _, a = case.fit("plain", *off)
    after_a = torch.get_rng_state()
    torch.manual_seed(1)
    _, b = case.fit("plain", with_callback=False)
    assert_equal(a.state_dict(), b.state_dict())
    assert torch.equal(after_a, torch.get_rng_state()), "a disabled callback drew random numbers"
    assert not any("lightning_efficient" in str(getattr(v, "__module__", "")) for v in a.__dict__.values())


def rng(case: Case) -> None:
    """An enabled callback leaves the global random state alone when it starts."""
    states = []
    for with_callback in (True, False):
        torch.manual_seed(1)
        trainer = case.trainer(with_callback=with_callback, max_steps=0)
        case.train(trainer, case.modules["plain"](), case.data())
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "surgery shifted the user's random stream"


def accumulation(case: Case) -> None:
    """Accumulating four batches equals one batch of the four (float64)."""
    results = []
    for size, accumulate in ((2, 4), (8, 1)):
        module = case.modules["plain"]().double()
        trainer = case.trainer(
            *case.ours(),
            FixedStatistics(),
            accumulate_grad_batches=accumulate,
            precision="64-true",
            max_steps=4,
        )
        case.train(trainer, module, case.data(4 * accumulate, size, torch.float64))
        assert trainer.global_step == 4
        results.append(module.state_dict())
    assert_close(results[0], results[1], 1e-9)


def clipping(case: Case) -> None:
    """The norm is clipped on what the optimizer sees, the method's own parameters included."""
    seen: list[float] = []

    class Probe(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            if grads:
                seen.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))))

    _, module = case.fit("plain", *case.ours(), Probe(), gradient_clip_val=0.01)
    assert seen, "the probe saw no gradients"
    assert max(seen) <= 0.01 * (1 + 1e-4), f"gradient norm {max(seen)} after clipping to 0.01"
    assert_finite(module)


def bf16_mixed(case: Case) -> None:
    """Runs under autocast, with weights and the method's state in float32."""
    trainer, module = case.fit("plain", precision="bf16-mixed")
    assert_finite(module)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    content = saved(trainer, case)
    for entry in recipe.read(content):
        for name, group in entry.tensors.items():
            assert all(t.dtype == torch.float32 for t in group.values() if t.is_floating_point()), name


def bf16_true(case: Case) -> None:
    """Low-precision weights are trained from kept raw values, and resume exactly."""
    assert_resume_exact(case, precision="bf16-true")


def compile(case: Case) -> None:
    """``torch.compile`` builds as many graphs as without the callback, and trains to the same weights."""
    graphs, results = [], []
    for with_callback, compiled in ((True, True), (False, True), (True, False)):
        torch.compiler.reset()
        count = [0]

        def backend(gm: Any, inputs: Any, count: list[int] = count) -> Any:
            count[0] += 1
            return gm.forward

        module = case.modules["plain"]()
        net = inner(module)
        if compiled:
            net.forward = torch.compile(net.forward, backend=backend)
        case.train(case.trainer(with_callback=with_callback), module, case.data())
        if compiled:
            graphs.append(count[0])
        if with_callback:
            results.append({k: v for k, v in module.state_dict().items() if "_orig_mod" not in k})
    more = graphs[0] - graphs[1]
    assert graphs[1] > 0, "nothing was compiled"
    assert more <= case.more_graphs, f"{graphs[0]} graphs with the callback, {graphs[1]} without"
    assert_close(results[0], results[1], 1e-5)


def checkpointing(case: Case) -> None:
    """Activation checkpointing changes nothing (float64)."""
    results = []
    for variant in ("plain", "checkpointing"):
        module = case.modules[variant]().double()
        trainer = case.trainer(*case.ours(), FixedStatistics(), precision="64-true")
        case.train(trainer, module, case.data(dtype=torch.float64))
        results.append(module.state_dict())
    assert_close(results[0], results[1], 1e-9)


def ema_before(case: Case) -> None:
    """``WeightAveraging`` listed before the callback."""
    _ema(case, first=True)


def ema_after(case: Case) -> None:
    """``WeightAveraging`` listed after the callback."""
    _ema(case, first=False)


def _ema(case: Case, first: bool) -> None:
    def callbacks() -> tuple[Callback, ...]:
        ema = WeightAveraging(avg_fn=get_ema_avg_fn(0.8))  # type: ignore[no-untyped-call]
        return (ema, *case.ours()) if first else (*case.ours(), ema)

    assert_resume_exact(case, callbacks=callbacks)
    trainer, module = case.fit("plain", *callbacks())
    path = case.root / "ema.ckpt"
    trainer.save_checkpoint(path)
    if case.folds:
        stock = type(module).load_from_checkpoint(path)
        assert_equal(stock.state_dict(), plain_state(module))


def swa(case: Case) -> None:
    """``StochasticWeightAveraging`` ends with finite weights under the user's keys."""
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1)
    trainer = case.trainer(*case.ours(), averaging, max_steps=-1, max_epochs=4)
    module = case.modules["plain"]()
    case.train(trainer, module, case.data())
    assert_finite(module)
    if case.folds:
        assert set(saved(trainer, case)["state_dict"]) == set(case.modules["plain"]().state_dict())


def manual(case: Case) -> None:
    """Manual optimization with two optimizers: each steps its own weights, resume is exact."""
    trainer, module = case.fit("manual")
    check_optimizer(trainer, module)
    assert_resume_exact(case, variant="manual", steps=2 * case.steps)


def prebuilt_optimizer(case: Case) -> None:
    """An optimizer that exists before the Trainer does, as LightningCLI builds it, trains the same weights."""
    results = []
    for variant in ("plain", "prebuilt_optimizer"):
        trainer, module = case.fit(variant)
        check_optimizer(trainer, module)
        results.append(module.state_dict())
    assert_equal(results[0], results[1])


def configure_model(case: Case) -> None:
    """A model made in ``configure_model`` is covered like one made in ``__init__``."""
    _same_as_plain(case, "configure_model")


def setup(case: Case) -> None:
    """A model made in ``setup`` is covered like one made in ``__init__``."""
    _same_as_plain(case, "setup")


def _same_as_plain(case: Case, variant: str) -> None:
    _, a = case.fit("plain")
    _, b = case.fit(variant)
    assert_equal(a.state_dict(), b.state_dict())


def ddp(case: Case) -> None:
    """Two processes (gloo) end with the same weights as one process on both batches (float64)."""
    _distributed(case, "ddp_fork")


def ddp_spawn(case: Case) -> None:
    """The parent of spawned processes ends with the trained weights."""
    _distributed(case, "ddp_spawn")


def _distributed(case: Case, strategy: str) -> None:
    results = []
    whole = case.data(size=8, dtype=torch.float64)
    two: dict[str, Any] = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
    for processes, more in ((1, {}), (2, two)):
        module = case.modules["plain"]().double()
        trainer = case.trainer(*case.ours(), FixedStatistics(), precision="64-true", **more)
        # Each process gets its half of every batch of eight.
        dealt = DataLoader(whole.dataset, 8 // processes, sampler=Dealt(8 * case.steps, processes))
        trainer.fit(module, dealt, dealt)
        results.append(plain_state(module))
    assert_close(results[0], results[1], 1e-9)


def resume(case: Case) -> None:
    """Stopped and resumed equals uninterrupted, ``torch.equal`` on every tensor; a run of steps, and one of epochs."""
    assert_resume_exact(case)
    assert_resume_exact(case, max_epochs=1)


def fit_twice_then_test(case: Case) -> None:
    """``fit``, ``fit`` again, ``test``: applied once, the function kept between the runs."""
    ours = case.ours()
    trainer, module = case.fit("plain", *ours)
    before = trainer.test(module, case.data(), verbose=False)
    case.train(case.trainer(*ours, max_steps=0), module, case.data())
    assert trainer.test(module, case.data(), verbose=False) == before, "starting a second fit changed the function"
    again = case.trainer(*ours)
    case.train(again, module, case.data())
    check_optimizer(again, module)
    again.test(module, case.data(), verbose=False)


def weights_only(case: Case) -> None:
    """A weights-only file evaluates to the same numbers."""
    trainer, module = case.fit()
    path = case.root / "weights.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    expected = trainer.test(module, case.data(), verbose=False)
    assert case.trainer().test(case.modules["plain"](), case.data(), ckpt_path=path, verbose=False) == expected


def copy_and_pickle(case: Case) -> None:
    """A trained module can be deep-copied and saved whole."""
    _, module = case.fit()
    clone = deepcopy(module)
    assert_equal(clone.state_dict(), module.state_dict())
    torch.save(clone, io.BytesIO())


SCENARIOS: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        plain, disabled, rng, accumulation, clipping, bf16_mixed, bf16_true, compile, checkpointing, ema_before,
        ema_after, swa, manual, prebuilt_optimizer, configure_model, setup, ddp, ddp_spawn, resume,
        fit_twice_then_test, weights_only, copy_and_pickle,
    )
}  # fmt: skip
