"""Training runs side by side, from their logs: reading, estimating, drawing."""

from lightning_efficient.compare.comparison import ENTROPY, Comparison, Row, best, compare, final
from lightning_efficient.compare.estimate import Estimate
from lightning_efficient.compare.logs import Run, Series, read_runs

__all__ = [
    "ENTROPY",
    "Comparison",
    "Estimate",
    "Row",
    "Run",
    "Series",
    "best",
    "compare",
    "final",
    "read_runs",
]
