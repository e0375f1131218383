"""Every scheduler follows when its optimizer gets more groups: compared with a run that was never touched."""

import copy

import pytest
import timm.scheduler
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from lightning_efficient.surgery.optimizer import add_parameters
from lightning_efficient.surgery.schedulers import PER_GROUP, all_schedulers


def double(step):
    return 1.0 / (step + 1)


def slow(step):
    return 0.9**step


def per_group(optimizer, value):
    """A different value for each group, as users pass them."""
    return [value * (i + 1) for i in range(len(optimizer.param_groups))]


# One entry per way of scheduling; lists of two phases, two milestones or two children must not pass for two
# groups.
MAKERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, [(double, slow, slow)[i % 3] for i in range(len(o.param_groups))]),
    "LambdaLR, one for all": lambda o: lrs.LambdaLR(o, slow),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(
        o, [lambda _, i=i: 0.9 - i / 9 for i in range(len(o.param_groups))]
    ),
    "StepLR": lambda o: lrs.StepLR(o, 3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 9]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 15, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 12, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 5, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(
        o,
        per_group(o, 1e-3),
        per_group(o, 1e-1),
        4,
        base_momentum=per_group(o, 0.2),
        max_momentum=per_group(o, 0.3),
    ),
    "CyclicLR, triangular2": lambda o: lrs.CyclicLR(o, 1e-3, 1e-1, 3, mode="triangular2", cycle_momentum=False),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, per_group(o, 0.1), total_steps=60, max_momentum=per_group(o, 0.3)),
    "OneCycleLR, three phases": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=60, three_phase=True),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=5), lrs.CosineAnnealingLR(o, 20)], milestones=[5]
    ),
    "ChainedScheduler, nested": lambda o: lrs.ChainedScheduler(
        [
            lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.5, 2), lrs.LambdaLR(o, [double] * len(o.param_groups))], [4]),
            lrs.StepLR(o, 3),
        ],
        optimizer=o,
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.5, 4), lrs.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1, factor=0.5, min_lr=per_group(o, 1e-3)),
    "ReduceLROnPlateau, one for all": lambda o: lrs.ReduceLROnPlateau(o, patience=1, factor=0.5, min_lr=1e-3),
    "SWALR": lambda o: SWALR(o, per_group(o, 0.01), anneal_epochs=6),
}


def make(groups, kind=torch.optim.AdamW):
    """An optimizer whose groups have different rates, one weight each."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(2, 2)) for _ in range(groups)]
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    config = [{"params": [w], "lr": 0.05 * (i + 1), "weight_decay": 0.1} for i, w in enumerate(weights)]
    return kind(config, lr=0.1, **options)


def advance(optimizer, scheduler, step):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    if isinstance(scheduler, lrs.ReduceLROnPlateau):
        scheduler.step(1.0)
    elif isinstance(scheduler, timm.scheduler.scheduler.Scheduler):
        scheduler.step(step + 1)
    else:
        scheduler.step()


def settings(group):
    """What schedulers drive."""
    return {key: group[key] for key in ("lr", "momentum", "betas") if key in group}


def add_to_every_group(optimizer, scheduler):
    sources = [group["params"][0] for group in optimizer.param_groups]
    gains = [nn.Parameter(torch.ones(1)) for _ in sources]
    # Last group first: the new groups must follow their own source, not the group at the same position.
    add_parameters(optimizer, list(zip(gains, sources, strict=True))[::-1], [scheduler])
    return gains[::-1]


def tail(test, cell):
    """One group, and two, are three."""
    return test.startswith("test_new_groups_follow_their_source") and cell["groups"] < 3 and cell["steps_before"] == 0


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("steps_before", [0, 7])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_new_groups_follow_their_source_and_old_ones_an_untouched_run(name, groups, steps_before, kind):
    optimizer, untouched = make(groups, kind), make(groups, kind)
    scheduler, reference = MAKERS[name](optimizer), MAKERS[name](untouched)
    rates = set()
    for step in range(steps_before):
        advance(optimizer, scheduler, step)
        advance(untouched, reference, step)
        rates.add(optimizer.param_groups[0]["lr"])
    add_to_every_group(optimizer, scheduler)
    for step in range(steps_before, steps_before + 20):
        advance(optimizer, scheduler, step)
        advance(untouched, reference, step)
        new = [settings(group) for group in optimizer.param_groups]
        assert new[:groups] == [settings(group) for group in untouched.param_groups]
        assert new[groups:] == new[:groups][::-1]
        assert len(scheduler.get_last_lr()) == 2 * groups
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        rates.add(new[0]["lr"])
    assert len(rates) > 1  # the schedule did something
    for weight, twin in zip(optimizer.param_groups[:groups], untouched.param_groups, strict=True):
        assert torch.equal(weight["params"][0], twin["params"][0])


def test_every_scheduler_of_torch_is_in_the_table():
    base = {"LRScheduler", "_LRScheduler"}
    known = {cls for name, cls in vars(lrs).items() if isinstance(cls, type) and issubclass(cls, lrs.LRScheduler)}
    covered = {name.split(",")[0] for name in MAKERS} | base
    assert {cls.__name__ for cls in known} <= covered


def test_the_per_group_lists_are_all_that_torch_has():
    """Lists whose length is the number of groups, for two unusual numbers of groups, are per group."""
    found = set()
    for maker in MAKERS.values():
        seen = []
        for groups in (5, 7):
            names = set()
            for scheduler in all_schedulers([maker(make(groups))]):
                names |= {k for k, v in vars(scheduler).items() if isinstance(v, list | tuple) and len(v) == groups}
            seen.append(names)
        found |= seen[0] & seen[1]
    assert found == PER_GROUP - {"base_values", "warmup_steps"}


def test_a_scheduler_given_twice_or_inside_another_is_grown_once():
    optimizer = make(2)
    inner = lrs.LambdaLR(optimizer, slow)
    outer = lrs.ChainedScheduler([inner], optimizer=optimizer)
    source = optimizer.param_groups[0]["params"][0]
    add_parameters(optimizer, [(nn.Parameter(torch.ones(1)), source)], [inner, outer, inner])
    assert len(inner.base_lrs) == len(inner.lr_lambdas) == len(inner.get_last_lr()) == 3


def test_schedulers_that_know_each_other():
    optimizer = make(1)
    outer = After(optimizer)
    outer.after.owner = outer
    assert all_schedulers([outer]) == [outer, outer.after]


def test_schedulers_of_other_optimizers_are_left_alone():
    optimizer, other = make(2), make(2)
    mine, theirs = lrs.StepLR(optimizer, 3), lrs.StepLR(other, 3)
    source = optimizer.param_groups[1]["params"][0]
    add_parameters(optimizer, [(nn.Parameter(torch.ones(1)), source)], [theirs, mine])
    assert len(mine.base_lrs) == 3
    assert len(theirs.base_lrs) == len(other.param_groups) == 2


def test_rates_kept_as_tensors_are_copied_not_shared():
    weight, gain = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.1), foreach=False)
    scheduler = lrs.ExponentialLR(optimizer, 0.5)
    add_parameters(optimizer, [(gain, weight)], [scheduler])
    old, new = optimizer.param_groups
    assert old["lr"] is not new["lr"]
    assert scheduler.base_lrs[0] is not scheduler.base_lrs[1]
    for step in range(3):
        advance(optimizer, scheduler, step)
        assert old["lr"].item() == new["lr"].item() == pytest.approx(0.1 * 0.5 ** (step + 1))


@pytest.mark.parametrize("name", MAKERS)
def test_saved_states_load_into_a_run_that_grew_the_same_way(name):
    runs = [(o, MAKERS[name](o)) for o in (make(2), make(2))]
    for optimizer, scheduler in runs:
        add_to_every_group(optimizer, scheduler)
    (first, first_scheduler), (second, second_scheduler) = runs
    for step in range(4):
        advance(first, first_scheduler, step)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second_scheduler.load_state_dict(copy.deepcopy(first_scheduler.state_dict()))
    for step in range(4, 10):
        for optimizer, scheduler in runs:
            advance(optimizer, scheduler, step)
        assert [settings(g) for g in first.param_groups] == [settings(g) for g in second.param_groups]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["cosine", "multistep"])
def test_schedulers_of_timm(kind, groups):
    optimizer, untouched = make(groups), make(groups)

    def build(o):
        if kind == "cosine":
            return timm.scheduler.CosineLRScheduler(o, t_initial=25, warmup_t=3)
        return timm.scheduler.MultiStepLRScheduler(o, decay_t=[5, 10], decay_rate=0.5)

    scheduler, reference = build(optimizer), build(untouched)
    add_to_every_group(optimizer, scheduler)
    for step in range(20):
        advance(optimizer, scheduler, step)
        advance(untouched, reference, step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[:groups] == [group["lr"] for group in untouched.param_groups]
        assert rates[groups:] == rates[:groups][::-1]


class Foreign:
    """Drives an optimizer, but is no scheduler of torch's or timm's."""

    def __init__(self, optimizer):
        self.optimizer, self.factors = optimizer, [0.9, 0.8]

    def step(self):
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=False):
            group["lr"] *= factor


def test_a_foreign_scheduler_with_a_list_that_may_be_per_group_is_reported():
    optimizer = make(2)
    scheduler = Foreign(optimizer)
    with pytest.warns(UserWarning, match=r"Foreign keeps lists as long as .* \(factors\)\. They were left"):
        add_to_every_group(optimizer, scheduler)
    assert scheduler.factors == [0.9, 0.8]


# --- classes written by users
# -----------------------------------------------------------------------------------


class Milestones(lrs.LRScheduler):
    """Two milestones, for all groups: with two groups, a list of that length that is not per group."""

    def __init__(self, optimizer):
        self.milestones = [4, 9]
        super().__init__(optimizer)

    def get_lr(self):
        return [base * 0.1 ** sum(self.last_epoch >= m for m in self.milestones) for base in self.base_lrs]


class Powers(lrs.LRScheduler):
    """A power per group, under a name of its own."""

    def __init__(self, optimizer):
        self.powers = tuple(0.9 - 0.1 * i for i in range(len(optimizer.param_groups)))
        super().__init__(optimizer)

    def get_lr(self):
        return [base * power**self.last_epoch for base, power in zip(self.base_lrs, self.powers, strict=False)]


class StrictPowers(Powers):
    def get_lr(self):
        return [base * power**self.last_epoch for base, power in zip(self.base_lrs, self.powers, strict=True)]


class Hopeless(Powers):
    """Insists on two groups."""

    def get_lr(self):
        first, second = self.optimizer.param_groups
        self.calls = 1
        return [first["lr"] * 0.5, second["lr"] * 0.5]


class After(lrs.LRScheduler):
    """Warm-up that hands over to a scheduler kept in an attribute."""

    def __init__(self, optimizer):
        self.after = lrs.LambdaLR(optimizer, slow)
        super().__init__(optimizer)

    def get_lr(self):
        self.after.last_epoch = self.last_epoch
        self.after._get_lr_called_within_step = True
        return [rate * min(1.0, self.last_epoch / 5) for rate in self.after.get_lr()]


@pytest.mark.parametrize("kind", [Milestones, Powers, StrictPowers, After])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_user_written_schedulers(kind, groups):
    optimizer, untouched = make(groups), make(groups)
    scheduler, reference = kind(optimizer), kind(untouched)
    add_to_every_group(optimizer, scheduler)
    for step in range(20):
        advance(optimizer, scheduler, step)
        advance(untouched, reference, step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[:groups] == [group["lr"] for group in untouched.param_groups]
        assert rates[groups:] == rates[:groups][::-1]
    assert getattr(scheduler, "milestones", [4, 9]) == [4, 9]
    assert type(getattr(scheduler, "powers", ())) is tuple


class Counting(Powers):
    """Notes each call, and drives the momentum on the side, as OneCycleLR does."""

    calls = 0

    def get_lr(self):
        self.calls += 1
        for group in self.optimizer.param_groups:
            group["momentum"] *= 0.5
        return super().get_lr()


def test_asking_a_scheduler_leaves_no_trace():
    optimizer = make(2, torch.optim.SGD)
    scheduler = Counting(optimizer)
    calls, before = scheduler.calls, [settings(group) for group in optimizer.param_groups]
    add_to_every_group(optimizer, scheduler)
    assert scheduler.calls == calls
    assert not scheduler._get_lr_called_within_step
    assert [settings(group) for group in optimizer.param_groups] == before + before[::-1]


def test_a_scheduler_that_cannot_follow_is_refused_and_nothing_changes():
    optimizer = make(2)
    good, bad = lrs.StepLR(optimizer, 3), Hopeless(optimizer)
    groups = [dict(group) for group in optimizer.param_groups]
    before = [copy.copy(vars(scheduler)) for scheduler in (good, bad)]
    source = optimizer.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match=r"Hopeless does not give the added .*powers"):
        add_parameters(optimizer, [(nn.Parameter(torch.ones(1)), source)], [good, bad])
    assert len(optimizer.param_groups) == 2
    assert all(
        group[key] is value
        for group, saved in zip(optimizer.param_groups, groups, strict=True)
        for key, value in saved.items()
    )
    assert [vars(good), vars(bad)] == before
    advance(optimizer, bad, 0)
