"""One test for both halves: the pure functions and the stateful class, against a float64 brute force."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_efficient.metrics import AttentionEntropy
from lightning_efficient.metrics.functional import attention_rows
from lightning_efficient.metrics.functional.heads import head_compute, head_update

HEADS, THRESHOLD = 3, 0.4


def batches():
    g = torch.Generator().manual_seed(0)
    for size, length in ((4, 9), (2, 17), (1, 5)):
        q = torch.randn(size, HEADS, length, 6, generator=g, dtype=torch.float64)
        q = q * torch.tensor([0.1, 2.0, 12.0])[:, None, None]
        yield q, torch.randn(size, HEADS, length, 6, generator=g, dtype=torch.float64)


def brute_force() -> dict[str, list[float]]:
    """Lists of rows per head, means and extremes in plain Python; causal, so row 0 has no choice."""
    out: dict[str, list[float]] = {}
    for head in range(HEADS):
        rows = []
        for q, k in batches():
            for b in range(q.shape[0]):
                for i in range(1, q.shape[2]):
                    logits = (k[b, head, : i + 1] @ q[b, head, i] / math.sqrt(6)).tolist()
                    top = max(logits)
                    weights = [math.exp(x - top) for x in logits]
                    p = [w / math.fsum(weights) for w in weights]
                    entropy = -math.fsum(x * math.log(x) for x in p if x > 0)
                    mean = math.fsum(logits) / len(logits)
                    norm = math.sqrt(math.fsum((x - mean) ** 2 for x in logits))
                    rows.append((entropy, entropy / math.log(i + 1), p[0], norm))
        normal = [r[1] for r in rows]
        values = {
            "entropy": sum(r[0] for r in rows) / len(rows),
            "normalized": sum(normal) / len(rows),
            "first_key": sum(r[2] for r in rows) / len(rows),
            "collapsed": sum(x < THRESHOLD for x in normal) / len(rows),
            "entropy_min": min(r[0] for r in rows),
            "normalized_min": min(normal),
            "logit_norm_max": max(r[3] for r in rows),
        }
        for name, value in values.items():
            out.setdefault(name, []).append(value)
    return out


def check(found: dict[str, torch.Tensor]) -> None:
    for name, expected in brute_force().items():
        torch.testing.assert_close(found[name], torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-13)
    assert (found["bound"] <= found["entropy"]).all()
    assert (found["bound"] > 0).all()
    assert 0 < found["collapsed"][1] < found["collapsed"][2]


def test_class():
    metric = AttentionEntropy(HEADS, threshold=THRESHOLD)
    for q, k in batches():
        metric.update(q, k, is_causal=True)
    check(metric.compute())
    metric.reset()
    for q, k in batches():
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        metric.update(q, k, mask)
    check(metric.compute())


def test_pure_functions():
    metric = AttentionEntropy(HEADS, threshold=THRESHOLD)
    states = [head_update(attention_rows(q, k, is_causal=True), THRESHOLD) for q, k in batches()]
    merged = {n: r(torch.stack([s[n] for s in states])) for n, r in metric._reductions.items()}
    check(head_compute(merged))


def test_class_sharded_over_processes():
    """What torchmetrics does when it syncs: stack every process's state, reduce as declared."""
    shards = []
    for q, k in batches():
        shard = AttentionEntropy(HEADS, threshold=THRESHOLD)
        shard.update(q, k, is_causal=True)
        shards.append(shard)
    merged = AttentionEntropy(HEADS, threshold=THRESHOLD)
    for name, reduction in merged._reductions.items():
        setattr(merged, name, reduction(torch.stack([getattr(s, name) for s in shards])))
    merged._update_count = 1
    check(merged.compute())


def test_a_head_without_rows_and_a_diverged_head_are_nan():
    metric = AttentionEntropy(2)
    q = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    metric.update(q, q, torch.zeros(3, 3, dtype=torch.bool))
    values = metric.compute()
    assert values.pop("rows").tolist() == [0, 0]
    assert all(v.isnan().all() for v in values.values())
    q[0, 1] = math.nan
    metric.reset()
    metric.update(q, q)
    assert metric.compute()["entropy_min"].isnan().tolist() == [False, True]


def test_sample_of_queries():
    metric = AttentionEntropy(HEADS, max_queries=4)
    q, k = next(iter(batches()))
    metric.update(q, k)
    assert metric.rows.tolist() == [16.0] * 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"num_heads": 0}, "num_heads"), ({"threshold": 5.0}, "threshold"), ({"max_queries": 0}, "max_queries")],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        AttentionEntropy(**({"num_heads": 2} | arguments))


def test_wrong_number_of_heads():
    with pytest.raises(ValueError, match="q has 3 heads"):
        AttentionEntropy(2).update(*next(iter(batches())))
