"""The schedule of a transition: its ends are exact, it never rises, and it must fit into the run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_efficient.common.schedule import transition, transition_steps

SHAPES = st.sampled_from(["linear", "cosine"])


@given(st.data(), st.integers(1, 400), SHAPES)
def test_exact_ends_and_never_rising(data, total, shape):
    length = data.draw(st.integers(1, total))
    hold = data.draw(st.integers(0, total - length))
    values = [transition(s, total, hold=hold, length=length, shape=shape) for s in range(total + 5)]
    assert values[: hold + 1] == [1.0] * (hold + 1)
    assert values[hold + length :] == [0.0] * (total + 5 - hold - length)
    assert all(a >= b for a, b in pairwise(values))
    assert all(0 < v < 1 for v in values[hold + 1 : hold + length])


@given(st.integers(1, 10**7), st.floats(0, 1), st.floats(0, 1))
@example(1, 0.05, 0.8)
@example(2, 0.2, 0.8)
@example(3, 0.9, 1e-9)
def test_fractions_that_fit_together_fit_any_run(total, hold, length):
    if hold + length > 1:
        return
    first, span = transition_steps(total, hold=hold, length=length)
    assert abs(first - hold * total) <= 1
    assert abs(span - length * total) <= 1.5
    assert (span > 0) == (length > 0)
    assert first + span <= total
    assert transition(total, total, hold=hold, length=length) == 0.0
    if span:
        assert transition(0, total, hold=hold, length=length) == 1.0


def test_published_schedule():
    """SLAB's counter: its k-th call uses 1 - (k - 1) / step, and 0 for ever after ``step`` calls."""
    counter, step = 60, 60
    for k in range(1, 80):
        assert transition(k - 1, 75, length=step) == pytest.approx(counter / step, abs=1e-15)
        counter = max(counter - 1, 0)


def test_shapes_in_closed_form():
    for step in range(10, 31):
        progress = (step - 10) / 20
        at = {shape: transition(step, 50, hold=10, length=20, shape=shape) for shape in ("linear", "cosine")}
        assert at["linear"] == pytest.approx(1 - progress, abs=1e-15)
        assert at["cosine"] == pytest.approx(math.cos(math.pi * progress / 2) ** 2, abs=1e-15)


def test_a_jump():
    assert [transition(s, 10, hold=3, length=0) for s in (0, 2, 3, 9)] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("total", [None, -1, float("inf")])
def test_unknown_length_of_run(total):
    assert transition(5, total, hold=0, length=10) == 0.5
    with pytest.raises(ValueError, match=r"`length`=0.8 is a fraction.*unknown.*max_steps"):
        transition(0, total)
    with pytest.raises(ValueError, match=r"`hold`=0\.1"):
        transition(0, total, hold=0.1, length=10)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"length": 101}, "end at step 101.*run has 100"),
        ({"hold": 0.3, "length": 0.8}, "end at step 110.*run has 100"),
        ({"hold": -1}, "`hold` must not be negative"),
        ({"length": 1.5}, r"`length`.*within \[0, 1\].*1.5"),
        ({"length": -0.1}, r"`length`.*within \[0, 1\]"),
        ({"length": float("nan")}, r"`length`.*within \[0, 1\]"),
        ({"length": True}, "`length` must be steps"),
        ({"length": "0.8"}, "`length` must be steps"),
        ({"shape": "step"}, "`shape`.*'step'"),
    ],
)
def test_errors(arguments, why):
    with pytest.raises(ValueError, match=why):
        transition(0, 100, **arguments)
    with pytest.raises(ValueError, match="counts from 0"):
        transition(-1, 100)
