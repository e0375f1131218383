"""Which weights go: granularities, scopes, ties and counts against brute force; criteria; schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_efficient.common.schedule import Schedule, cubic, iterative
from lightning_efficient.pruning import criteria
from lightning_efficient.pruning.granularity import Granularity
from lightning_efficient.pruning.selection import count_of, lowest, make_masks

properties = settings(max_examples=100, deadline=None, derandomize=True)
amounts = st.floats(0, 0.999)


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make_mask(score: Tensor, amount: float, scope: str = "layer", heads: int | None = None, **cut: str) -> Tensor:
    return make_masks({"weight": score}, amount, scope=scope, heads={"weight": heads} if heads else None, **cut)[
        "weight"
    ]


# -- the choice of units ---------------------------------------------------------------------------------------------


@properties
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), amounts)
def test_lowest_first_and_ties_in_order(values: list[int], amount: float) -> None:
    count = count_of(amount, len(values))
    expected = set(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])
    single = lowest(torch.tensor([values]).float(), count)
    assert set(single[0].nonzero().flatten().tolist()) == expected
    # Two rows are sorted, one is partitioned: the same choice.
    double = lowest(torch.tensor([values, values[::-1]]).float(), torch.tensor([count, 0]))
    assert torch.equal(double[0], single[0])
    assert not double[1].any()


def test_counts_are_rounded_down() -> None:
    assert [count_of(a, 100) for a in (0.29, 0.57, 0.999, 0.0)] == [29, 57, 99, 0]


@pytest.mark.parametrize(
    ("granularity", "shape", "group"),
    [
        ("row", (4, 6), lambda o, i, k: o),
        ("row", (4, 3, 2, 2), lambda o, i, k: o),
        ("channel", (4, 6), lambda o, i, k: i),
        ("channel", (4, 3, 2, 2), lambda o, i, k: i),
        ("head", (4, 6), lambda o, i, k: i // 3),
        ("2x3", (4, 6), lambda o, i, k: (o // 2, i // 3)),
        ("1x4", (4, 3, 2, 2), lambda o, i, k: (o, i * 4 // 4)),
    ],
)
def test_units_live_and_die_together(granularity: str, shape: tuple[int, ...], group: Any) -> None:
    s = scores(*shape)
    flat = s.reshape(shape[0], shape[1], -1)
    sums: dict[Any, list[float]] = {}
    for o in range(flat.shape[0]):
        for i in range(flat.shape[1]):
            for k in range(flat.shape[2]):
                sums.setdefault(group(o, i, k), []).append(float(flat[o, i, k].double()))
    order = sorted(sums, key=lambda g: math.fsum(sums[g]) / len(sums[g]))
    gone = set(order[: len(order) // 2])
    mask = make_mask(s, 0.5, granularity=granularity, heads=2).reshape(flat.shape)
    for o in range(flat.shape[0]):
        for i in range(flat.shape[1]):
            for k in range(flat.shape[2]):
                assert bool(mask[o, i, k]) is (group(o, i, k) not in gone)


@pytest.mark.parametrize("shape", [(5, 8), (3, 8, 3, 3)])
def test_two_of_four(shape: tuple[int, ...]) -> None:
    s = scores(*shape)
    mask = make_mask(s, 0.5, granularity="2:4")
    runs = mask.reshape(shape[0], shape[1] // 4, 4, -1)
    assert bool((runs.sum(2) == 2).all())
    kept = s.reshape(runs.shape).masked_fill(~runs, torch.inf).amin(2)
    lost = s.reshape(runs.shape).masked_fill(runs, -torch.inf).amax(2)
    assert bool((kept > lost).all())
    # On the way there, every run loses the same.
    assert bool((make_mask(s, 0.3, granularity="2:4").reshape(runs.shape).sum(2) == 3).all())


def test_scopes() -> None:
    weights = {"small": scores(4, 10) * 0.1, "large": scores(6, 5, seed=1) + 1}
    everywhere = make_masks(weights, 0.4, scope="global")
    assert [int((~m).sum()) for m in everywhere.values()] == [28, 0]
    layer = make_masks(weights, 0.4, scope="layer")
    assert [int((~m).sum()) for m in layer.values()] == [16, 12]
    neuron = make_masks(weights, 0.4, scope="neuron")
    assert [(~m).sum(1).tolist() for m in neuron.values()] == [[4] * 4, [2] * 6]
    order = torch.cat([w.flatten() for w in weights.values()]).argsort()[:28]
    together = torch.cat([m.flatten() for m in everywhere.values()])
    assert set((~together).nonzero().flatten().tolist()) == set(order.tolist())


@properties
@given(
    st.sampled_from(["element", "row", "channel", "head", "2:4", "2x2"]),
    st.sampled_from(["global", "layer"]),
    st.lists(st.floats(0, 0.9), min_size=2, max_size=4),
    st.integers(0, 5),
)
def test_masks_only_shrink(granularity: str, scope: str, steps: list[float], seed: int) -> None:
    """Whatever the scores do in between, what is gone stays gone, and the count is that of the latest amount."""
    heads = {"a": 2, "b": 2}
    kept: dict[str, Tensor] = {}
    for i, amount in enumerate(sorted(steps)):
        new = {"a": scores(4, 8, seed=seed + i), "b": scores(2, 4, seed=seed - i)}
        masks = make_masks(new, amount, granularity=granularity, scope=scope, kept=kept or None, heads=heads)
        fresh = make_masks(new, amount, granularity=granularity, scope=scope, heads=heads)
        if scope == "layer" or granularity in ("element", "2:4"):
            total = sum(int((~m).sum()) for m in masks.values())
            assert total == sum(int((~m).sum()) for m in fresh.values())
        assert all(not bool((masks[n] & ~kept[n]).any()) for n in kept)
        again = make_masks(
            {n: 1 - s for n, s in new.items()}, amount, granularity=granularity, scope=scope, kept=masks, heads=heads
        )
        assert all(torch.equal(again[n], masks[n]) for n in masks), "the same amount again changes nothing"
        kept = masks


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: make_mask(scores(2, 2), 1.0), r"in \[0, 1\) such as 0.5; got 1.0"),
        (lambda: make_mask(scores(2, 2), -0.1), r"got -0.1"),
        (lambda: make_mask(scores(2, 2), True), r"got True"),
        (lambda: make_mask(scores(2, 2), math.nan), r"got nan"),
        (lambda: make_mask(scores(2, 6), 0.5, granularity="2:4"), r"'weight' has 6 inputs, no multiple of 4"),
        (lambda: make_mask(scores(3, 6), 0.5, granularity="2x2"), r"'weight' has 3 outputs, no multiple of 2"),
        (lambda: make_mask(scores(2, 2), 0.5, granularity="4:2"), r"must be one of .*got '4:2'"),
        (lambda: make_mask(scores(2, 2), 0.5, granularity="filter"), r"must be one of .*got 'filter'"),
        (lambda: make_mask(scores(2, 2), 0.5, scope="tensor"), r"`scope` must be one of .*got 'tensor'"),
        (lambda: make_mask(scores(2, 2), 0.5, scope="neuron", granularity="row"), r"Use scope='layer' or 'global'"),
        (lambda: make_mask(scores(2, 2) / 0, 0.5), r"scores of 'weight' are not finite"),
    ],
)
def test_bad_input(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_granularity_is_read() -> None:
    assert Granularity.parse("2:4") == Granularity("n:m", 2, 4)
    assert Granularity.parse("16x8") == Granularity("block", 16, 8)
    assert Granularity.parse("head") == Granularity("head")


# -- criteria --------------------------------------------------------------------------------------------------------


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    torch.manual_seed(0)
    layer, x, y = nn.Linear(4, 3).double(), torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    F.cross_entropy(layer(x), y).backward()
    assert layer.weight.grad is not None
    score = criteria.taylor(layer.weight, layer.weight.grad)
    for i in range(3):
        for j in range(4):
            t = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
            hit = torch.zeros(3, 4, dtype=torch.float64)
            hit[i, j] = 1
            out = F.linear(x, layer.weight.detach() * (1 - hit + hit * t), layer.bias.detach())
            (slope,) = torch.autograd.grad(F.cross_entropy(out, y), t)
            assert float(score[i, j]) == pytest.approx(abs(float(slope)), rel=1e-10)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(5, 3), torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0))),
        (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))),
        (nn.Conv1d(4, 6, 3), torch.randn(4, 9, generator=torch.Generator().manual_seed(0))),
    ],
    ids=["linear", "conv", "grouped", "conv1d without batch"],
)
def test_wanda_against_loops(layer: Any, x: Tensor) -> None:
    norm = criteria.squared_input_norm(layer, x).sqrt()
    groups = getattr(layer, "groups", 1)
    score = criteria.wanda(layer.weight, norm, groups)
    kernel = len(getattr(layer, "kernel_size", ()))
    features = x.movedim(-1 if not kernel else x.ndim - 1 - kernel, 0).flatten(1).double()
    outputs, inputs = layer.weight.shape[:2]
    for o in range(outputs):
        for i in range(inputs):
            channel = o // (outputs // groups) * inputs + i
            expected = layer.weight[o, i].detach().double().abs() * features[channel].square().sum().sqrt()
            torch.testing.assert_close(score[o, i].double(), expected, rtol=1e-5, atol=0)


def test_random_scores_are_the_seeds_and_nobody_elses() -> None:
    state = torch.get_rng_state()
    first = criteria.random(torch.zeros(50, 40), 3)
    assert torch.equal(first, criteria.random(torch.ones(50, 40), 3))
    assert not torch.equal(first, criteria.random(torch.zeros(50, 40), 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(float(first.mean()) - 0.5) < 0.03


# -- schedules -------------------------------------------------------------------------------------------------------


def test_cubic_in_closed_form() -> None:
    """Equation 1 of the paper with n = 10, dt = 5, t_0 = 20."""
    for n in range(11):
        expected = 0.9 + (0.1 - 0.9) * (1 - n / 10) ** 3
        for step in range(20 + 5 * n, 20 + 5 * n + (5 if n < 10 else 100)):
            assert cubic(step, 20, 50, 0.9, initial=0.1, every=5) == pytest.approx(expected, abs=1e-12)
    assert cubic(19, 20, 50, 0.9, initial=0.1) == 0
    assert cubic(70, 20, 50, 0.9) == 0.9


def test_iterative_keeps_the_same_share_each_round() -> None:
    left = [1 - iterative(step, 60, 0.936, 5) for step in range(61)]
    assert sorted({round(v, 12) for v in left}, reverse=True) == pytest.approx(
        [0.064 ** (i / 5) for i in range(6)], abs=1e-9
    )
    changes = [step for step in range(1, 61) if left[step] != left[step - 1]]
    assert changes == [10, 20, 30, 40, 50]
    assert iterative(10**9, 60, 0.936, 5) == 0.936


@pytest.mark.parametrize("kind", ["cubic", "one_shot", "constant", "iterative"])
@pytest.mark.parametrize("total", [6, 7, 100, 1001])
def test_schedules_only_grow_and_end_exactly(kind: Any, total: int) -> None:
    schedule = Schedule(kind)
    values = [schedule.share(step, schedule.steps(total), 0.75) for step in range(total)]
    assert values == sorted(values)
    assert values[-1] == 0.75
    assert values[0] == (0.75 if kind == "constant" else 0.0)
    first = schedule.steps(total)[0]
    if kind != "constant":
        assert all(v == 0 for v in values[:first])
        # One step to act in, at least, with what was pruned.
        assert first < total


def test_steps_and_fractions() -> None:
    assert Schedule("one_shot").steps(40) == (20, 0, 1)
    assert Schedule("one_shot", start=7).steps(None) == (7, 0, 1)
    assert Schedule("cubic", start=0.25, length=0.5, every=0.1).steps(40) == (10, 20, 4)
    assert Schedule("cubic", start=3, length=10, every=2).steps(None) == (3, 10, 2)
    assert Schedule("cubic").steps(0) == (0, 0, 1)
    assert Schedule("iterative", rounds=3).steps(40) == (10, 40, 1)
    assert Schedule("constant").share(0, (0, 0, 1), 0.5) == 0.5


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Schedule("linear"), r"`schedule` must be one of .*got 'linear'"),
        (lambda: Schedule("constant", start=3), r"`start`=3 has no meaning for schedule='constant'"),
        (lambda: Schedule("one_shot", length=3), r"`length`=3 has no meaning for schedule='one_shot'"),
        (lambda: Schedule("iterative", rounds=0), r"`rounds` must be a whole number from 1; got 0"),
        (lambda: Schedule(every=0), r"`every` must be .*got 0"),
        (lambda: Schedule(every=1.5), r"got 1.5"),
        (lambda: Schedule(start=0.5, length=0.6), r"are more than a whole run"),
        (lambda: Schedule(start=50, length=60).steps(100), r"end at step 110"),
        (lambda: Schedule("one_shot", start=100).steps(100), r"start at step 100 of a run of 100.*Lower `start`"),
        (lambda: Schedule("one_shot", start=1.0).steps(100), r"nothing would be pruned"),
        (lambda: Schedule("iterative", rounds=6).steps(6), r"6 rounds .* need more than 6 steps, but the run has 6"),
        (lambda: Schedule("iterative").steps(None), r"set `max_steps` or `max_epochs`"),
        (lambda: Schedule().steps(None), r"the run's length is unknown"),
        (lambda: Schedule(start=3, length=4).steps(None), r"`every`=0.01 is a fraction of the run.*unknown"),
        (lambda: Schedule().share(0, (1, 6, 1), 1.0), r"in \[0, 1\)"),
    ],
)
def test_schedules_are_checked(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
