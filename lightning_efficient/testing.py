"""The life-cycle battery: does a callback keep its promises on a model, from apply to export?

Our own CI runs it as a table method × model × scenario; use the same function for a callback or a model of your own::

    assert_method_contract(SigmaReparam, {"plain": MyModule}, make_loader)
"""

from __future__ import annotations

import io
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader

from lightning_efficient import recipe
from lightning_efficient.callbacks.base import EfficientCallback
from lightning_efficient.checkpoint import load_from_checkpoint
from lightning_efficient.export import export

Loader = DataLoader[Any]


class ResumableLoader:
    """The batches of another loader, which continue where a checkpoint left them."""

    def __init__(self, loader: Loader) -> None:
        self.batches = list(loader)
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.position = self.position, 0
        for i in range(start, len(self.batches)):
            self.position = (i + 1) % len(self.batches)
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        """Where to continue."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there."""
        self.position = state["position"]


@dataclass
class Case:
    """One cell of the table.

    Args:
        callback: Makes the callback.
        modules: Variant → makes a fresh module with the same initial weights each time. ``"plain"`` is required; the
            scenarios ``configure_model``, ``setup``, ``checkpointing``, ``manual`` and ``prebuilt_optimizer`` use the
            variant of their name.
        loader: ``loader(batches, size, dtype)`` makes a data loader without shuffling.
        root: Folder for checkpoints.
        folds: Whether the method's checkpoints are plain: loadable without this package.
        steps: Optimizer steps a run takes.
    """

    callback: Callable[[], EfficientCallback]
    modules: Mapping[str, Callable[[], LightningModule]]
    loader: Callable[[int, int, torch.dtype], Loader]
    root: Path
    folds: bool = True
    steps: int = 6
    exact: bool = True
    fit_kwargs: dict[str, Any] = field(default_factory=dict)

    def trainer(self, *extra: Callback, with_callback: bool = True, **kwargs: Any) -> Trainer:
        """A quiet CPU Trainer with the callback first, unless ``extra`` contains one already."""
        callbacks = list(extra)
        if with_callback and not any(isinstance(cb, EfficientCallback) for cb in callbacks):
            callbacks.insert(0, self.callback())
        defaults: dict[str, Any] = {
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": self.root,
            "max_steps": self.steps, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        }  # fmt: skip
        return Trainer(callbacks=callbacks, **{**defaults, **kwargs})

    def data(self, batches: int | None = None, size: int = 4, dtype: torch.dtype = torch.float32) -> Loader:
        """As many batches as a run has steps, unless said otherwise."""
        return self.loader(self.steps if batches is None else batches, size, dtype)

    def train(
        self, trainer: Trainer, module: LightningModule, data: Loader | ResumableLoader, **kwargs: Any
    ) -> None:
        """``trainer.fit`` with a validation batch."""
        dtype = next(iter(data))[0].dtype if isinstance(data, DataLoader) else torch.float32
        trainer.fit(module, data, self.loader(1, 4, dtype), **kwargs)

    def fit(self, variant: str = "plain", *extra: Callback, **kwargs: Any) -> tuple[Trainer, LightningModule]:
        """A fresh module of the variant, trained."""
        module = self.modules[variant]()
        trainer = self.trainer(*extra, **kwargs)
        self.train(trainer, module, self.data())
        return trainer, module


# -- scenarios -------------------------------------------------------------------------------------------------------


def plain(case: Case) -> None:
    """Train, save, load without the package (if it folds) and with it, evaluate, export."""
    untouched = case.modules["plain"]()
    trainer, module = case.fit()
    _check_optimizer(trainer, module)
    path = case.root / "plain.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert recipe.read(content), "the checkpoint carries no recipe"
    _assert_moved(untouched, module)
    x = next(iter(case.data()))[0]
    module.eval()
    with torch.no_grad():
        expected = module(x)
        if case.folds:
            assert set(content["state_dict"]) == set(untouched.state_dict()), "the file's keys are not the user's"
            stock = type(module).load_from_checkpoint(path)
            stock.eval()
            _assert_equal({"stock": stock(x)}, {"stock": expected})
        ours = load_from_checkpoint(type(module), path)
        ours.eval()
        _assert_equal({"ours": ours(x)}, {"ours": expected})
    with_us = case.trainer().test(module, case.data(), verbose=False)
    if case.folds:
        bare = case.trainer(with_callback=False)
        assert bare.test(case.modules["plain"](), case.data(), ckpt_path=path, verbose=False) == with_us
    exported = export(module, (x,))
    assert not [m for m in exported.modules() if type(m).__module__.startswith("lightning_efficient")]


def disabled(case: Case) -> None:
    """``enabled=False``: bit-identical to a run without the callback, random state included."""
    off = case.callback()
    off.enabled = False
    torch.manual_seed(1)
    _, a = case.fit("plain", off)
    after_a = torch.get_rng_state()
    torch.manual_seed(1)
    _, b = case.fit("plain", with_callback=False)
    _assert_equal(a.state_dict(), b.state_dict())
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
        trainer = case.trainer(accumulate_grad_batches=accumulate, precision="64-true", max_steps=4)
        case.train(trainer, module, case.data(4 * accumulate, size, torch.float64))
        assert trainer.global_step == 4
        results.append(module.state_dict())
    _assert_close(*results, 1e-9)


def clipping(case: Case) -> None:
    """The norm is clipped on what the optimizer sees, the method's own parameters included."""
    seen: list[float] = []

    class Probe(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            if grads:
                seen.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))))

    _, module = case.fit("plain", case.callback(), Probe(), gradient_clip_val=0.01)
    assert seen, "the probe saw no gradients"
    assert max(seen) <= 0.01 * (1 + 1e-4), f"gradient norm {max(seen)} after clipping to 0.01"
    _assert_finite(module)


def bf16_mixed(case: Case) -> None:
    """Runs under autocast, with weights and the method's state in float32."""
    trainer, module = case.fit("plain", precision="bf16-mixed")
    _assert_finite(module)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    content = _saved(trainer, case)
    for entry in recipe.read(content):
        for name, group in entry.tensors.items():
            assert all(t.dtype == torch.float32 for t in group.values() if t.is_floating_point()), name


def bf16_true(case: Case) -> None:
    """Low-precision weights are trained from kept raw values, and resume exactly."""
    _assert_resume_exact(case, precision="bf16-true")


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
        net = _inner(module)
        if compiled:
            net.forward = torch.compile(net.forward, backend=backend)  # type: ignore[method-assign]
        case.train(case.trainer(with_callback=with_callback), module, case.data())
        if compiled:
            graphs.append(count[0])
        if with_callback:
            results.append({k: v for k, v in module.state_dict().items() if "_orig_mod" not in k})
    assert graphs[0] == graphs[1] > 0, f"{graphs[0]} graphs with the callback, {graphs[1]} without"
    _assert_close(*results, 1e-5)


def checkpointing(case: Case) -> None:
    """Activation checkpointing changes nothing (float64)."""
    results = []
    for variant in ("plain", "checkpointing"):
        module = case.modules[variant]().double()
        case.train(case.trainer(precision="64-true"), module, case.data(dtype=torch.float64))
        results.append(module.state_dict())
    _assert_close(*results, 1e-9)


def ema_before(case: Case) -> None:
    """``WeightAveraging`` listed before the callback."""
    _ema(case, first=True)


def ema_after(case: Case) -> None:
    """``WeightAveraging`` listed after the callback."""
    _ema(case, first=False)


def _ema(case: Case, first: bool) -> None:
    def callbacks() -> tuple[Callback, Callback]:
        ema, ours = WeightAveraging(avg_fn=get_ema_avg_fn(0.8)), case.callback()  # type: ignore[no-untyped-call]
        return (ema, ours) if first else (ours, ema)

    _assert_resume_exact(case, callbacks=callbacks)
    trainer, module = case.fit("plain", *callbacks())
    path = case.root / "ema.ckpt"
    trainer.save_checkpoint(path)
    if case.folds:
        stock = type(module).load_from_checkpoint(path)
        _assert_equal(stock.state_dict(), module.state_dict())


def swa(case: Case) -> None:
    """``StochasticWeightAveraging`` ends with finite weights under the user's keys."""
    ours = case.callback()
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1)
    trainer = case.trainer(ours, averaging, max_steps=-1, max_epochs=4)
    module = case.modules["plain"]()
    case.train(trainer, module, case.data())
    _assert_finite(module)
    if case.folds:
        assert set(_saved(trainer, case)["state_dict"]) == set(case.modules["plain"]().state_dict())


def manual(case: Case) -> None:
    """Manual optimization with two optimizers: each steps its own weights, resume is exact."""
    trainer, module = case.fit("manual")
    _check_optimizer(trainer, module)
    _assert_resume_exact(case, variant="manual", steps=2 * case.steps)


def prebuilt_optimizer(case: Case) -> None:
    """An optimizer that exists before the Trainer does, as LightningCLI builds it, trains the same weights."""
    results = []
    for variant in ("plain", "prebuilt_optimizer"):
        trainer, module = case.fit(variant)
        _check_optimizer(trainer, module)
        results.append(module.state_dict())
    _assert_equal(*results)


def configure_model(case: Case) -> None:
    """A model made in ``configure_model`` is covered like one made in ``__init__``."""
    _same_as_plain(case, "configure_model")


def setup(case: Case) -> None:
    """A model made in ``setup`` is covered like one made in ``__init__``."""
    _same_as_plain(case, "setup")


def _same_as_plain(case: Case, variant: str) -> None:
    _, a = case.fit("plain")
    _, b = case.fit(variant)
    _assert_equal(a.state_dict(), b.state_dict())


def ddp(case: Case) -> None:
    """Two processes (gloo) end with the same weights as one process on both batches (float64)."""
    _distributed(case, "ddp_fork")


def ddp_spawn(case: Case) -> None:
    """The parent of spawned processes ends with the trained weights."""
    _distributed(case, "ddp_spawn")


def _distributed(case: Case, strategy: str) -> None:
    one = case.modules["plain"]().double()
    case.train(case.trainer(precision="64-true"), one, case.data(size=8, dtype=torch.float64))
    two = case.modules["plain"]().double()
    # A distributed sampler deals samples out like cards: hand each process its half of every batch of eight.
    trainer = case.trainer(precision="64-true", strategy=strategy, devices=2)
    case.train(trainer, two, case.data(2 * case.steps, 4, torch.float64))
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in one.modules()):
        _assert_close(one.state_dict(), two.state_dict(), 1e-9)
    _assert_moved(case.modules["plain"]().double(), two)


def resume(case: Case) -> None:
    """Stopped and resumed equals uninterrupted, ``torch.equal`` on every tensor of the checkpoint."""
    _assert_resume_exact(case)


def fit_twice_then_test(case: Case) -> None:
    """``fit``, ``fit`` again, ``test``: applied once, the function kept between the runs."""
    trainer, module = case.fit()
    before = trainer.test(module, case.data(), verbose=False)
    callback = trainer.callbacks[0]  # type: ignore[attr-defined]
    case.train(case.trainer(callback, max_steps=0), module, case.data())
    assert trainer.test(module, case.data(), verbose=False) == before, "starting a second fit changed the function"
    again = case.trainer(callback)
    case.train(again, module, case.data())
    _check_optimizer(again, module)
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
    _assert_equal(clone.state_dict(), module.state_dict())
    torch.save(clone, io.BytesIO())


SCENARIOS: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        plain, disabled, rng, accumulation, clipping, bf16_mixed, bf16_true, compile, checkpointing, ema_before,
        ema_after, swa, manual, prebuilt_optimizer, configure_model, setup, ddp, ddp_spawn, resume,
        fit_twice_then_test, weights_only, copy_and_pickle,
    )
}  # fmt: skip


def assert_method_contract(
    callback: Callable[[], EfficientCallback],
    modules: Mapping[str, Callable[[], LightningModule]],
    loader: Callable[[int, int, torch.dtype], Loader],
    *,
    folds: bool = True,
    scenarios: Sequence[str] | None = None,
    refused: Mapping[str, str] | None = None,
    root: Path | None = None,
) -> dict[str, str]:
    """Run the battery for one callback on one model.

    Args:
        callback: Makes the callback.
        modules: Variant → makes a fresh module, with the same initial weights each time; see :class:`Case`.
        loader: ``loader(batches, size, dtype)`` makes a data loader without shuffling.
        folds: Whether the method's checkpoints are loadable without this package.
        scenarios: Names from :data:`SCENARIOS`; None: all whose variant is given.
        refused: Scenario → pattern of the error with which the method refuses it.
        root: Folder for checkpoints; None: a temporary one.

    Returns:
        Scenario → ``"passed"``, ``"refused: <message>"`` or ``"no <variant> variant given"``.

    Raises:
        AssertionError: A promise is not kept.
    """
    table: dict[str, str] = {}
    for name in scenarios if scenarios is not None else SCENARIOS:
        needs = name if name in _VARIANTS else "plain"
        if needs not in modules:
            table[name] = f"no {needs!r} variant given"
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            for advice in _ADVICE:
                warnings.filterwarnings("ignore", advice)
            case = Case(callback, modules, loader, root or Path(folder), folds)
            pattern = (refused or {}).get(name)
            if pattern is None:
                SCENARIOS[name](case)
                table[name] = "passed"
            else:
                with _refusal(pattern) as message:
                    SCENARIOS[name](case)
                table[name] = f"refused: {message[0]}"
    return table


# What Lightning says about runs as short and plain as these.
_ADVICE = (
    ".*callbacks used to create the checkpoint need to be provided",
    "SWA is currently only supported every epoch",
    "Swapping scheduler",
    ".*does not have many workers",
)

_VARIANTS = ("configure_model", "setup", "checkpointing", "manual", "prebuilt_optimizer")


@contextmanager
def _refusal(pattern: str) -> Any:
    message: list[str] = []
    try:
        yield message
    except (ValueError, RuntimeError) as error:
        assert re.search(pattern, str(error)), f"refused with {error!r}, expected {pattern!r}"
        message.append(str(error))
    else:
        raise AssertionError(f"expected to be refused with {pattern!r}, but it ran")


# -- assertions ------------------------------------------------------------------------------------------------------


def _assert_resume_exact(
    case: Case,
    variant: str = "plain",
    callbacks: Callable[[], tuple[Callback, ...]] | None = None,
    steps: int | None = None,
    **kwargs: Any,
) -> None:
    make = callbacks or (lambda: (case.callback(),))
    total = steps or case.steps

    def run(max_steps: int, ckpt_path: Path | None = None) -> dict[str, Any]:
        trainer = case.trainer(*make(), max_steps=max_steps, **kwargs)
        torch.manual_seed(0)
        case.train(trainer, case.modules[variant](), ResumableLoader(case.data()), ckpt_path=ckpt_path)
        trainer.save_checkpoint(case.root / f"resume_{max_steps}.ckpt")
        return _flat(torch.load(case.root / f"resume_{max_steps}.ckpt", weights_only=True))

    class Halfway(Callback):
        """Saves in the middle of the epoch, as a run that is killed there has done."""

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == total // 2:
                trainer.save_checkpoint(case.root / "half.ckpt")

    trainer = case.trainer(*make(), Halfway(), max_steps=total, **kwargs)
    torch.manual_seed(0)
    case.train(trainer, case.modules[variant](), ResumableLoader(case.data()))
    trainer.save_checkpoint(case.root / "whole.ckpt")
    whole = _flat(torch.load(case.root / "whole.ckpt", weights_only=True))
    resumed = run(total, case.root / "half.ckpt")
    shared = {k for k in whole if isinstance(whole[k], Tensor)}
    assert shared == {k for k in resumed if isinstance(resumed[k], Tensor)}
    _assert_equal({k: whole[k] for k in shared}, {k: resumed[k] for k in shared})


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, item in items:
        out |= _flat(item, f"{prefix}/{key}")
    return out


def _saved(trainer: Trainer, case: Case) -> dict[str, Any]:
    trainer.save_checkpoint(case.root / "saved.ckpt")
    return dict(torch.load(case.root / "saved.ckpt", weights_only=True))


def _inner(module: LightningModule) -> nn.Module:
    return next(iter(module.children()))


def _check_optimizer(trainer: Trainer, module: LightningModule) -> None:
    held = [id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)), "a parameter is in the optimizers twice"
    names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    assert not names, f"in no optimizer: {names}"


def _assert_moved(before: nn.Module, after: nn.Module) -> None:
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    still = [n for n in old if n in new and new[n].grad is not None and torch.equal(old[n], new[n])]
    assert not still, f"never trained: {still}"


def _assert_finite(module: nn.Module) -> None:
    bad = [name for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
    assert not bad, f"not finite: {bad}"


def _assert_equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    assert a.keys() == b.keys(), f"names differ: {sorted(a.keys() ^ b.keys())[:6]}"
    bad = [k for k in a if isinstance(a[k], Tensor) and not torch.equal(a[k], b[k])]
    assert not bad, f"differ: {bad[:6]} ({len(bad)} of {len(a)})"


def _assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], bound: float) -> None:
    assert a.keys() == b.keys(), f"names differ: {sorted(a.keys() ^ b.keys())[:6]}"
    worst = {k: float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel()}
    name = max(worst, key=lambda k: worst[k])
    assert worst[name] <= bound, f"{name} differs by {worst[name]:.2e}, allowed {bound:.0e}"
