"""Performance budgets: how much worse each metric may become, relative to a baseline, and how that is shared out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_efficient.common.names import direction

MODES = ("min", "max")


@dataclass(frozen=True)
class Budget:
    """How much worse one metric may become.

    Args:
        metric: Its name.
        share: Of the baseline's absolute value: 0.05 lets a loss of 2.0 rise to 2.1, or an accuracy of 0.9 fall to
            0.855.
        mode: Whether ``"min"`` or ``"max"`` of it is better.
    """

    metric: str
    share: float
    mode: Literal["min", "max"] = "min"

    def cost(self, value: float, baseline: float) -> float:
        """How the metric stands: 1 at the baseline, ``1 + share`` where the budget is used up, infinity for NaN.

        Args:
            value: Of the metric now.
            baseline: Of the metric before; a share of 0 is 0, so then nothing may become worse.
        """
        worse = value - baseline if self.mode == "min" else baseline - value
        if math.isnan(worse):
            return math.inf
        if baseline == 0:
            return 1.0 if worse <= 0 else math.inf
        return 1.0 + worse / abs(baseline)

    def within(self, value: float, baseline: float) -> bool:
        """Whether the budget is kept."""
        return self.cost(value, baseline) <= (1.0 + self.share) * (1 + 1e-12)


def read_budgets(budgets: Mapping[str, float], modes: Mapping[str, str] | None = None) -> tuple[Budget, ...]:
    """Check what a user wrote.

    Args:
        budgets: Metric → share of its baseline by which it may become worse.
        modes: Metric → ``"min"`` or ``"max"``; else as its name tells (``val_acc``: max), and then ``"min"``.

    Raises:
        ValueError: There is no budget, a share is not a positive number (or not below 1 for ``"max"``), or a mode is
            unknown or of no budget.
    """
    if not isinstance(budgets, Mapping) or not budgets:
        raise ValueError(
            f"`budgets` maps logged metrics to how much worse each may become, such as {{'val_loss': 0.05}}; got "
            f"{budgets!r}."
        )
    modes = modes or {}
    if strangers := sorted(set(modes) - set(budgets)):
        raise ValueError(f"`modes` names {strangers}, for which there is no budget; `budgets` has {sorted(budgets)}.")
    out = []
    for metric, share in budgets.items():
        mode = modes.get(metric) or direction(str(metric)) or "min"
        if mode not in MODES:
            raise ValueError(f"`modes[{metric!r}]` must be one of {MODES}; got {mode!r}.")
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not number or not 0 < share < math.inf:
            raise ValueError(
                f"`budgets[{metric!r}]` is a share of the metric's value, a number above 0 such as 0.05; got {share!r}."
            )
        if mode == "max" and share >= 1:
            raise ValueError(
                f"`budgets[{metric!r}]`={share!r} with mode 'max' would let the metric fall to 0. Give a share below 1."
            )
        out.append(Budget(str(metric), float(share), "max" if mode == "max" else "min"))
    return tuple(out)


def decay(share: float, first: float, count: int) -> float:
    """``λ`` for which ``∏(1 + first · λ^i) = 1 + share``, ``i < count``: the tolerances then make up the budget.

    Args:
        share: The budget.
        first: The first tolerance, at most the budget.
        count: How many tolerances there are.

    Returns:
        At least 0; 1 where all are equal. With one tolerance, which then is the budget, 1.

    Raises:
        ValueError: The first tolerance is above the budget, or below it and alone.
    """
    if not 0 < first <= share * (1 + 1e-12) or count < 1 or (count == 1 and first < share * (1 - 1e-12)):
        raise ValueError(f"tolerances that begin with {first} cannot make up a budget of {share} in {count} steps.")
    if count == 1:
        return 1.0

    def missing(rate: float) -> float:
        return sum(math.log1p(first * rate**i) for i in range(count)) - math.log1p(share)

    if missing(0.0) >= 0:
        return 0.0
    high = 1.0
    while missing(high) < 0:
        high *= 2
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    return float(brentq(missing, 0.0, high, xtol=1e-15, rtol=1e-14))


def tolerances(share: float, count: int, first: float = 1.5) -> list[float]:
    """How much worse each of several steps may make a metric, relative to what it was before the step.

    Args:
        share: The budget that all steps together make up: ``∏(1 + tolerance) = 1 + share``.
        count: Number of steps.
        first: Tolerance of the first step in multiples of an equal share, ``(1 + share)^(1/count) - 1``; at most the
            whole budget. Above 1 they fall geometrically, below 1 they rise.

    Returns:
        ``count`` tolerances.
    """
    if count < 1:
        return []
    begin = share if count == 1 else min(first * math.expm1(math.log1p(share) / count), share)
    rate = decay(share, begin, count)
    return [begin * rate**i for i in range(count)]
