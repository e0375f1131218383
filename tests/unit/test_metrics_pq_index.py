"""PQ index and sparsity: closed forms, six axioms, theorem 2, and the streaming metric against the function."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricTracker

from lightning_efficient.metrics import PQIndex, Sparsity
from lightning_efficient.metrics.functional import pq_bound, pq_index, sparsity

PAIRS = ((0.5, 1.0), (1.0, 2.0), (0.2, 1.6))
pairs = st.sampled_from(PAIRS)
magnitudes = st.floats(0, 1e3, allow_subnormal=False).map(lambda v: v if v > 1e-6 else 0.0)
vectors = st.lists(magnitudes, min_size=2, max_size=30).filter(lambda v: max(v) > 0)
properties = settings(max_examples=200, deadline=None, derandomize=True)


def reference(w: Sequence[float], p: float, q: float) -> float:
    """Definition 1, with norms rather than means, in exact summation."""
    d = len(w)
    norm_p = math.fsum(abs(v) ** p for v in w) ** (1 / p)
    norm_q = math.fsum(abs(v) ** q for v in w) ** (1 / q)
    return 1 - d ** (1 / q - 1 / p) * norm_p / norm_q


def index(w: Sequence[float], p: float, q: float) -> float:
    return float(pq_index(torch.tensor(w, dtype=torch.float64), p, q))


# -- closed forms ----------------------------------------------------------------------------------------------------


def quantiles(kind: str, n: int = 200_001) -> torch.Tensor:
    """The distribution itself, at equally likely points: no sampling error."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return {
        "half-normal": lambda: torch.special.ndtri(0.5 + 0.5 * u),
        "uniform": lambda: u,
        "exponential": lambda: -torch.log1p(-u),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "half_one", "one_two"),
    [
        ("half-normal", 0.1527869, 0.2021154),
        ("uniform", 1 / 9, 1 - math.sqrt(3) / 2),
        ("exponential", 1 - math.gamma(1.5) ** 2, 1 - 1 / math.sqrt(2)),
    ],
)
def test_known_distributions(kind: str, half_one: float, one_two: float) -> None:
    w = quantiles(kind)
    w[::2] *= -1
    # The error of the midpoint rule at the ends of the distributions.
    assert float(pq_index(w, 0.5, 1)) == pytest.approx(half_one, abs=1e-4)
    assert float(pq_index(w, 1, 2)) == pytest.approx(one_two, abs=1e-4)


@pytest.mark.parametrize(("p", "q"), PAIRS)
@pytest.mark.parametrize("d", [1, 2, 10, 1000])
def test_extremes(p: float, q: float, d: int) -> None:
    assert index([-3.7] * d, p, q) == pytest.approx(0, abs=1e-12)
    assert index([0.0] * (d - 1) + [-1e-30], p, q) == pytest.approx(1 - d ** (1 / q - 1 / p), rel=1e-12)


@properties
@given(vectors, pairs)
def test_definition(w: list[float], pq: tuple[float, float]) -> None:
    assert index(w, *pq) == pytest.approx(max(reference(w, *pq), 0), abs=1e-10)
    assert 0 <= index(w, *pq) <= 1 - len(w) ** (1 / pq[1] - 1 / pq[0]) + 1e-12


# -- the six properties of theorem 1 ---------------------------------------------------------------------------------

fractions = st.floats(0.01, 0.99)


@properties
@given(vectors, pairs, st.data())
def test_robin_hood(w: list[float], pq: tuple[float, float], data: st.DataObject) -> None:
    """D1: taking from a larger magnitude and giving to a smaller one, not beyond equality, lowers the index."""
    i, j = data.draw(st.tuples(st.integers(0, len(w) - 1), st.integers(0, len(w) - 1)))
    low, high = (i, j) if w[i] < w[j] else (j, i)
    gift = (w[high] - w[low]) / 2 * data.draw(fractions)
    after = list(w)
    after[low] += gift
    after[high] -= gift
    assert index(after, *pq) <= index(w, *pq) + 1e-9
    if gift > 1e-3 * max(w):
        assert index(after, *pq) < index(w, *pq)


@properties
@given(vectors, pairs, st.floats(1e-6, 1e6))
def test_scaling(w: list[float], pq: tuple[float, float], factor: float) -> None:
    """D2."""
    assert index([-factor * v for v in w], *pq) == pytest.approx(index(w, *pq), abs=1e-10)


@properties
@given(vectors, pairs, st.floats(0.01, 10))
def test_rising_tide(w: list[float], pq: tuple[float, float], tide: float) -> None:
    """D3: adding the same to all magnitudes lowers the index, unless they are equal."""
    after = [v + tide * max(w) for v in w]
    assert index(after, *pq) <= index(w, *pq) + 1e-12
    if min(w) < 0.9 * max(w):
        assert index(after, *pq) < index(w, *pq)


@properties
@given(vectors, pairs)
def test_cloning(w: list[float], pq: tuple[float, float]) -> None:
    """D4."""
    assert index(w + w, *pq) == pytest.approx(index(w, *pq), abs=1e-12)


@properties
@given(vectors, pairs, st.data())
def test_bill_gates(w: list[float], pq: tuple[float, float], data: st.DataObject) -> None:
    """P1: once one entry is large enough, making it larger raises the index.

    Where "large enough" begins follows from the derivative: ``w_i^(q-p) > Σ_{j≠i} w_j^q / Σ_{j≠i} w_j^p``.
    """
    p, q = pq
    i = data.draw(st.integers(0, len(w) - 1))
    rest = [v for j, v in enumerate(w) if j != i]
    below = math.fsum(v**p for v in rest)
    start = (math.fsum(v**q for v in rest) / below) ** (1 / (q - p)) if below else 0.0
    rich = [(start + max(w)) * factor for factor in (1.05, 2.0, 50.0)]
    values = [index([*w[:i], v, *w[i + 1 :]], p, q) for v in rich]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    if max(rest) > 1e-2:
        assert values[0] < values[-1]


@properties
@given(vectors, pairs)
def test_babies(w: list[float], pq: tuple[float, float]) -> None:
    """P2: a further zero raises the index."""
    assert index([*w, 0.0], *pq) > index(w, *pq)


@properties
@given(vectors, pairs)
def test_theorem_2(w: list[float], pq: tuple[float, float]) -> None:
    """For every r: with the exact eta of the r largest, the bound is not above r."""
    p, q = pq
    order = sorted(w, reverse=True)
    i = torch.tensor(index(w, p, q), dtype=torch.float64)
    for r in range(1, len(w) + 1):
        kept, rest = math.fsum(v**p for v in order[:r]), math.fsum(v**p for v in order[r:])
        assert float(pq_bound(i, len(w), p, q, rest / kept)) <= r * (1 + 1e-9)


def test_bound_in_its_published_forms() -> None:
    i = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    torch.testing.assert_close(pq_bound(i, 100), torch.tensor([100.0, 75, 50], dtype=torch.float64))
    torch.testing.assert_close(pq_bound(i, 100, 1, 2), torch.tensor([100.0, 56.25, 25], dtype=torch.float64))
    assert float(pq_bound(i[0], 100, 0.5, 1, eta=1.0)) == pytest.approx(25)  # (1 + 1)^-2
    with pytest.raises(ValueError, match="`eta` must not be negative; got -1"):
        pq_bound(i, 100, eta=-1)


# -- shapes, masks, dtypes -------------------------------------------------------------------------------------------


def test_masks_and_dimensions() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, 4, 3, generator=g)
    mask = torch.rand(5, 4, 3, generator=g) < 0.6
    mask[2] = False
    whole = pq_index(w, mask=mask)
    assert float(whole) == pytest.approx(reference(w[mask].tolist(), 0.5, 1), abs=1e-10)
    rows = pq_index(w, 1, 2, mask=mask, dim=0)
    assert rows.shape == (5,)
    assert rows[2].isnan()
    for i in (0, 1, 3, 4):
        assert float(rows[i]) == pytest.approx(reference(w[i][mask[i]].tolist(), 1, 2), abs=1e-10)
    columns = pq_index(w, dim=-1)
    assert [float(c) for c in columns] == pytest.approx(
        [reference(w[..., k].flatten().tolist(), 0.5, 1) for k in (0, 1, 2)]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_lose_nothing(dtype: torch.dtype) -> None:
    w = (torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    assert float(pq_index(w)) == pytest.approx(reference(w.double().tolist(), 0.5, 1), abs=1e-12)


def test_huge_and_tiny_magnitudes() -> None:
    w = torch.tensor([1e300, 3e300, 2e299], dtype=torch.float64)
    assert float(pq_index(w, 1, 2)) == pytest.approx(float(pq_index(w / 1e300, 1, 2)), rel=1e-12)
    assert float(pq_index(w * 1e-300 * 1e-300, 1, 2)) == pytest.approx(float(pq_index(w / 1e300, 1, 2)), rel=1e-9)


@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 1), (0, 1), (-1, 1), (1, math.inf), (math.nan, 1)])
def test_norms_are_checked(p: float, q: float) -> None:
    for call in (
        lambda: pq_index(torch.ones(2), p, q),
        lambda: PQIndex(p, q),
        lambda: pq_bound(torch.ones(1), 1, p, q),
    ):
        with pytest.raises(ValueError, match=f"0 < p < q; got p={p}, q={q}"):
            call()


def test_undefined() -> None:
    with pytest.raises(ValueError, match=r"without a nonzero entry is undefined \(shape \(2, 3\)\)"):
        pq_index(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="1 of them counted"):
        pq_index(torch.tensor([0.0, 1.0]), mask=torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"`mask` has shape \(2,\)"):
        pq_index(torch.ones(3), mask=torch.ones(2))
    assert pq_index(torch.zeros(2, 0), dim=0).isnan().all()


# -- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_streaming_equals_the_function(p: float, q: float) -> None:
    g = torch.Generator().manual_seed(1)
    tensors = [torch.randn(6, 5, generator=g), torch.rand(3, 2, 2, generator=g), torch.randn(4, 1, generator=g)]
    masks = [None, torch.rand(3, 2, 2, generator=g) < 0.7, None]
    metrics = {scope: PQIndex(p, q, scope=scope) for scope in ("global", "layer", "neuron")}
    for weight, mask in zip(tensors, masks, strict=True):
        for metric in metrics.values():
            metric.update(weight, mask)
    flat = torch.cat([t.flatten() if m is None else t[m] for t, m in zip(tensors, masks, strict=True)])
    assert float(metrics["global"].compute()) == pytest.approx(reference(flat.tolist(), p, q), abs=1e-10)
    each = [pq_index(t, p, q, mask=m) for t, m in zip(tensors, masks, strict=True)]
    torch.testing.assert_close(metrics["layer"].compute(), torch.stack(each))
    assert metrics["neuron"].compute().shape == (6 + 3 + 4,)
    metrics["global"].reset()
    metrics["global"].update(torch.zeros(3))
    with pytest.raises(ValueError, match="call `update` first"):
        metrics["global"].compute()


def test_curve_over_iterations() -> None:
    tracker = MetricTracker(PQIndex(), maximize=True)
    weights = [torch.tensor([1.0, 1, 1, 1]), torch.tensor([1.0, 1, 1, 0]), torch.tensor([1.0, 0, 0, 0])]
    for weight in weights:
        tracker.increment()
        tracker.update(weight)
    assert tracker.compute_all().tolist() == pytest.approx([0, 0.25, 0.75])


def test_sparsity() -> None:
    parts = [torch.tensor([0.0, 1, -0.0, 2]), torch.zeros(2, 3), torch.ones(2)]
    exact = Fraction(2 + 6, 4 + 6 + 2)
    metric = Sparsity()
    for part in parts:
        metric.update(part)
    assert float(sparsity(parts)) == pytest.approx(float(exact))
    assert float(metric.compute()) == pytest.approx(float(exact))
    assert float(sparsity(torch.tensor([0.0, 1e-45]))) == 0.5
    assert sparsity([]).isnan()


def test_metrics_refuse() -> None:
    with pytest.raises(ValueError, match=r"`scope` must be .*; got 'row'"):
        PQIndex(scope="row")  # type: ignore[arg-type]
    empty = PQIndex(scope="layer")
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(ValueError, match="no weight was seen"),
    ):
        empty.compute()
