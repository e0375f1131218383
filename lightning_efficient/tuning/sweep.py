"""``tune_temperature``: score a model at several temperatures, and choose one only where the data say so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from lightning_efficient.attention.temperature import (
    Targets,
    TempScaleConfig,
    find_targets,
    install_targets,
    remove_temp_scale,
)
from lightning_efficient.common.escaping import picture_text, rich_text
from lightning_efficient.common.running import evaluating
from lightning_efficient.tuning.bootstrap import Array, Paired, compare_paired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TAUS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
FEW = 30  # below so many units a bootstrap interval is rough


@dataclass(frozen=True)
class SweepRow:
    """One temperature.

    Args:
        tau: The temperature.
        score: Mean over units.
        difference: To the score at 1; positive is better.
        low: Lower end of the interval of the difference; the intervals of all rows hold at once. NaN where there is one
            unit only.
        high: Upper end.
    """

    tau: float
    score: float
    difference: float
    low: float
    high: float

    @property
    def beats(self) -> bool:
        """Whether it is better than 1 beyond noise."""
        return self.low > 0

    @property
    def loses(self) -> bool:
        """Whether it is worse than 1 beyond noise."""
        return self.high < 0


@dataclass(frozen=True)
class TemperatureSweep:
    """What ``tune_temperature`` found.

    Args:
        rows: One a temperature, falling.
        scores: ``(temperatures, units)``, as given.
        maximize: Whether higher scores are better.
        metric: What the scores are.
        unit: What there is one score of: ``"queries"``, ``"samples"``, ``"batches"``.
        confidence: Of all intervals together.
        note: Something to know about the scores.
    """

    rows: list[SweepRow]
    scores: Array
    maximize: bool
    metric: str
    unit: str
    confidence: float
    note: str = ""

    @property
    def plain(self) -> SweepRow:
        """The model as it is."""
        return next(row for row in self.rows if row.tau == 1.0)

    @property
    def best(self) -> SweepRow:
        """The temperature with the best mean; where several have it, the one nearest to 1. May be luck."""
        return max(self.rows, key=lambda row: (row.difference, -abs(math.log(row.tau))))

    @property
    def tau(self) -> float:
        """What to use: the best temperature if it beats 1 beyond noise, else 1."""
        return self.best.tau if self.best.beats else 1.0

    @property
    def verdict(self) -> str:
        """The result in plain words."""
        best, plain, units = self.best, self.plain, self.scores.shape[1]
        over, none = f"over {units} {self.unit}", "No evidence that any τ beats 1"
        if best.tau == 1.0:
            text = f"{none}: τ = 1, the model as it is, has the best {self.metric}, {plain.score:.4g}. Keep it."
        elif units < 2:
            text = (
                f"{none}: there is one number per τ, and nothing to tell a gain from noise. τ = {best.tau:g} has the "
                f"best {self.metric}, {best.score:.4g} against {plain.score:.4g}: a hint at most."
            )
        elif not best.beats:
            text = (
                f"{none}: the best, τ = {best.tau:g}, changes {self.metric} by {self._signed(best)} {over}, which is "
                "within noise. Keep τ = 1."
            )
        else:
            text = (
                f"τ = {best.tau:g} beats 1: {self.metric} {best.score:.4g} against {plain.score:.4g}, "
                f"{self._signed(best)} {over}. These {self.unit} chose it, so measure the gain on others."
            )
            if best in (self.rows[0], self.rows[-1]):
                text += f" It is the end of the sweep: try τ beyond {best.tau:g}."
        if worse := [f"{row.tau:g}" for row in self.rows if row.loses]:
            text += f" Worse than 1 beyond noise: τ = {', '.join(worse)}."
        if 2 <= units < FEW:
            text += f" There are {units} {self.unit} only: the intervals are rough."
        return f"{text} {self.note}".strip()

    def _signed(self, row: SweepRow) -> str:
        sign = 1.0 if self.maximize else -1.0
        low, high = sorted((sign * row.low, sign * row.high))
        return f"{sign * row.difference:+.2g} [{low:+.2g}, {high:+.2g}]"

    def table(self) -> Table:
        """The curve as a rich table."""
        percent = f"{100 * self.confidence:g} %"
        table = Table(title=rich_text(f"{self.metric} by temperature, {self.scores.shape[1]} {self.unit}"))
        table.caption = f"intervals: paired bootstrap over {self.unit}, {percent} for all rows at once"
        for heading in ("τ", self.metric, f"minus τ = 1, {percent}", ""):
            table.add_column(rich_text(heading), justify="right" if heading else "left")
        for row in self.rows:
            known = row.tau != 1.0 and not math.isnan(row.low)
            gap = self._signed(row) if known else "" if row.tau == 1.0 else f"{row.difference:+.2g}"
            said = "unchanged" if row.tau == 1.0 else "better" if row.beats else "worse" if row.loses else "noise"
            table.add_row(f"{row.tau:g}", f"{row.score:.4g}", gap, said if known or row.tau == 1.0 else "unknown")
        return table

    def figure(self) -> Figure:
        """The curve with its intervals, not attached to any window."""
        from matplotlib.figure import Figure

        sign = 1.0 if self.maximize else -1.0
        figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
        axes = figure.subplots()
        taus, gaps = [row.tau for row in self.rows], [sign * row.difference for row in self.rows]
        halves = [0.0 if math.isnan(row.high) else row.high - row.difference for row in self.rows]
        axes.axhline(0.0, color="black", linewidth=1, linestyle="--")
        axes.errorbar(taus, gaps, yerr=halves, marker="o", markersize=5, capsize=3, color="#0072B2")
        axes.set_xticks(taus, [f"{tau:g}" for tau in taus])
        axes.set_xlabel("temperature τ (1: the model as it is)")
        axes.set_ylabel(picture_text(f"{self.metric} minus its value at τ = 1, {self.plain.score:.4g}"))
        better = "higher" if self.maximize else "lower"
        title = f"τ = {self.tau:g} beats 1" if self.tau != 1.0 else "no evidence that any τ beats 1"
        axes.set_title(f"{title} ({self.scores.shape[1]} {self.unit}; {better} is better)", fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data, each unit's scores included."""
        rows = [{k: None if math.isnan(v) else v for k, v in vars(row).items()} for row in self.rows]
        return {
            "metric": self.metric,
            "unit": self.unit,
            "maximize": self.maximize,
            "confidence": self.confidence,
            "tau": self.tau,
            "verdict": self.verdict,
            "rows": rows,
            "scores": self.scores.tolist(),
        }


def tune_temperature(
    model: nn.Module,
    score: Callable[[nn.Module], Any],
    example: Any,
    taus: Sequence[float] = TAUS,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    maximize: bool = True,
    metric: str = "score",
    unit: str = "samples",
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> TemperatureSweep:
    """Score a model at several temperatures of its attention, and say which is best, or that none is.

    The model runs in evaluation mode without gradients, from the same random state at each temperature, and is left as
    it was, to the bit, whatever happens. Choose on validation data, and report on other data.

    Args:
        model: Any model whose attention can be scaled exactly.
        score: ``score(model)`` gives one number per query or sample, the same ones in the same order each time
            (:func:`retrieval_scores` and :func:`classification_scores` make such functions). A single number works, but
            nothing then tells a gain from noise.
        example: See :func:`lightning_efficient.functional.apply_temp_scale`.
        taus: Temperatures, above 0; 1 is added where it is missing.
        include: Globs over the names of attention modules; ``None``: all.
        exclude: Globs over names left alone.
        maximize: Whether higher scores are better.
        metric: What the scores are, for the report.
        unit: What there is one score of, for the report.
        resamples: Bootstrap samples.
        confidence: Of all intervals together.
        seed: Of the bootstrap, and of torch before each scoring.

    Returns:
        The curve; ``print(sweep.verdict)``, ``sweep.table()``, ``sweep.figure()``, ``sweep.tau``.

    Raises:
        ValueError: ``taus`` is empty or holds something that is no temperature; scores that are not finite, or of
            another number at another temperature; what :func:`apply_temp_scale` refuses.
        TypeError: ``taus`` is not a sequence of numbers, or ``score`` does not give numbers.
    """
    find = partial(_found, model, example, include, exclude)
    return sweep(
        model, score, find, taus, maximize=maximize, metric=metric, unit=unit, resamples=resamples,
        confidence=confidence, seed=seed,
    )  # fmt: skip


def sweep(
    model: nn.Module,
    score: Callable[[nn.Module], Any],
    find: Callable[[float], Targets],
    taus: Sequence[float],
    *,
    maximize: bool,
    metric: str,
    unit: str,
    weights: Callable[[], Sequence[float]] | None = None,
    note: str = "",
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> TemperatureSweep:
    """The sweep behind :func:`tune_temperature`, for targets found another way.

    Args:
        model: See there.
        score: See there.
        find: What to change for a temperature other than 1.
        taus: See there.
        maximize: See there.
        metric: See there.
        unit: See there.
        weights: Of the units in the mean, asked for after the first scoring.
        note: Added to the verdict.
        resamples: See there.
        confidence: See there.
        seed: See there.
    """
    chosen = checked_taus(taus)
    targets = {tau: find(tau) for tau in chosen if tau != 1.0}  # whatever is refused is refused before any scoring
    scores: list[Array] = []
    for tau in chosen:
        with evaluating(model), tempered(model, targets.get(tau)):
            torch.manual_seed(seed)
            scores.append(_numbers(score(model), tau))
        if len(scores[-1]) != len(scores[0]):
            raise ValueError(
                f"`score` gave {len(scores[-1])} numbers at τ = {tau:g} and {len(scores[0])} at {chosen[0]:g}; "
                "expected one for each of the same queries or samples."
            )
    table = np.stack(scores)
    found = compare_paired(
        table if maximize else -table,
        baseline=chosen.index(1.0),
        weights=None if weights is None else np.asarray(weights(), dtype=np.float64),
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
    return TemperatureSweep(_rows(chosen, found, maximize), table, maximize, metric, unit, confidence, note)


def checked_taus(taus: Sequence[float]) -> list[float]:
    """The temperatures of a sweep, falling, with 1 among them.

    Args:
        taus: As the user gave them.

    Raises:
        ValueError: There are none, or one is not a finite number above 0.
        TypeError: Not a sequence.
    """
    if isinstance(taus, str | float | int) or not hasattr(taus, "__iter__"):
        raise TypeError(f"`taus` is {taus!r}; expected several temperatures, such as {list(TAUS)}.")
    given = list(taus)
    if not given:
        raise ValueError(f"`taus` is empty; expected temperatures, such as {list(TAUS)}.")
    TempScaleConfig(given)
    return sorted({1.0, *map(float, given)}, reverse=True)


@contextmanager
def tempered(model: nn.Module, targets: Targets | None) -> Iterator[None]:
    """The model at a temperature for a while; then as it was, to the bit.

    Args:
        model: The model.
        targets: What to change; ``None``: nothing.
    """
    if targets is None:
        yield
        return
    install_targets(model, targets)
    try:
        yield
    finally:
        remove_temp_scale(model)


def _found(
    model: nn.Module, example: Any, include: Sequence[str] | None, exclude: Sequence[str] | None, tau: float
) -> Targets:
    return find_targets(model, example, TempScaleConfig(tau), include, exclude)


def _numbers(given: Any, tau: float) -> Array:
    try:
        numbers = torch.as_tensor(given).detach().double().cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`score` gave {type(given).__name__} at τ = {tau:g}; expected a tensor or list with one number per query "
            "or sample."
        ) from error
    if numbers.ndim > 1 or not numbers.size:
        raise ValueError(f"`score` gave shape {numbers.shape} at τ = {tau:g}; expected (queries or samples,).")
    numbers = np.atleast_1d(numbers)
    if bad := int((~np.isfinite(numbers)).sum()):
        raise ValueError(f"`score` gave {bad} of {numbers.size} numbers that are not finite at τ = {tau:g}.")
    return np.asarray(numbers, dtype=np.float64)


def _rows(taus: Sequence[float], found: Paired, maximize: bool) -> list[SweepRow]:
    means = found.mean if maximize else -found.mean
    columns = zip(taus, means, found.difference, found.low, found.high, strict=True)
    return [SweepRow(*map(float, row)) for row in columns]
