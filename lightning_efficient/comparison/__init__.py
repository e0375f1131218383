"""Training runs side by side, from their logs: reading, estimating, drawing."""

from __future__ import annotations

from lightning_efficient.comparison.comparison import Comparison, ComparisonRow, compare
from lightning_efficient.comparison.estimate import Difference, Estimate
from lightning_efficient.comparison.logs import Run, Series, read_runs
from lightning_efficient.comparison.quantities import ENTROPY, Quantity, best, final
from lightning_efficient.comparison.verdict import Verdict

__all__ = [
    "ENTROPY",
    "Comparison",
    "Difference",
    "Estimate",
    "Quantity",
    "ComparisonRow",
    "Run",
    "Series",
    "Verdict",
    "best",
    "compare",
    "final",
    "read_runs",
]
