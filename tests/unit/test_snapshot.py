"""A training state from a file: what could not be put back is found before anything is."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, LRScheduler, MultiStepLR, ReduceLROnPlateau, SequentialLR

from lightning_efficient.surgery.optimizer import add_parameters
from lightning_efficient.surgery.schedulers import PER_GROUP, all_schedulers
from lightning_efficient.weightspace import Block, Boundary, SpectralTransform
from lightning_efficient.weightspace.snapshot import Snapshot, check_snapshot, restore_snapshot, rewind, take


class Patient(LRScheduler):
    """One of a user's: it notes the best step, once there is one, in words and numbers."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.best: float | None = None
        self.phase = "begin"
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        if self.last_epoch > 1:
            self.best, self.phase = 1.0, "middle"
        return [group["lr"] for group in self.optimizer.param_groups]


class Run:
    """A network with a spectral weight, in training."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, kind: Any = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)
        make = kind or (lambda o: SequentialLR(o, [LinearLR(o, total_iters=2), MultiStepLR(o, [1, 2])], [2]))
        self.scheduler = make(self.optimizer)
        self.boundary = Boundary()
        self.boundary.add("0.weight", self.model[0].weight, SpectralTransform([Block(0, 6)], learnable=False))  # type: ignore[arg-type]
        self.boundary.start()
        self.boundary.attach([self.optimizer])

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 4)).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step(*((0.5,) if isinstance(self.scheduler, ReduceLROnPlateau) else ()))

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.model, self.boundary.sites, [self.optimizer], [self.scheduler]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor])
@pytest.mark.parametrize("kind", [None, ReduceLROnPlateau, Patient])
@pytest.mark.parametrize("taken", [0, 2])
def test_a_state_of_this_run_is_taken_back(optimizer: Any, kind: Any, taken: int) -> None:
    run = Run(optimizer, kind)
    for _ in range(taken):
        run.step()
    snapshot = take(*run.parts)
    expected = copy.deepcopy(run.model.state_dict())
    for _ in range(3):
        run.step()
    check_snapshot(snapshot, *run.parts, "the snapshot")
    # Layers that were unfrozen meanwhile.
    extra = nn.Parameter(torch.zeros(1))
    add_parameters(run.optimizer, [(extra, run.model[2].weight)], [run.scheduler])  # type: ignore[list-item]
    check_snapshot(snapshot, *run.parts, "the snapshot")
    rewind(snapshot, *run.parts)
    assert all(torch.equal(value, expected[name]) for name, value in run.model.state_dict().items())
    run.step()
    for scheduler in all_schedulers([run.scheduler]):
        lists = [value for name, value in vars(scheduler).items() if name in PER_GROUP]
        assert not isinstance(scheduler, MultiStepLR) or isinstance(scheduler.milestones, Counter)
        assert all(len(value) == 2 for value in lists), "each group has its own rate, also in schedulers inside others"


SPOILT: dict[str, tuple[tuple[Any, ...], Callable[[Any], Any]]] = {
    r"\['model'\].*'0.weight'": (("model", "0.weight"), lambda v: v[:-1]),
    r"\['model'\].*'1.running_var'.*float32": (("model", "1.running_var"), lambda v: v.long()),
    r"\['transforms'\]\['0.weight'\].*'spectral'": (("transforms", "0.weight"), lambda v: {}),
    r"\['transforms'\]\['0.weight'\].*spectral state": (
        ("transforms", "0.weight", "spectral", "left.0"),
        lambda v: v[1:],
    ),
    r"\['optimizers'\].*groups of": (("optimizers", 0, "param_groups", 0, "params"), lambda v: v[1:]),
    r"\['optimizers'\].*known field: 7": (("optimizers", 0, "param_groups", 0, "params", 0), lambda v: 7),
    r"\['optimizers'\].*'betas'": (("optimizers", 0, "param_groups", 0, "betas"), lambda v: v[:1]),
    r"\['optimizers'\].*'amsgrad'.*False": (("optimizers", 0, "param_groups", 0, "amsgrad"), lambda v: True),
    r"\['optimizers'\].*'lr'.*number": (("optimizers", 0, "param_groups", 0, "lr"), lambda v: "x"),
    r"\['optimizers'\].*'exp_avg'.*shape": (("optimizers", 0, "state", 0, "exp_avg"), lambda v: v[:1]),
    r"\['optimizers'\].*'exp_avg_sq'.*there": (
        ("optimizers", 0, "state", 0),
        lambda v: {"step": v["step"], "exp_avg": v["exp_avg"]},
    ),
    r"\['optimizers'\].*known field": (("optimizers", 0, "state"), lambda v: v | {99: v[0]}),
    r"\['optimizers'\].*list of 1": (("optimizers",), lambda v: []),
    r"\['schedulers'\].*'_schedulers'": (("schedulers", 0, "_schedulers"), lambda v: v[:1]),
    r"\['schedulers'\].*'base_lrs'": (("schedulers", 0, "_schedulers", 0, "base_lrs"), lambda v: []),
    r"\['schedulers'\].*'last_epoch'.*number": (("schedulers", 0, "last_epoch"), lambda v: None),
}


@pytest.mark.parametrize("said", SPOILT)
def test_what_could_not_be_put_back_is_refused_by_name(said: str) -> None:
    path, change = SPOILT[said]
    run = Run()
    run.step()
    run.step()
    plain = copy.deepcopy(take(*run.parts).as_plain())
    target: Any = plain
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = change(target[path[-1]])
    run.step()
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), run.scheduler.state_dict()))
    snapshot = restore_snapshot(plain)
    assert isinstance(snapshot, Snapshot)
    with pytest.raises(LookupError, match=rf"the snapshot, field.*{said}|the snapshot{said}"):
        check_snapshot(snapshot, *run.parts, "the snapshot", RefusedError)
    after = (run.model.state_dict(), run.optimizer.state_dict(), run.scheduler.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


class RefusedError(ValueError, LookupError):
    """Tells a refusal from any other ValueError."""
