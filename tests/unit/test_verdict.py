"""Differences, their correction and the verdicts: against scipy, brute force, and many trials of pure noise."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_efficient.comparison import Comparison, Difference, Run, Series
from lightning_efficient.comparison.estimate import holm

A, B = (0.91, 0.93, 0.90, 0.94), (0.95, 0.94, 0.96, 0.99)


def comparison(values: dict[str, dict[int, float]], metric: str = "val_acc", better: str | None = "max") -> Comparison:
    """Runs that logged one value each, as ``compare`` would read them."""
    runs = [
        Run(Path(name) / f"seed_{seed}", name, f"seed_{seed}", {metric: Series([10], [value])})
        for name, seeds in values.items()
        for seed, value in seeds.items()
    ]
    return Comparison(runs, [metric], "baseline", {metric: better})


def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_paired_differences_are_scipys() -> None:
    found, reference = Difference(A, B, paired=True), stats.ttest_rel(B, A)
    assert found.mean == pytest.approx(np.mean(B) - np.mean(A))
    assert found.interval == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-9)
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-9)


def test_independent_groups_are_scipys() -> None:
    found, reference = Difference(A[:3], B, paired=False), stats.ttest_ind(B, A[:3], equal_var=False)
    assert found.interval == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-9)
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-9)


def test_ratios_are_scipys_on_logarithms() -> None:
    found = Difference(A, B, paired=True, ratio=True)
    reference = stats.ttest_rel(np.log(B), np.log(A)).confidence_interval(0.95)
    assert found.mean == pytest.approx(stats.gmean(B) / stats.gmean(A))
    assert found.interval == pytest.approx((math.exp(reference.low), math.exp(reference.high)), rel=1e-9)
    assert found.half_width is None
    assert found.show() == "× 1.043 (1.006–1.082)"
    assert Difference((2.0, 3.0), (4.0, 6.0), paired=True, ratio=True).show() == "× 2.000"
    assert Difference((0.0, 3.0), (4.0, 6.0), paired=True, ratio=True).show() == "nan"


def test_holm_is_the_closed_bonferroni_test() -> None:
    """Holm's corrected p is the largest Bonferroni p over all sub-families that hold the comparison."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5):
        p = rng.random(count) ** 3
        families = [set(f) for k in range(1, count + 1) for f in combinations(range(count), k)]
        for i, corrected in enumerate(holm(p)):
            worst = max(min(1.0, len(f) * min(p[j] for j in f)) for f in families if i in f)
            assert corrected == pytest.approx(worst)
    assert holm([]) == []


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("paired", [True, False])
def test_noise_is_called_noise(count: int, paired: bool) -> None:
    """Two identical variants in 1000 trials: a difference is called at most about as often as stated, 5 %."""
    rng, calls = np.random.default_rng(count), Counter[str]()
    for noise in rng.standard_normal((1000, 2, count)):
        offset = 0 if paired else 100
        variant = {seed + offset: value for seed, value in enumerate(noise[1])}
        (verdict,) = comparison({"baseline": seeds(*noise[0]), "same": variant}).verdicts()
        calls[verdict.call] += 1
    called = calls["better"] + calls["worse"]
    assert called == 1000 - calls["none"]
    assert stats.binomtest(called, 1000, 0.05, alternative="greater").pvalue > 0.001
    assert called > 10  # a test that never calls anything would pass the line above


def test_noise_among_five_variants_is_called_noise() -> None:
    """At least one false call in the family of five, in at most about 5 % of trials; without correction 16 %."""
    rng, wrong = np.random.default_rng(0), 0
    for noise in rng.standard_normal((400, 6, 4)):
        names = ["baseline", *"abcde"]
        found = comparison({name: seeds(*row) for name, row in zip(names, noise, strict=True)}).verdicts()
        assert {verdict.comparisons for verdict in found} == {5}
        wrong += any(verdict.call != "none" for verdict in found)
    assert stats.binomtest(wrong, 400, 0.05, alternative="greater").pvalue > 0.001


def test_a_real_difference_is_called() -> None:
    (up,) = comparison({"baseline": seeds(0.90, 0.91, 0.92), "a": seeds(0.95, 0.955, 0.97)}).verdicts()
    assert (up.call, up.text) == ("better", "Better than baseline with 3 seeds: val_acc, final +0.0483 ± 0.0072.")
    assert up.p_corrected == pytest.approx(stats.ttest_rel([0.95, 0.955, 0.97], [0.90, 0.91, 0.92]).pvalue)
    lost = {"baseline": seeds(0.90, 0.91, 0.92), "a": seeds(0.95, 0.955, 0.97)}
    assert [v.call for v in comparison(lost, "val_loss", "min").verdicts()] == ["worse"]
    assert [v.call for v in comparison(lost, "score", None).verdicts()] == ["higher"]


@pytest.mark.parametrize(
    ("before", "after", "call", "text"),
    [
        (seeds(0.5), seeds(0.6), "open", "No verdict from 1 seed: val_acc, final +0.1;"),
        (seeds(0.5, 0.6), seeds(0.8, 0.9001), "open", "No verdict from 2 seeds"),
        (seeds(0.5, 0.6, 0.7), seeds(0.5, math.nan, 0.7), "open", "1 of 3 runs ended in nan or infinity (baseline: 0"),
        (seeds(0.5, 0.5, 0.5), seeds(0.6, 0.6, 0.6), "open", "The seed does not seem to change anything"),
        (seeds(0.75, 0.5, 0.625), seeds(0.875, 0.625, 0.75), "open", "in steps that are too coarse"),
        (seeds(0.90, 0.95, 0.93), seeds(0.91, 0.96, 0.94), "open", "in steps that are too coarse"),  # p was 1e-29
        (seeds(0.5, 0.6, 0.7), seeds(0.5, 0.6, 0.7), "none", "Equal to baseline to the last digit, with 3 seeds"),
        (seeds(0.5, 0.6, 0.7), seeds(0.6, 0.6, 0.7), "none", "No evidence of a difference with 3 seeds: val_acc"),
        (seeds(0.5, 0.6, 0.7), {7: 0.6, 8: 0.6, 9: 0.7}, "none", "difference with 3 and 3 unpaired runs"),
    ],
)
def test_what_cannot_be_told_is_not(before: dict[int, float], after: dict[int, float], call: str, text: str) -> None:
    (verdict,) = comparison({"baseline": before, "a": after}).verdicts()
    assert verdict.call == call
    assert text in verdict.text


def test_a_difference_that_is_the_same_for_every_seed_has_no_interval() -> None:
    found = comparison({"baseline": seeds(0.75, 0.5, 0.625), "a": seeds(0.875, 0.625, 0.75)})
    shown = [row.difference.show() for row in found.rows() if row.difference is not None]
    assert shown[0] == "+0.125, in every pair"


def test_correction_is_said_where_it_changes_the_call() -> None:
    shifted = seeds(1.01, 1.13, 1.18, 1.40)
    noise = {name: seeds(*np.random.default_rng(i).normal(size=4)) for i, name in enumerate("abcd")}
    reference = seeds(0.9, 0.95, 1.1, 1.3)
    (alone,) = comparison({"baseline": reference, "x": shifted}).verdicts()
    assert alone.call == "better"
    among = comparison({"baseline": reference, "x": shifted, **noise}).verdicts()[-1]
    assert among.call == "none"
    assert "not among 5 comparisons" in among.text


def test_runs_without_the_metric() -> None:
    runs = comparison({"baseline": seeds(0.5), "a": seeds(0.6)}).runs
    other = Run(Path("b/seed_0"), "b", "seed_0", {"x": Series([1], [1.0])})
    found = Comparison([*runs, other], ["val_acc"], "baseline", {"val_acc": "max"})
    assert found.verdicts()[-1].text == "No verdict: val_acc, final is not logged on both sides."
