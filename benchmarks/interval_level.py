"""How often 95 % intervals miss: two identical variants over few seeds, by four ways to make an interval.

    python benchmarks/interval_level.py

What misses more often than 5 % calls noise a difference. Differences X - Y of independent, equally distributed X and Y
are symmetric, whatever their distribution is.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
SEEDS = (2, 3, 4, 5, 7, 10)
TRIALS, RESAMPLES = 20_000, 999
OUT = Path(__file__).parent / "results" / "interval_level"


def runs(law: str, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Final metrics of a variant: as trainings give them, smooth, skewed, rounded, or diverging now and then."""
    normal = rng.standard_normal(shape)
    return {
        "normal": normal,
        "skewed": np.exp(normal),
        "heavy tails": rng.standard_t(3, shape),
        "1 run in 5 fails": normal + 20.0 * (rng.random(shape) < 0.2),
        "accuracy on 200 images": rng.binomial(200, np.clip(0.9 + 0.01 * normal, 0, 1)) / 200,
    }[law]


LAWS = ("normal", "skewed", "heavy tails", "1 run in 5 fails", "accuracy on 200 images")


def student(gaps: Array) -> Array:
    """Misses of the Student-t interval."""
    n = gaps.shape[1]
    half = stats.t.ppf(0.975, n - 1) * gaps.std(1, ddof=1) / np.sqrt(n)
    return np.abs(gaps.mean(1)) > half


def sign_flips(gaps: Array) -> Array:
    """Misses of the exact sign-flip test: p below 5 % over all 2**n signs."""
    signs = np.array(list(product((-1.0, 1.0), repeat=gaps.shape[1])))
    sums = np.abs(gaps @ signs.T)
    return (sums >= np.abs(gaps.sum(1, keepdims=True)) - 1e-9).mean(1) <= 0.05


def percentile(gaps: Array, rng: np.random.Generator) -> Array:
    """Misses of the percentile bootstrap."""
    n = gaps.shape[1]
    means = np.stack([gaps[:, rng.integers(n, size=n)].mean(1) for _ in range(RESAMPLES)], 1)
    low, high = np.quantile(means, (0.025, 0.975), axis=1)
    return (low > 0) | (high < 0)


def bca(gaps: Array, rng: np.random.Generator) -> Array:
    """Misses of scipy's BCa bootstrap, on a part of the trials: it is slow."""
    missed = []
    for row in gaps[:400]:
        if row.std() == 0:
            missed.append(row[0] != 0)
            continue
        found = stats.bootstrap((row,), np.mean, n_resamples=RESAMPLES, rng=rng).confidence_interval
        missed.append(bool(found.low > 0 or found.high < 0))
    return np.array(missed)


def main() -> None:
    rows = []
    for law, n in product(LAWS, SEEDS):
        rng = np.random.default_rng([n, LAWS.index(law)])
        gaps = runs(law, (TRIALS, n), rng) - runs(law, (TRIALS, n), rng)
        with np.errstate(all="ignore"):
            missed = {
                "Student t": student(gaps),
                "sign flips": sign_flips(gaps),
                "percentile bootstrap": percentile(gaps[:4000], rng),
                "BCa bootstrap": bca(gaps, rng) if n in (3, 5, 10) else None,
            }
        rows.append({"law": law, "seeds": n} | {k: None if v is None else float(v.mean()) for k, v in missed.items()})
    methods = list(rows[0])[2:]
    lines = [
        "Share of trials in which two identical variants are called different (stated: 5 %), paired differences.\n",
        f"{TRIALS} trials (percentile: 4000; BCa: 400), {RESAMPLES} resamples. `python benchmarks/interval_level.py`\n",
        f"| final metric | seeds | {' | '.join(methods)} |",
        "|---|--:|" + "--:|" * len(methods),
    ]
    for row in rows:
        cells = ["–" if row[m] is None else f"{row[m]:.1%}" for m in methods]
        lines.append(f"| {row['law']} | {row['seeds']} | {' | '.join(cells)} |")
    OUT.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    OUT.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
