"""Means over runs, differences between variants, and how sure they are: nothing is claimed from one run, and no
diverged run is left out.

Intervals are Student's t and not bootstrap intervals: with 3 seeds the percentile bootstrap calls two identical
variants different in a quarter of all trials instead of in 5 %, with 10 in a tenth, and BCa is no better. The t
interval keeps its level from 3 seeds on, for skewed, heavy-tailed and rounded metrics too, since the difference of two
equally distributed runs is symmetric. So does an exact sign-flip test, which can say nothing below 6 seeds. Measured in
``benchmarks/results/interval_level.md``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEVEL = 0.05
_ROUNDING = 1e-6  # of what is logged, which is float32, relative to its size


@dataclass(frozen=True)
class Estimate:
    """A mean over runs and how sure it is.

    Args:
        values: One per run; may be empty.
    """

    values: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether every run gave a number: a mean that leaves out diverged runs would flatter."""
        return all(map(math.isfinite, self.values))

    @property
    def mean(self) -> float:
        """Mean over the runs; nan if one of them is not finite, or there is none."""
        return statistics.fmean(self.values) if self.values and self.finite else math.nan

    @property
    def half_width(self) -> float | None:
        """Of the 95 % Student-t interval of the mean; ``None`` for a single run, or one that is not finite."""
        n = len(self.values)
        if n < 2 or not self.finite:
            return None
        return _quantile(n - 1) * statistics.stdev(self.values) / math.sqrt(n)

    def show(self, sign: str = "") -> str:
        """For people; ``sign="+"`` also signs positive means."""
        if not self.values:
            return "not logged"
        if not self.finite:
            bad = sum(not math.isfinite(value) for value in self.values)
            return f"nan in {bad} of {len(self.values)}"
        return plus_minus(self.mean, self.half_width, sign)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is not finite is ``None``."""
        return {
            "mean": json_number(self.mean),
            "half_width_95": self.half_width,
            "n": len(self.values),
            "values": list(map(json_number, self.values)),
        }


@dataclass(frozen=True)
class Difference:
    """What a variant has more than the baseline: a difference of means, or a ratio of geometric means.

    Paired by seed where both have the seeds (then a t interval over the differences), otherwise of two independent
    groups (Welch's t interval).

    Args:
        before: Values of the baseline, one a run; of a pair at the same place as in ``after``.
        after: Values of the variant.
        paired: Whether they belong together one by one.
        ratio: Compare by ratio instead: for times and sizes, which are positive.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    paired: bool
    ratio: bool = False

    @property
    def values(self) -> tuple[float, ...]:
        """A difference (or ratio) a pair; empty for independent groups."""
        if not self.paired:
            return ()
        pairs = zip(self.before, self.after, strict=True)
        return tuple((b / a if a else math.nan) if self.ratio else b - a for a, b in pairs)

    @property
    def seeds(self) -> int:
        """Pairs, or runs of the smaller group."""
        return min(len(self.before), len(self.after))

    @property
    def mean(self) -> float:
        """Difference of the means or ratio of the geometric means; nan if a run is not finite."""
        return self._back(self._centre_and_error()[0])

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval of the mean; ``None`` without one, and for ratios, whose interval is lopsided."""
        return None if self.ratio else self._half_width()

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the 95 % interval; ``None`` for a single run a side, or one that is not finite."""
        half = self._half_width()
        centre = self._centre_and_error()[0]
        return None if half is None else (self._back(centre - half), self._back(centre + half))

    @property
    def p_value(self) -> float | None:
        """Two-sided, of no difference; ``None`` without an interval, or if the runs do not vary at all."""
        centre, error, freedom = self._centre_and_error()
        if freedom <= 0 or not error or not math.isfinite(centre):
            return None
        from scipy.special import stdtr  # type: ignore[import-untyped]

        return float(2 * stdtr(freedom, -abs(centre) / error))

    @property
    def constant(self) -> bool:
        """Whether runs do not vary, but for rounding: one difference for all pairs, or one value for each group."""
        groups = (self.values,) if self.paired else (self.before, self.after)
        size = 1.0 if self.ratio and self.paired else max(map(abs, (*self.before, *self.after)), default=0.0)
        return all(not group or max(group) - min(group) <= _ROUNDING * size for group in groups)

    @property
    def vague(self) -> bool:
        """Whether a ratio's interval means nothing: its ends differ by more than a factor of two."""
        return self.ratio and self.interval is not None and self.interval[1] > 2 * self.interval[0]

    def show(self) -> str:
        """For people."""
        if not math.isfinite(self.mean):
            return "nan"
        if self.constant and self.mean and self.seeds > 1 and not self.ratio:
            return f"{self.mean:+.4g}, " + ("in every pair" if self.paired else "no run varies")
        if not self.ratio:
            return plus_minus(self.mean, self.half_width, "+")
        if self.interval is None or self.constant:
            return f"× {self.mean:.3f}"
        low, high = self.interval
        if self.vague:
            return "too noisy to tell"
        places = min(3, _decimals((high - low) / 2))
        return f"× {self.mean:.{places}f} ({low:.{places}f}–{high:.{places}f})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is not finite is ``None``."""
        low, high = self.interval or (None, None)
        return {
            "mean": json_number(self.mean),
            "half_width_95": self.half_width,
            "low_95": low,
            "high_95": high,
            "p": self.p_value,
            "n": self.seeds,
            "values": list(map(json_number, self.values)),
            "paired": self.paired,
            "ratio": self.ratio,
        }

    def _half_width(self) -> float | None:
        centre, error, freedom = self._centre_and_error()
        return _quantile(freedom) * error if freedom > 0 and math.isfinite(centre) else None

    def _centre_and_error(self) -> tuple[float, float, float]:
        """Difference of the means, its standard error, degrees of freedom (0: unknown), of logarithms for ratios."""
        before, after = map(self._scaled, (self.before, self.after))
        if not all(map(math.isfinite, (*before, *after))):
            return math.nan, math.nan, 0.0
        centre = statistics.fmean(after) - statistics.fmean(before)
        if self.seeds < 2:
            return centre, math.nan, 0.0
        if self.constant:
            return centre, 0.0, self.seeds - 1.0
        if self.paired:
            gaps = [b - a for a, b in zip(before, after, strict=True)]
            return centre, statistics.stdev(gaps) / math.sqrt(len(gaps)), len(gaps) - 1.0
        squares = [statistics.variance(group) / len(group) for group in (before, after)]
        total = sum(squares)
        # Welch and Satterthwaite
        freedom = total**2 / sum(s**2 / (len(g) - 1) for s, g in zip(squares, (before, after), strict=True))
        return centre, math.sqrt(total), freedom

    def _scaled(self, values: Sequence[float]) -> list[float]:
        return [(math.log(v) if v > 0 else math.nan) if self.ratio else v for v in values]

    def _back(self, value: float) -> float:
        return math.exp(value) if self.ratio else value


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number: at most the stated share of whole families has a false one (Holm 1979).

    Args:
        p_values: One a comparison.

    Returns:
        Corrected ones, in the same order.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def plus_minus(mean: float, half_width: float | None, sign: str = "") -> str:
    """Such as ``0.715 ± 0.043``: with no more digits than the half-width lets know.

    Args:
        mean: A finite number.
        half_width: Of its interval; ``None``: there is none.
        sign: ``"+"`` also signs positive means.
    """
    if not half_width:
        return f"{mean:{sign}{',.0f' if abs(mean) >= 1e4 else '.4g'}}" + ("" if half_width is None else " ± 0")
    if (places := _decimals(half_width)) > 6:
        return f"{mean:{sign}.3e} ± {half_width:.1e}"
    return f"{mean:{sign}.{places}f} ± {half_width:.{places}f}"


def _decimals(half_width: float) -> int:
    """As many decimals as two digits of the half-width have: more would pretend to be known."""
    return max(0, 1 - math.floor(math.log10(half_width)))


def _quantile(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - LEVEL / 2))


def json_number(value: float | None) -> float | None:
    """The value, or ``None`` where JSON has no number for it (nan, infinity)."""
    return value if value is not None and math.isfinite(value) else None
