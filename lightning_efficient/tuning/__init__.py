"""Choosing attention's temperature on data, and saying when the data do not tell."""

from lightning_efficient.tuning.bootstrap import Paired, compare_paired
from lightning_efficient.tuning.scores import classification_scores, retrieval_scores
from lightning_efficient.tuning.sweep import TAUS, SweepRow, TemperatureSweep, tune_temperature

__all__ = [
    "TAUS",
    "Paired",
    "SweepRow",
    "TemperatureSweep",
    "classification_scores",
    "compare_paired",
    "retrieval_scores",
    "tune_temperature",
]
