"""Training runs side by side, from their logs: reading, estimating, drawing."""

from lightning_efficient.compare.comparison import Comparison, Row, compare
from lightning_efficient.compare.estimate import Difference, Estimate
from lightning_efficient.compare.logs import Run, Series, read_runs
from lightning_efficient.compare.quantities import ENTROPY, Quantity, best, final
from lightning_efficient.compare.verdict import Verdict

__all__ = [
    "ENTROPY",
    "Comparison",
    "Difference",
    "Estimate",
    "Quantity",
    "Row",
    "Run",
    "Series",
    "Verdict",
    "best",
    "compare",
    "final",
    "read_runs",
]
