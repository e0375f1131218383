"""A schedule that waits while training is in trouble: pure rules, without anything of a Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median, quantiles
from typing import Any, Literal

# Of fewer values one cannot say what is normal.
ENOUGH = 20


class JumpGuard:
    """Notices that a quantity leaves the range of its recent past.

    Two rules, as the quantities differ. ``"scale"``, for what is positive and varies by factors (a gradient norm): more
    than ``factor`` times the median. ``"shift"``, for what may be negative or close to 0 (a loss): more than ``factor``
    times the span between the 10th and the 90th percentile above the median. A value that is not finite is always a
    jump, also before there are enough values to compare with, and does not enter the past.

    Args:
        factor: How far a value must be out of range.
        window: How many of the latest values make the past; a level that stays becomes normal within half of it.

    Raises:
        ValueError: ``factor`` is not above 1, or ``window`` is below 20.
    """

    def __init__(self, factor: float = 5.0, window: int = 100) -> None:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 < factor < math.inf:
            raise ValueError(f"the guard's `factor` must be a number above 1; got {factor!r}.")
        if isinstance(window, bool) or not isinstance(window, int) or window < ENOUGH:
            raise ValueError(f"the guard's `window` must be an integer from {ENOUGH}; got {window!r}.")
        self.factor = float(factor)
        self.window = window
        self.jumps = 0
        self._past: dict[str, list[float]] = {}

    def observe(self, name: str, value: float, rule: Literal["scale", "shift"]) -> str:
        """Compare a value with its past, then make it part of it.

        Args:
            name: Which quantity.
            value: Its latest value.
            rule: How to compare it.

        Returns:
            What is wrong, for a log; empty if nothing is.
        """
        past = self._past.setdefault(name, [])
        if not math.isfinite(value):
            self.jumps += 1
            return f"{name} is {value}"
        why = ""
        if len(past) >= ENOUGH:
            middle = median(past)
            if rule == "scale" and value > self.factor * middle:
                why = f"{name} is {value:.3g}, {value / middle if middle else math.inf:.1f} times its recent median"
            elif rule == "shift":
                tenths = quantiles(past, n=10, method="inclusive")
                span = tenths[-1] - tenths[0]
                if value - middle > self.factor * span:
                    why = f"{name} is {value:.3g}, out of its recent range {tenths[0]:.3g} to {tenths[-1]:.3g}"
        past.append(value)
        del past[: -self.window]
        self.jumps += bool(why)
        return why

    def state_dict(self) -> dict[str, Any]:
        """The past and the count, as plain data."""
        return {"jumps": self.jumps, "past": {name: list(values) for name, values in self._past.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.jumps = int(state["jumps"])
        self._past = {name: [float(v) for v in values] for name, values in state["past"].items()}


class Clock:
    """The time of a schedule that can be stopped and set back: it runs with the steps, except while it is held.

    Two numbers determine it, so that it stays a pure function of the step between two holds.
    """

    def __init__(self) -> None:
        self._step = 0
        self._time = 0

    def at(self, step: int) -> int:
        """The time at an optimizer step."""
        return self._time + max(0, step - self._step)

    def hold(self, step: int, length: int, back: int = 0, earliest: int = 0) -> None:
        """Stand still from ``step`` on, for ``length`` steps.

        Args:
            step: The current step.
            length: How many steps to stand still; a hold during another one takes its place.
            back: How far to set the time back first.
            earliest: Not further than to here.
        """
        now = self.at(step)
        self._step, self._time = step + length, max(now - back, min(now, earliest))

    def state_dict(self) -> dict[str, int]:
        """Plain data."""
        return {"step": self._step, "time": self._time}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there."""
        self._step, self._time = int(state["step"]), int(state["time"])
