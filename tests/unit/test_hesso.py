"""HESSO's state machine: when, how much, which units; and CRIC's cycles."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_efficient.structured.cost import Cost
from lightning_efficient.structured.cric import CricPlan, CricState, probe_units
from lightning_efficient.structured.groups import Groups, Slice, UnitGroup
from lightning_efficient.structured.hesso import (
    KEPT,
    PRUNED,
    SHRINKING,
    HessoConfig,
    HessoState,
    Plan,
    Pruner,
    shrink_factor,
)


def rows(units: int, each: int = 1) -> Tensor:
    return torch.arange(units * each).view(units, each)


def widths(*units: int, divisors: tuple[int, ...] | None = None) -> Groups:
    """A chain of linear layers without bias, 10 inputs and 10 outputs, whose widths are these."""
    found = {}
    for i, width in enumerate(units):
        parts = (Slice(f"{i}.weight", 0, rows(width), "produce"), Slice(f"{i + 1}.weight", 1, rows(width), "consume"))
        found[str(i)] = UnitGroup(str(i), width, parts, (divisors or [1] * len(units))[i])
    return Groups(found)


class Chain(nn.Sequential):
    def __init__(self, *units: int) -> None:
        sizes = [10, *units, 10]
        super().__init__(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))


def none_gone(groups: Groups) -> dict[str, Tensor]:
    return {name: torch.zeros(group.units, dtype=torch.bool) for name, group in groups.found.items()}


# -- when ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 20), st.integers(1, 60), st.integers(1, 12))
def test_periods_divide_the_span_without_gaps(first: int, span: int, periods: int) -> None:
    if span < periods:
        return
    plan = Plan(first, span, periods)
    assert plan.begin(0) == first
    assert plan.begin(periods) == first + span
    lengths = [plan.begin(p + 1) - plan.begin(p) for p in range(periods)]
    assert max(lengths) - min(lengths) <= 1
    for step in range(first + span + 3):
        expected = -1 if step < first else next((p for p in range(periods) if step < plan.begin(p + 1)), periods)
        assert plan.period(step) == expected


@given(st.integers(0, 9), st.integers(1, 40))
def test_factors_telescope_to_a_straight_line_and_exactly_zero(begin: int, steps: int) -> None:
    weight, exact = torch.tensor(1.0), Fraction(1)
    for t in range(steps):
        factor = shrink_factor(begin, begin + steps, begin + t, begin + t + 1)
        assert factor == (steps - t - 1) / (steps - t)
        weight, exact = weight * factor, exact * Fraction(steps - t - 1, steps - t)
        assert exact == Fraction(steps - t - 1, steps)
        assert float(weight) == pytest.approx(float(exact), abs=1e-6)
    assert float(weight) == 0.0


def test_skipped_steps_and_late_choices_still_end_at_zero() -> None:
    """A gradient scaler may skip steps: the factor makes up for them. Units chosen too late go at once."""
    assert shrink_factor(10, 20, 12, 15) == 5 / 8
    assert shrink_factor(10, 20, 12, 20) == 0.0
    assert shrink_factor(10, 20, 12, 27) == 0.0
    assert shrink_factor(10, 20, 25, 26) == 0.0
    assert shrink_factor(10, 20, 12, 12) == 1.0


def test_a_plan_follows_the_run() -> None:
    assert HessoConfig().plan(1000) == Plan(100, 200, 10)
    assert HessoConfig(start=3, duration=7, periods=2).plan(None) == Plan(3, 7, 2)
    assert HessoConfig().plan(0).period(0) == 0  # a run of no steps has a plan, and never gets to it
    assert [HessoConfig().plan(total).periods for total in (1, 2, 20, 32, 100)] == [1, 1, 4, 7, 10]


@pytest.mark.parametrize(
    ("arguments", "total", "said"),
    [
        ({"target": 1.0}, 100, r"number in \(0, 1\) such as 0.5; got 1.0"),
        ({"target": 0}, 100, "got 0"),
        ({"target": True}, 100, "got True"),
        ({"unit": "flops"}, 100, "'groups', 'params', 'macs'"),
        ({"periods": 0}, 100, "`periods` must be a whole number from 1; got 0"),
        ({"group_divisible": 2.0}, 100, "`group_divisible` must be a whole number from 1; got 2.0"),
        ({"saliency": {"size": 1.0}}, 100, "'size'.*; the criteria are"),
        ({"periods": 10}, 20, r"10 `periods` need at least one step each, but `duration`=0.2 is 4 step"),
        ({}, None, "run's length is unknown"),
        ({"start": 0.9, "duration": 0.2}, 100, "are more than a whole run"),
    ],
)
def test_bad_schedules(arguments: dict[str, object], total: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HessoConfig(**arguments).plan(total)  # type: ignore[arg-type]


# -- how much, and which ---------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=4),
    st.floats(0.05, 0.7),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_exactly_k_units_go_the_lowest_first(units: list[int], target: float, periods: int, random: object) -> None:
    groups = widths(*units)
    pruner, total = Pruner(groups), sum(units)
    count = int(target * total + 1e-9)
    if count > total - len(units):
        return
    pruner.check(target)
    state = HessoState.of(groups)
    scores = {n: torch.tensor([random.random() for _ in range(g.units)]) for n, g in groups.found.items()}  # type: ignore[attr-defined]
    for period in range(periods):
        gone = state.marked(SHRINKING, PRUNED)
        chosen = pruner.choose(scores, gone, target * (period + 1) / periods)
        assert not any(bool((chosen[n] & gone[n]).any()) for n in gone)
        state.choose(chosen, period, period)
        assert sum(state.lost().values()) == int(target * (period + 1) / periods * total + 1e-9)
        state.commit()
    assert sum(state.lost().values()) == count
    # Without ties and with fixed scores: the lowest ones, where the best unit of each group may not go.
    best = {n: int(s.argmax()) for n, s in scores.items()}
    free = sorted(float(s[i]) for n, s in scores.items() for i in range(len(s)) if i != best[n])
    lost = sorted(float(s) for n, values in scores.items() for s in values[state.status[n] == PRUNED])
    assert lost == free[:count]


def test_the_lowest_go_not_the_first_ones() -> None:
    """The published code takes the candidates by position when some of the lowest are gone already."""
    groups = widths(6, 6)
    scores = {"0": torch.tensor([9.0, 8, 7, 6, 5, 4]), "1": torch.tensor([0.0, 1, 2, 3, 10, 11])}
    gone = none_gone(groups)
    gone["1"][:2] = True
    chosen = Pruner(groups).choose(scores, gone, 4 / 12)
    assert not chosen["0"].any()
    assert chosen["1"].tolist() == [False, False, True, True, False, False]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(2, 20), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.floats(0.05, 0.6),
)
def test_survivors_are_a_multiple_of_the_divisor(layers: list[tuple[int, int]], divisible: int, target: float) -> None:
    groups = widths(*(u for u, _ in layers), divisors=tuple(d for _, d in layers))
    pruner = Pruner(groups, group_divisible=divisible)
    most = {name: sum(pruner.steps(group, group.units)) for name, group in groups.found.items()}
    if not pruner.reached(most, target):
        with pytest.raises(ValueError, match="cannot be reached"):
            pruner.check(target)
        return
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(g.units, generator=generator) for n, g in groups.found.items()}
    chosen = pruner.choose(scores, none_gone(groups), target)
    total, lost = sum(u for u, _ in layers), 0
    for name, group in groups.found.items():
        gone, divisor = int(chosen[name].sum()), math.lcm(group.divisor, divisible)
        lost += gone
        assert gone == 0 or ((group.units - gone) % divisor == 0 and group.units - gone >= divisor)
        if group.units <= divisor:
            assert gone == 0
        # The lowest of its own group.
        assert set(scores[name].argsort()[:gone].tolist()) == set(chosen[name].nonzero().flatten().tolist())
    count = int(target * total + 1e-9)
    assert count <= lost < count + max(math.lcm(g.divisor, divisible) for g in groups.found.values())


def test_a_target_in_parameters_is_met_by_the_fewest_units() -> None:
    groups, model = widths(8, 12), Chain(8, 12)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    sizes = {n: float(p.numel()) for n, p in model.named_parameters()}
    pruner = Pruner(groups, "params", cost=Cost(sizes, shapes, groups.found))
    assert pruner.removed({}) == 0
    assert pruner.removed({"0": 4, "1": 6}) == pytest.approx(1 - (10 * 4 + 4 * 6 + 6 * 10) / (80 + 96 + 120))
    generator = torch.Generator().manual_seed(1)
    scores = {n: torch.rand(g.units, generator=generator) for n, g in groups.found.items()}
    chosen = pruner.choose(scores, none_gone(groups), 0.5)
    lost = {n: int(c.sum()) for n, c in chosen.items()}
    assert pruner.removed(lost) >= 0.5
    last = max(((float(scores[n][c].max()), n) for n, c in chosen.items() if c.any()))[1]
    assert pruner.removed({**lost, last: lost[last] - 1}) < 0.5


@pytest.mark.parametrize(
    ("groups", "divisible", "target", "said"),
    [
        (Groups({}, {"net": "recurrent"}), 1, 0.5, "there is nothing to prune. .*not net: recurrent"),
        (widths(2, 2), 1, 0.9, "`target`=0.9 of the groups cannot be reached.*at most 0.5 can go. Lower"),
        (widths(8, 16), 8, 0.5, r"at most 0.3333 can go. \['0'\] may lose none"),
    ],
)
def test_unreachable_targets(groups: Groups, divisible: int, target: float, said: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){said}"):
        Pruner(groups, group_divisible=divisible).check(target)


def test_a_layer_that_is_redundant_altogether_keeps_its_best_unit() -> None:
    groups = widths(4, 8)
    scores = {"0": torch.tensor([0.0, 0.0, 1e-9, 0.0]), "1": torch.ones(8)}
    chosen = Pruner(groups).choose(scores, none_gone(groups), 0.5)
    assert chosen["0"].tolist() == [True, True, False, True]
    assert int(chosen["1"].sum()) == 3


def test_state_is_plain_data() -> None:
    groups = widths(3, 2)
    state = HessoState.of(groups)
    state.choose({"0": torch.tensor([True, False, False]), "1": torch.tensor([False, True])}, 0, 5)
    assert state.kept() == {"0": [1, 2], "1": [0]}
    again = HessoState.from_plain(state.as_plain())
    assert (again.chosen, again.shrunk) == (1, 5)
    assert all(torch.equal(again.status[n], s) for n, s in state.status.items())
    again.release()
    assert again.kept() == {}
    assert state.status["0"].tolist() == [SHRINKING, KEPT, KEPT]


# -- CRIC ------------------------------------------------------------------------------------------------------------


def marks(*where: bool) -> dict[str, Tensor]:
    return {"0": torch.tensor(where)}


def test_cycles_try_what_turns_up_and_end_when_nothing_new_does() -> None:
    state = CricState()
    state.observe({"0": torch.tensor([1.0, 2, 3, 4])}, marks(True, False, False, False))
    assert not state.over(10)  # nothing has been tried yet
    state.begin()
    assert state.active["0"].tolist() == [True, False, False, False]
    state.observe({"0": torch.tensor([9.0, 2, 3, 4])}, marks(False, True, False, False))  # a new one turns up
    state.observe({"0": torch.tensor([9.0, 2, 1, 4])}, marks(False, False, True, False))  # and another
    assert not state.over(10)
    assert state.over(10, tolerance=2)
    assert state.over(1)
    state.begin()
    assert state.active["0"].tolist() == [False, True, True, False]
    state.observe({"0": torch.tensor([1.0, 9, 9, 4])}, marks(True, False, False, False))  # tried before: not new
    assert state.over(10)
    assert state.history["0"].tolist() == [True, True, True, False]
    assert state.samples == 4
    torch.testing.assert_close(state.verdict()["0"], torch.tensor([5.0, 3.75, 4.0, 4.0], dtype=torch.float64))
    state.probes = {"0": 2.0}
    torch.testing.assert_close(state.verdict()["0"], torch.tensor([5.5, 4.25, 4.5, 4.5], dtype=torch.float64))
    again = CricState.from_plain(state.as_plain())
    assert all(torch.equal(again.verdict()[n], v) for n, v in state.verdict().items())


@given(st.integers(0, 9), st.integers(3, 60), st.integers(1, 10))
def test_cycles_and_the_shrinking_after_them_fit_into_the_span(first: int, span: int, cycles: int) -> None:
    if span < cycles + 2:
        with pytest.raises(ValueError, match="cric=True needs"):
            CricPlan(first, span, cycles)
        return
    plan = CricPlan(first, span, cycles)
    assert plan.begin(1) == first + 1
    assert plan.begin(cycles + 1) + plan.length <= first + span


def test_probes_leave_something() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 4.0])
    assert [probe_units(scores, share) for share in (0.25, 0.5, 0.75)] == [[1], [1, 2], [1, 2, 0]]
    assert probe_units(torch.tensor([2.0, 1.0]), 0.25) == [1]
    assert probe_units(torch.tensor([2.0, 1.0]), 0.75) == [1]


@pytest.mark.parametrize("target", [0.2, 0.5, 0.7])
def test_equal_widths_stay_equal(target: float) -> None:
    """Three groups of 6 and two of 10: their own lowest units go, as many in each; a prior loss ends the likeness."""
    groups = widths(6, 10, 6, 6, 10)
    pruner = Pruner(groups, uniform=True)
    generator = torch.Generator().manual_seed(3)
    scores = {n: torch.rand(g.units, generator=generator) for n, g in groups.found.items()}
    gone = none_gone(groups)
    for part in (0.5, 1.0):
        chosen = pruner.choose(scores, gone, target * part)
        gone = {name: gone[name] | chosen[name] for name in gone}
        lost = {name: int(where.sum()) for name, where in gone.items()}
        assert lost["0"] == lost["2"] == lost["3"]
        assert lost["1"] == lost["4"]
        assert pruner.fewest(lost, target * part)
        assert all(gone[n][scores[n].argsort()[: lost[n]]].all() for n in gone)
    uneven = none_gone(groups)
    uneven["0"][0] = True
    left = {n: int(w.sum()) + int(uneven[n].sum()) for n, w in pruner.choose(scores, uneven, target).items()}
    assert left["2"] == left["3"]
