"""Schedules as pure functions of the step, so that resuming, repeating and skipping steps cannot get them wrong."""

from __future__ import annotations

import math
from typing import Literal


def transition(
    step: int,
    total: int | None,
    *,
    hold: int | float = 0,
    length: int | float = 0.8,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """The weight of what is being phased out: 1 while held, then down to 0 and 0 from there on.

    With ``hold=0`` and ``shape="linear"`` this is ``1 - step / length``, SLAB's schedule (arXiv 2405.11582).

    Args:
        step: Optimizer steps done so far, from 0.
        total: Optimizer steps in the run. None, -1 or infinity: unknown, which only works for lengths given in steps.
        hold: How long to stay at 1: an ``int`` in steps, or a ``float`` as a fraction of the run.
        length: How long the way down takes, likewise; 0 is a jump.
        shape: ``"linear"``, or ``"cosine"`` (half a period: slow at both ends).

    Returns:
        A number in [0, 1]: exactly 1 up to step ``hold`` (unless ``length`` is 0), exactly 0 from ``hold + length``.

    Raises:
        ValueError: The transition would not end within the run, a fraction is given for a run of unknown length, or a
            value is out of range.
    """
    if step < 0:
        raise ValueError(f"`step` counts from 0; got {step}.")
    if shape not in ("linear", "cosine"):
        raise ValueError(f"`shape` must be 'linear' or 'cosine'; got {shape!r}.")
    first, span = transition_steps(total, hold=hold, length=length)
    if step >= first + span:
        return 0.0
    if step <= first:
        return 1.0
    progress = (step - first) / span
    return 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def transition_steps(total: int | None, *, hold: int | float = 0, length: int | float = 0.8) -> tuple[int, int]:
    """When a transition starts and how many steps it takes.

    Args:
        total: Optimizer steps in the run; None, -1 or infinity: unknown.
        hold: Steps (``int``) or fraction of the run (``float``) before it starts.
        length: Steps or fraction of the run from its start to its end.

    Returns:
        (first step, number of steps). Fractions that fit together always do, however short the run: ``hold`` is rounded
        down, and a ``length`` above 0 is at least one step.

    Raises:
        ValueError: As for ``transition``.
    """
    known = total is not None and math.isfinite(total) and total >= 0
    for name, value in (("hold", hold), ("length", length)):
        _check(name, value, known)
    run = total if known and total is not None else 0
    first = hold if isinstance(hold, int) else math.floor(hold * run + 1e-9)
    if isinstance(length, int):
        span = length
    elif isinstance(hold, int):
        span = max(round(length * run), 1) if length > 0 else 0
    elif length > 0:
        # Rounded where it ends, not in how long it is, so that 0.2 and 0.8 make a whole in a run of 2 steps.
        first = min(first, run - 1) if hold + length <= 1 else first
        span = max(round((hold + length) * run) - first, 1)
    else:
        span = 0
    if known and first + span > run:
        raise ValueError(
            f"The transition ends at step {first + span} (`hold`={hold!r} and `length`={length!r}, together), but the "
            f"run has {total}: it would end half way. Shorten it, for example to `length`=0.8."
        )
    return first, span


def _check(name: str, value: int | float, known: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{name}` must be steps (int) or a fraction of the run (float); got {value!r}.")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"`{name}` must not be negative; got {value} steps.")
    elif not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` as a fraction of the run must be within [0, 1]; got {value}. Steps are an int.")
    elif not known:
        raise ValueError(
            f"`{name}`={value} is a fraction of the run, but the run's length is unknown. Set `max_steps` or "
            f"`max_epochs`, or give `{name}` in steps, as an int."
        )


def moments(total: int | None, start: int | float, every: int | float, rounds: int) -> tuple[int, ...]:
    """The steps before which something happens ``rounds`` times.

    Args:
        total: Optimizer steps in the run; None: unknown, which only works for steps. A run of none has no moments.
        start: Of the first: steps (``int``) or a fraction of the run (``float``).
        every: From one to the next, likewise; at least one step.
        rounds: How often.

    Returns:
        Ascending steps, all before the end of the run.

    Raises:
        ValueError: A fraction is given for a run of unknown length, a value is out of range, or the last moment lies at
            the end of the run or beyond it.
    """
    known = total is not None and math.isfinite(total) and total >= 0
    _check("start", start, known)
    if rounds > 1:
        _check("every", every, known)
    if total == 0:
        return ()
    run = total if known and total is not None else 0
    first = start if isinstance(start, int) else math.floor(start * run + 1e-9)
    apart = max(every if isinstance(every, int) else math.floor(every * run + 1e-9), 1)
    steps = tuple(first + i * apart for i in range(rounds))
    if known and steps[-1] >= run:
        raise ValueError(
            f"`start`={start!r}, `every`={every!r} and {rounds} rounds make the last one begin at step {steps[-1]}, "
            f"but the run has {total}. Start earlier, or have fewer rounds."
        )
    return steps
