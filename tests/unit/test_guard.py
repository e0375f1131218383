"""The guard's two rules and the clock that can be held."""

from __future__ import annotations

import math

import pytest

from lightning_efficient.common.guard import ENOUGH, Clock, JumpGuard


def test_a_scale_is_compared_with_the_median() -> None:
    guard = JumpGuard(factor=5.0)
    for i in range(ENOUGH):
        assert guard.observe("norm", 1.0 + i % 3, "scale") == ""  # median 2
    assert guard.observe("norm", 9.9, "scale") == ""
    assert "10.1, 5.0 times its recent median" in guard.observe("norm", 10.1, "scale")
    assert guard.jumps == 1


def test_a_loss_near_zero_or_below_is_compared_with_its_span() -> None:
    guard = JumpGuard(factor=5.0)
    for i in range(100):
        assert guard.observe("loss", -0.001 + 0.001 * (i % 11) / 10, "shift") == ""  # -0.001 to 0, span 0.0008
    assert guard.observe("loss", 0.0034, "shift") == "", "within 5 spans above the median of -0.0005"
    assert "out of its recent range" in guard.observe("loss", 0.0036, "shift")
    assert guard.observe("loss", -9.0, "shift") == "", "a loss that falls is no trouble"


def test_too_few_values_do_not_judge_but_nan_always_does() -> None:
    guard = JumpGuard()
    for _ in range(ENOUGH - 1):
        assert guard.observe("norm", 1.0, "scale") == ""
    assert guard.observe("norm", 1e6, "scale") == ""
    fresh = JumpGuard()
    assert fresh.observe("loss", math.nan, "shift") == "loss is nan"
    assert fresh.observe("loss", math.inf, "shift") == "loss is inf"
    assert fresh.jumps == 2
    for _ in range(ENOUGH):
        assert fresh.observe("loss", 1.0, "shift") == "", "what is not finite does not enter the past"


def test_a_level_that_stays_becomes_normal() -> None:
    guard = JumpGuard(window=20)
    for _ in range(20):
        guard.observe("norm", 1.0, "scale")
    verdicts = [bool(guard.observe("norm", 10.0, "scale")) for _ in range(20)]
    assert verdicts == [True] * 10 + [False] * 10


def test_quantities_do_not_mix() -> None:
    guard = JumpGuard()
    for _ in range(ENOUGH):
        guard.observe("a", 1.0, "scale")
        guard.observe("b", 1000.0, "scale")
    assert guard.observe("b", 1000.0, "scale") == ""
    assert guard.observe("a", 1000.0, "scale") != ""


def test_the_state_is_all_of_it() -> None:
    one, two = JumpGuard(), JumpGuard()
    for i in range(50):
        one.observe("norm", 1 + i % 7, "scale")
    one.observe("norm", math.inf, "scale")
    two.load_state_dict(one.state_dict())
    assert two.jumps == 1
    assert two.observe("norm", 19.9, "scale") == one.observe("norm", 19.9, "scale")
    assert two.observe("norm", 25, "scale") == one.observe("norm", 25, "scale") != ""


@pytest.mark.parametrize("factor", [1, 0.5, math.nan, math.inf, True, "5"])
def test_factors_that_make_no_sense(factor: object) -> None:
    with pytest.raises(ValueError, match="must be a number above 1; got"):
        JumpGuard(factor=factor)  # type: ignore[arg-type]


def test_windows_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="integer from 20; got 5"):
        JumpGuard(window=5)


def test_a_clock_runs_with_the_steps() -> None:
    clock = Clock()
    assert [clock.at(s) for s in (0, 1, 7)] == [0, 1, 7]


def test_a_held_clock_stands_still_and_goes_on_from_there() -> None:
    clock = Clock()
    clock.hold(5, 3)
    assert [clock.at(s) for s in range(5, 11)] == [5, 5, 5, 5, 6, 7]
    clock.hold(7, 2)  # another hold inside it takes its place
    assert [clock.at(s) for s in range(7, 12)] == [5, 5, 5, 6, 7]


def test_a_clock_set_back_stops_at_the_earliest() -> None:
    clock = Clock()
    clock.hold(10, 2, back=4, earliest=3)
    assert [clock.at(s) for s in (10, 12, 13)] == [6, 6, 7]
    clock.hold(13, 1, back=100, earliest=3)
    assert clock.at(14) == 3
    clock.hold(14, 1, back=5, earliest=9)
    assert clock.at(14) == 3, "never ahead of where it is"


def test_a_clock_is_its_state() -> None:
    one, two = Clock(), Clock()
    one.hold(10, 5, back=3)
    two.load_state_dict(one.state_dict())
    assert [one.at(s) for s in range(10, 20)] == [two.at(s) for s in range(10, 20)]
