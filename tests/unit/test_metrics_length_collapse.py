"""Both halves, pure functions and stateful classes, against brute force in float64."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

import lightning_efficient.functional as LF
from lightning_efficient.metrics import Alignment, CosineByLength, FilterRate, Uniformity, plot_by_length
from lightning_efficient.metrics.functional import bin_labels, length_bins

EDGES = (4, 9)
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* before the ``update``")


def texts(samples: int = 40, features: int = 6) -> tuple[Tensor, Tensor]:
    embeddings = torch.randn(samples, features, dtype=torch.float64) + 0.7
    return embeddings * torch.rand(samples, 1, dtype=torch.float64) * 30, torch.randint(1, 14, (samples,))


def pairs(embeddings: Tensor) -> list[float]:
    return [float(F.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(embeddings, 2)]


def brute_cosine(embeddings: Tensor, lengths: Tensor) -> list[float]:
    bins: list[list[int]] = [[], [], []]
    for i, n in enumerate(lengths.tolist()):
        bins[0 if n <= 4 else 1 if n <= 9 else 2].append(i)
    return [math.fsum(p) / len(p) if (p := pairs(embeddings[rows])) else math.nan for rows in bins]


def merged(parts: list[Metric]) -> Metric:
    """As DDP reduces states over processes."""
    first = parts[0]
    for name, reduction in first._reductions.items():
        states = [getattr(part, name) for part in parts]
        if isinstance(states[0], list):
            setattr(first, name, reduction([t for state in states for t in state]))
        else:
            setattr(first, name, reduction(torch.stack(states)))
    return first


def close(found: Any, expected: Any, rtol: float = 1e-11) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-13, equal_nan=True)


# -- lengths


def test_bins_are_closed_above() -> None:
    assert length_bins(torch.tensor([1, 4, 5, 9, 10, 99]), EDGES).tolist() == [0, 0, 1, 1, 2, 2]
    assert bin_labels(EDGES) == ["≤4", "5–9", ">9"]
    for edges in [(), (0, 3), (5, 5), (9, 4)]:
        with pytest.raises(ValueError, match="`edges`"):
            length_bins(torch.tensor([1]), edges)
    with pytest.raises(TypeError, match="expected integers"):
        length_bins(torch.tensor([1.0]), EDGES)


# -- cosine


def test_cosine_by_length_is_the_mean_over_pairs() -> None:
    embeddings, lengths = texts()
    expected = brute_cosine(embeddings, lengths)
    close(LF.cosine_by_length(embeddings, lengths, EDGES), expected)
    close(LF.mean_cosine(embeddings), math.fsum(pairs(embeddings)) / (40 * 39 / 2))
    metric, halves = CosineByLength(6, EDGES), [CosineByLength(6, EDGES) for _ in range(2)]
    for i, (x, n) in enumerate(zip(embeddings.split(7), lengths.split(7), strict=True)):
        metric.update(x, n)
        halves[i % 2].update(x, n)
    close(metric.compute(), expected)
    close(merged(halves).compute(), expected)


def test_cosine_of_few_and_of_zeros() -> None:
    one = LF.cosine_by_length(torch.ones(3, 2), torch.tensor([1, 7, 8]), EDGES)
    assert one.isnan().tolist() == [True, False, True]
    assert float(one[1]) == pytest.approx(1.0)
    assert LF.mean_cosine(torch.ones(0, 2)).isnan()
    close(LF.mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)), 1 / 3)
    assert CosineByLength(2).compute().isnan().all()


def test_cosine_refuses() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\) and `lengths` \(2,\)"):
        LF.cosine_by_length(torch.ones(3, 2), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"expected \(samples, features\)"):
        LF.mean_cosine(torch.ones(3, 2, 2))
    with pytest.raises(ValueError, match=r"expected \(samples, 5\)"):
        CosineByLength(5).update(torch.ones(3, 2), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="num_features"):
        CosineByLength(0)
    with pytest.raises(ValueError, match="edges"):
        CosineByLength(2, (3, 1))


# -- alignment and uniformity


@pytest.mark.parametrize("alpha", [2.0, 1.0, 3.5])
def test_alignment(alpha: float) -> None:
    x, y = texts()[0], texts()[0]
    terms = [torch.dist(F.normalize(a, dim=0), F.normalize(b, dim=0)) ** alpha for a, b in zip(x, y, strict=True)]
    expected = math.fsum(map(float, terms)) / len(x)
    close(LF.alignment(x, y, alpha), expected)
    metrics = [Alignment(alpha), Alignment(alpha)]
    metrics[0].update(x[:9], y[:9])
    metrics[1].update(x[9:], y[9:])
    close(merged(metrics).compute(), expected)
    assert Alignment().compute().isnan()


@pytest.mark.parametrize("t", [2.0, 0.3, 400.0])
def test_uniformity(t: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[LF.uniformity.__module__], "_ROWS", 100)  # blocks of two rows
    x = texts()[0]
    unit = F.normalize(x, dim=1)
    distances = torch.pdist(unit).square()
    expected = (-t * distances).logsumexp(0) - math.log(len(distances))
    close(LF.uniformity(x, t), expected)
    metrics = [Uniformity(t), Uniformity(t)]
    metrics[0].update(x[:9])
    metrics[1].update(x[9:])
    close(merged(metrics).compute(), expected)


def test_both_are_differentiable_and_refuse() -> None:
    x = texts()[0][:6]
    assert torch.autograd.gradcheck(LF.uniformity, (x.clone().requires_grad_(),))
    assert torch.autograd.gradcheck(lambda a: LF.alignment(a, x.flip(0)), (x.clone().requires_grad_(),))
    assert LF.uniformity(x[:1]).isnan()
    assert Uniformity().compute().isnan()
    assert float(LF.uniformity(torch.ones(5, 3))) == pytest.approx(0, abs=1e-6)
    for call in (
        lambda: LF.alignment(x, x[:2]),
        lambda: LF.alignment(x, x, 0.0),
        lambda: Alignment(math.nan),
        lambda: LF.uniformity(x, -1.0),
        lambda: Uniformity(0.0),
        lambda: Uniformity().update(x[0]),
    ):
        with pytest.raises(ValueError, match=r"`(x|alpha|t|embeddings)`"):
            call()


# -- filter rate


def brute_rate(weights: Tensor) -> float:
    n = len(weights)
    return float(torch.linalg.matrix_norm((torch.eye(n, dtype=weights.dtype) - 1 / n) @ weights, 2))


def queries_keys(length: int = 11, heads: int = 4, key_heads: int = 2) -> tuple[Tensor, Tensor]:
    q = torch.randn(3, heads, length, 5, dtype=torch.float64) * torch.tensor([0.3, 1.0, 3.0, 9.0])[:, None, None]
    return q, torch.randn(3, key_heads, length, 5, dtype=torch.float64)


def brute_weights(q: Tensor, k: Tensor, *, scale: float, hidden: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    logits = q @ k.repeat_interleave(2, dim=1).mT * scale + bias
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("case", ["plain", "causal", "padded", "biased"])
def test_filter_rate(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[LF.attention_entropy.__module__], "_BLOCK", 300)  # two rows at a time
    q, k = queries_keys()
    n = q.shape[2]
    tokens = torch.arange(n) < torch.tensor([n, 7, 2])[:, None]
    bias = torch.randn(1, 4, n, n, dtype=torch.float64)
    hidden = {
        "plain": torch.zeros(n, n, dtype=torch.bool),
        "causal": torch.ones(n, n, dtype=torch.bool).triu(1),
        "padded": ~tokens[:, None, None],
        "biased": ~tokens[:, None, None],
    }[case]
    padded = case in ("padded", "biased")
    given: dict[str, Any] = {"tokens": tokens} if padded else {"is_causal": case == "causal"}
    if case == "biased":
        given |= {"mask": bias, "scale": 0.8}
    weights = brute_weights(
        q, k, scale=given.get("scale", 5**-0.5), hidden=hidden, bias=bias if case == "biased" else 0.0
    )
    lengths = tokens.sum(1).tolist() if padded else [n] * 3
    expected = [[brute_rate(weights[b, h, : lengths[b], : lengths[b]]) for h in range(4)] for b in range(3)]
    found = LF.attention_filter_rate(q, k, iterations=100, **given)
    close(found, expected, rtol=1e-9)
    rows = tokens[:, None] if padded else None
    close(LF.filter_rate(weights, rows, iterations=100), expected, rtol=1e-9)
    # The default number of iterations, which stops early, is a lower bound and close.
    quick = LF.attention_filter_rate(q, k, **given)
    assert (quick <= found * (1 + 1e-12)).all()
    torch.testing.assert_close(quick, found, rtol=0.02, atol=0)


def test_filter_rate_of_known_matrices() -> None:
    close(LF.filter_rate(torch.eye(7, dtype=torch.float64)), 1.0)
    assert LF.filter_rate(torch.full((7, 7), 1 / 7, dtype=torch.float64)) < 1e-15
    assert LF.filter_rate(torch.ones(2, 1, 1)).isnan().all()
    none = LF.filter_rate(torch.eye(4).expand(2, 4, 4), torch.tensor([[True, True, False, False], [False] * 4]))
    assert none.isnan().tolist() == [False, True]
    assert LF.filter_rate(torch.eye(3)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LF.filter_rate(torch.eye(3)).dtype == torch.float32
    state = torch.get_rng_state()
    LF.filter_rate(torch.eye(3))
    assert torch.equal(state, torch.get_rng_state())


def test_sharper_attention_lets_more_through_and_longer_less() -> None:
    def rate(n: int, tau: float) -> float:
        torch.manual_seed(0)
        q, k = torch.randn(1, 8, n, 16), torch.randn(1, 8, n, 16)
        return float(LF.attention_filter_rate(q, k, scale=0.25 / tau).mean())

    assert rate(256, 1.0) < 0.8 * rate(64, 1.0)
    assert rate(256, 0.5) > 1.3 * rate(256, 1.0)


def test_filter_rate_metric() -> None:
    metric, halves = FilterRate(EDGES, iterations=200), [FilterRate(EDGES, iterations=200) for _ in range(2)]
    seen: list[list[float]] = [[], [], []]
    for i in range(3):
        q, k = queries_keys()
        tokens = torch.arange(11) < torch.tensor([11, 3 + i, 1])[:, None]
        rates = LF.attention_filter_rate(q, k, tokens=tokens, iterations=200)
        for rate, n in zip(rates[:2], tokens.sum(1).tolist(), strict=False):
            seen[0 if n <= 4 else 1 if n <= 9 else 2] += rate.tolist()
        metric.update(q, k, tokens=tokens)
        halves[i % 2].update(q, k, tokens=tokens)
    expected = [sum(values) / len(values) for values in seen]
    close(metric.compute(), expected)
    close(merged(halves).compute(), expected)
    short = FilterRate(EDGES)
    short.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    assert short.compute().isnan().tolist() == [False, True, True]


def test_filter_rate_refuses() -> None:
    q, k = queries_keys()
    for tokens in (torch.ones(3, 11), torch.ones(3, 10, dtype=torch.bool)):
        with pytest.raises(ValueError, match="`tokens` is"):
            LF.attention_filter_rate(q, k, tokens=tokens)
    with pytest.raises(ValueError, match="does not broadcast"):
        LF.filter_rate(torch.rand(2, 3, 4, 4), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., queries, keys\)"):
        LF.filter_rate(torch.rand(4))
    for call in (lambda: LF.filter_rate(torch.eye(3), iterations=0), lambda: FilterRate(iterations=0)):
        with pytest.raises(ValueError, match="`iterations` is 0"):
            call()


# -- the picture


def test_plot() -> None:
    figure = plot_by_length({1.0: torch.tensor([0.1, 0.2, 0.3]), 0.8: [0.1, math.nan, 0.2], "log n": [0, 0, 0]}, EDGES)
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["τ = 1 (unchanged)", "τ = 0.8", "log n"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["≤4", "5–9", ">9"]
    with pytest.raises(ValueError, match="empty"):
        plot_by_length({}, EDGES)
    with pytest.raises(ValueError, match="has 2 values"):
        plot_by_length({1.0: [0.1, 0.2]}, EDGES)
