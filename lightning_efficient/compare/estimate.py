"""A mean over runs with its 95 % interval: nothing is claimed from one run, and no diverged run is left out."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit  # type: ignore[import-untyped]


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
        return float(stdtrit(n - 1, 0.975)) * statistics.stdev(self.values) / math.sqrt(n)

    def show(self, sign: str = "") -> str:
        """For people; ``sign="+"`` also signs positive means."""
        if not self.values:
            return "not logged"
        if not self.finite:
            bad = sum(not math.isfinite(value) for value in self.values)
            return f"nan in {bad} of {len(self.values)}"
        if not self.half_width:
            return f"{self.mean:{sign}.4g}" + ("" if self.half_width is None else " ± 0")
        # As many decimals as two digits of the half-width have: more would pretend to be known.
        decimals = max(0, 1 - math.floor(math.log10(self.half_width)))
        if decimals > 6:
            return f"{self.mean:{sign}.3e} ± {self.half_width:.1e}"
        return f"{self.mean:{sign}.{decimals}f} ± {self.half_width:.{decimals}f}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is not finite is ``None``."""
        return {
            "mean": json_number(self.mean),
            "half_width_95": self.half_width,
            "n": len(self.values),
            "values": list(map(json_number, self.values)),
        }


def json_number(value: float | None) -> float | None:
    """The value, or ``None`` where JSON has no number for it (nan, infinity)."""
    return value if value is not None and math.isfinite(value) else None
