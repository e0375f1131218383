"""Scenarios of the battery about how a run came to be: what it resumes from, and what it must not believe.

Each compares with a fresh instance on a fresh model, or asserts that a fit begins with the network that was left: the
same outputs, the same zeros. What a history does to a schedule is read off the callback's ``standing``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.lifecycle.load import load_from_checkpoint
from lightning_efficient.testing.case import Case, Dealt, FixedStatistics, Loader, ResumableLoader
from lightning_efficient.testing.checks import assert_close, assert_equal, assert_finite, flat, plain_state


class _AtStart(Callback):
    """What the network computes, and where it is zero, before the first step of a fit."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.outputs: list[Tensor] = []
        self.zeros: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look, once a fit."""
        if not self.outputs:
            self.outputs.append(_outputs(pl_module, self.x))
            self.zeros = _zeros(pl_module)


def _outputs(module: LightningModule, x: Tensor) -> Tensor:
    modes = [(m, m.training) for m in module.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            out: Tensor = module.eval()(x)
    finally:
        for part, training in modes:
            part.training = training
    return out.clone()


def _zeros(module: LightningModule) -> dict[str, Tensor]:
    """Matrices of the network as it is used → where they are zero."""
    return {name: t == 0 for name, t in plain_state(module).items() if isinstance(t, Tensor) and t.ndim > 1}


def _assert_still_zero(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    grown = {n: int((where & ~after[n]).sum()) for n, where in before.items() if n in after and where.any()}
    assert not any(grown.values()), f"zeros that grew again: { {n: k for n, k in grown.items() if k} }"


def _goes_on(case: Case, trainer: Trainer, module: LightningModule, probe: _AtStart, expected: Tensor) -> None:
    """A fit of a module that has been trained before begins with its function and keeps its zeros."""
    zeros = _zeros(module)
    case.train(trainer, module, case.data())
    assert probe.outputs, "nothing was trained"
    difference = float((probe.outputs[0].double() - expected.double()).abs().max())
    scale = float(expected.abs().max())
    assert difference <= 1e-5 * scale, f"the fit began with another function: {difference:.2g} of {scale:.2g}"
    _assert_still_zero(zeros, _zeros(module))
    assert_finite(module)


def _finished(case: Case) -> tuple[Path, LightningModule]:
    """The file of a whole run, and its module."""
    path = case.root / "finished.ckpt"
    torch.manual_seed(0)
    module = case.modules["plain"]()
    trainer = case.trainer(*case.ours())
    case.train(trainer, module, ResumableLoader(case.data()))
    trainer.save_checkpoint(path)
    return path, module


def _half(case: Case, steps: int) -> Path:
    """The file of a run in its middle."""
    path = case.root / "half.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == steps:
                trainer.save_checkpoint(path)

    torch.manual_seed(0)
    case.train(case.trainer(*case.ours(), Save()), case.modules["plain"](), ResumableLoader(case.data()))
    return path


@contextmanager
def _quietly(*patterns: str) -> Iterator[None]:
    """Without warnings that a history makes rightly."""
    with warnings.catch_warnings():
        for pattern in patterns:
            warnings.filterwarnings("ignore", pattern)
        yield


def second_fit(case: Case) -> None:
    """``fit``, and ``fit`` again with the same instance: what is done holds, and no zero grows again."""
    ours = case.ours()
    _, module = case.fit("plain", *ours)
    probe = _AtStart(next(iter(case.data()))[0])
    _goes_on(case, case.trainer(*ours, probe), module, probe, _outputs(module, probe.x))


def second_model(case: Case) -> None:
    """The same instance with a second model (a sweep, folds) trains it as a fresh instance would."""
    ours = case.ours()
    case.fit("plain", *ours)
    _, second = case.fit("plain", *ours)
    _, fresh = case.fit("plain")
    assert_equal(second.state_dict(), fresh.state_dict())


def second_model_same_trainer(case: Case) -> None:
    """The same Trainer goes on with a second model: its schedules count this fit's steps."""
    trainer = case.trainer(*case.ours(), max_steps=-1, max_epochs=1)
    case.train(trainer, case.modules["plain"](), case.data())
    trainer.fit_loop.max_epochs = 2
    second = case.modules["plain"]()
    case.train(trainer, second, case.data())
    _, fresh = case.fit("plain", max_steps=-1, max_epochs=1)
    assert_equal(second.state_dict(), fresh.state_dict())


def validated_then_fit(case: Case) -> None:
    """``validate(ckpt_path=...)`` of a finished run, then ``fit``: a new run of the network in the file."""
    path, trained = _finished(case)
    ours, module = case.ours(), case.modules["plain"]()
    case.trainer(*ours).validate(module, case.data(1), ckpt_path=path, verbose=False)
    probe = _AtStart(next(iter(case.data()))[0])
    _goes_on(case, case.trainer(*ours, probe), module, probe, _outputs(trained, probe.x))


def loaded_then_fit(case: Case) -> None:
    """``load_from_checkpoint`` of a finished run, then ``fit``, with the callback and without."""
    path, trained = _finished(case)
    probe = _AtStart(next(iter(case.data()))[0])
    expected = _outputs(trained, probe.x)
    module = load_from_checkpoint(type(trained), path)
    assert_equal({"loaded": _outputs(module, probe.x)}, {"loaded": expected})
    _goes_on(case, case.trainer(*case.ours(), probe), module, probe, expected)
    # Trained on without the callback, it is saved and loaded again.
    module, again = load_from_checkpoint(type(trained), path), case.root / "again.ckpt"
    with _quietly(".*no callback of this run holds what is zero"):
        bare = case.trainer(with_callback=False)
        case.train(bare, module, case.data())
    bare.save_checkpoint(again)
    reloaded = load_from_checkpoint(type(trained), again)
    assert_equal({"again": _outputs(reloaded, probe.x)}, {"again": _outputs(module, probe.x)})


class _Data(LightningDataModule):
    """The case's data as a finder needs it: a batch size that it may change."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.batch_size = case, 4

    def train_dataloader(self) -> Loader:
        """The same batches whatever is tried: Lightning trains on with the last size it tried, with us or without."""
        return self.case.data()

    def val_dataloader(self) -> Loader:
        """One batch."""
        return self.case.loader(1, 4, torch.float32)


def tuned(case: Case) -> None:
    """``Tuner.lr_find`` and ``Tuner.scale_batch_size`` before a fit leave no trace in it."""
    _, fresh = case.fit("plain")
    for tune in ("lr_find", "scale_batch_size"):
        ours, module, data = case.ours(), case.modules["plain"](), _Data(case)
        tuner = Tuner(case.trainer(*ours))
        with _quietly(".*LearningRateFinder runs before"):
            if tune == "lr_find":
                tuner.lr_find(module, datamodule=data, num_training=3, update_attr=False)
            else:
                tuner.scale_batch_size(module, datamodule=data, steps_per_trial=1, max_trials=1)
        case.train(case.trainer(*ours), module, case.data())
        assert_equal(module.state_dict(), fresh.state_dict())


def finders(case: Case) -> None:
    """``LearningRateFinder`` and ``BatchSizeFinder`` as callbacks, on either side of ours, leave no trace."""
    _, fresh = case.fit("plain")
    for first in (True, False):
        for finder in (
            LearningRateFinder(num_training_steps=3, update_attr=False),
            BatchSizeFinder(steps_per_trial=1, max_trials=1),
        ):
            listed = (finder, *case.ours()) if first else (*case.ours(), finder)
            module = case.modules["plain"]()
            with _quietly(".*LearningRateFinder runs before"):
                case.trainer(*listed).fit(module, datamodule=_Data(case))
            assert_equal(module.state_dict(), fresh.state_dict())


def nothing_left(case: Case) -> None:
    """Resuming a finished run with nothing left to train, and saving it, writes what was read."""
    path, again = case.root / "finished.ckpt", case.root / "again.ckpt"
    _finished(case)
    trainer = case.trainer(*case.ours())
    case.train(trainer, case.modules["plain"](), ResumableLoader(case.data()), ckpt_path=path)
    trainer.save_checkpoint(again)
    one, two = (torch.load(file, weights_only=True) for file in (path, again))
    for part in ("callbacks", recipe.KEY, "state_dict"):
        a, b = flat(one.get(part, {})), flat(two.get(part, {}))
        assert a.keys() == b.keys(), f"{part}: {sorted(a.keys() ^ b.keys())[:4]}"
        bad = [k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k])]
        assert not bad, f"{part}: {bad[:4]} differ"


def longer(case: Case) -> None:
    """A finished run goes on for more steps: what is done holds; one in its middle goes on in the steps it had."""
    path, trained = _finished(case)
    _continued(case, path, trained, max_steps=2 * case.steps)
    _unfinished(case, max_steps=2 * case.steps)


def other_batches(case: Case) -> None:
    """The same with batches twice as large, and so with half as many steps an epoch."""
    path, trained = _finished(case)
    _continued(case, path, trained, size=8, max_steps=2 * case.steps)
    _unfinished(case, size=8, max_steps=2 * case.steps)


def _continued(case: Case, path: Path, trained: LightningModule, size: int = 4, **kwargs: Any) -> None:
    ours, module = case.ours(), case.modules["plain"]()
    probe = _AtStart(next(iter(case.data()))[0])
    data = ResumableLoader(case.data(size=size))
    case.train(case.trainer(*ours, probe, **kwargs), module, data, ckpt_path=path)
    assert_close({"begins": probe.outputs[0]}, {"begins": _outputs(trained, probe.x)}, 1e-5)
    _assert_still_zero(_zeros(trained), _zeros(module))
    saved = torch.load(path, weights_only=True)["callbacks"]
    _assert_same_schedules(ours, saved)


def _unfinished(case: Case, size: int = 4, **kwargs: Any) -> None:
    half = _half(case, case.steps // 2)
    ours, module = case.ours(), case.modules["plain"]()
    case.train(case.trainer(*ours, **kwargs), module, ResumableLoader(case.data(size=size)), ckpt_path=half)
    saved = torch.load(half, weights_only=True)["callbacks"]
    _assert_same_schedules(ours, saved)


def _assert_same_schedules(callbacks: tuple[EfficientCallback, ...], saved: dict[str, Any]) -> None:
    for callback in (cb for cb in callbacks if cb.state_key in saved):
        before = saved[callback.state_key]["standing"]["schedule"]
        assert (before and tuple(before)) == callback.standing.schedule, "the schedule moved with the run's length"


def more_devices(case: Case) -> None:
    """A run that began on one device goes on in two processes, on the same batches (float64)."""
    results = []
    whole = case.data(size=8, dtype=torch.float64)
    path = case.root / "one_device.ckpt"
    dealt = DataLoader(whole.dataset, 8, sampler=Dealt(8 * case.steps, 1))
    trainer = case.trainer(*case.ours(), FixedStatistics(), precision="64-true", max_steps=-1, max_epochs=1)
    trainer.fit(case.modules["plain"]().double(), dealt, dealt)
    trainer.save_checkpoint(path)
    two: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    for processes, more in ((1, {}), (2, two)):
        module = case.modules["plain"]().double()
        trainer = case.trainer(*case.ours(), FixedStatistics(), precision="64-true", max_steps=-1, max_epochs=2, **more)
        dealt = DataLoader(whole.dataset, 8 // processes, sampler=Dealt(8 * case.steps, processes))
        trainer.fit(module, dealt, dealt, ckpt_path=path)
        results.append(plain_state(module))
    assert_close(results[0], results[1], 1e-9)


HISTORIES: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        second_fit, second_model, second_model_same_trainer, validated_then_fit, loaded_then_fit, tuned, finders,
        nothing_left, longer, other_batches, more_devices,
    )
}  # fmt: skip
