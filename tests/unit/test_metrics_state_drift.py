"""Drift of recurrent states against closed forms of a linear recurrence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_efficient import functional as F
from lightning_efficient.metrics import StateDrift

F64 = torch.float64


def recurrence(decays: list[float], tokens: int, samples: int = 3, entries: int = 400) -> Tensor:
    """``S_t = a S_{t-1} + x_t``, one decay a head: ``(samples, tokens, heads, 2, entries / 2)``."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(samples, tokens, len(decays), 2, entries // 2, generator=g, dtype=F64)
    a = torch.tensor(decays, dtype=F64)[:, None, None]
    states, state = [], torch.zeros_like(x[:, 0])
    for t in range(tokens):
        state = a * state + x[:, t]
        states.append(state)
    return torch.stack(states, 1)


def test_a_linear_recurrence() -> None:
    """Independent inputs of variance 1: ``var(t) = (1 - a^2t) / (1 - a²)``, and t where nothing is forgotten."""
    decays, train, tokens = [0.5, 0.99, 1.0], 40, 200
    states = recurrence(decays, tokens, samples=8, entries=4000)

    def variance(a: float, t: int) -> float:
        return t if a == 1 else (1 - a ** (2 * t)) / (1 - a**2)

    expected = [variance(a, tokens) / variance(a, train) for a in decays]
    found = F.state_drift(states, train)
    assert found.tolist() == pytest.approx(expected, rel=0.02)
    assert found[2] == pytest.approx(5, rel=0.02)
    metric = StateDrift(train, tokens, bucket=1)
    metric.update(states)
    torch.testing.assert_close(metric.compute()["ratio"], found, rtol=1e-12, atol=0)


def test_scaled_states_are_exact() -> None:
    """States that are one pattern times a scale: the ratio is that of the squared scales."""
    pattern = torch.randn(1, 1, 2, 3, 4, dtype=F64)
    scale = torch.cat([torch.linspace(0.1, 1, 8), torch.linspace(1, 3, 24)]).double()[None, :, None, None, None]
    two = pattern * torch.cat([scale, torch.ones_like(scale)], 2)  # the second head keeps its scale
    assert F.state_drift(two, 8).tolist() == pytest.approx([9, 1], rel=1e-12)
    metric = StateDrift(8, 32, bucket=4, threshold=3)
    metric.update(two)
    found = metric.compute()
    curve = scale.flatten().square().view(8, 4).mean(1)
    assert found["tokens"].tolist() == list(range(4, 33, 4))
    torch.testing.assert_close(found["curve"][:, 0], curve / curve[:2].max())
    assert float(found["ratio_max"]) == pytest.approx(float(curve[2:].max() / curve[:2].max()))
    assert float(found["drifting"]) == 0.5


def test_batches_and_pieces_are_one() -> None:
    """However the sequences come: whole, in pieces, state by state, other samples first; padding left out."""
    states = recurrence([0.9, 1.0], 30, samples=4, entries=6)
    whole, pieces, cells = (StateDrift(10, 30) for _ in range(3))
    whole.update(states)
    for part in (states[2:], states[:2]):
        for first, last in ((0, 7), (7, 8), (8, 30)):
            pieces.update(part[:, first:last], start=first)
    for t in range(30):
        cells.update(states[:, t : t + 1], start=t)
    for other in (pieces, cells):
        for name, value in whole.compute().items():
            torch.testing.assert_close(other.compute()[name], value, rtol=1e-12, atol=0)
    mask = torch.arange(30)[None] < torch.tensor([30, 30, 12, 4])[:, None]
    masked, ragged = StateDrift(10, 30), StateDrift(10, 30)
    masked.update(states.masked_fill(~mask[..., None, None, None], math.nan), mask=mask)
    for row, length in zip(states, (30, 30, 12, 4), strict=True):
        ragged.update(row[None, :length])
    torch.testing.assert_close(masked.compute()["curve"], ragged.compute()["curve"], rtol=1e-12, atol=0)


def test_buckets_end_at_the_training_length() -> None:
    metric = StateDrift(10, 25, bucket=4)
    assert metric._ends.tolist() == [2, 6, 10, 14, 18, 22, 26]
    states = torch.zeros(1, 40, 1, 2, dtype=F64)
    states[0, :, 0, 0] = torch.arange(1, 41)  # variance t² / 2
    metric.update(states)
    squares = torch.arange(1, 41).double().square() / 2
    curve = metric.total[:, 0] / metric.count
    assert curve[:3].tolist() == pytest.approx([float(squares[a:b].mean()) for a, b in ((0, 2), (2, 6), (6, 10))])
    assert float(curve[-1]) == pytest.approx(float(squares[22:].mean()))  # longer ones, too
    assert StateDrift(1000)._ends.tolist()[-1] == 1000 + 239 * 63  # 16 times the length, in whole buckets
    assert len(StateDrift(7)._ends) == 7 + 15 * 7


def test_nothing_past_the_training_length() -> None:
    metric = StateDrift(10)
    metric.update(recurrence([1.0], 10))
    found = metric.compute()
    assert found["ratio"].isnan().all()
    assert found["ratio_max"].isnan()
    assert found["drifting"].isnan()
    assert float(found["curve"][:10].max()) == 1
    assert found["curve"][10:].isnan().all()
    late = StateDrift(10)
    late.update(recurrence([1.0], 5), start=10)
    assert late.compute()["ratio_max"].isnan()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_refused() -> None:
    for kwargs, match in (
        ({"train_length": 0}, "`train_length` is 0"), ({"max_length": 8}, "`max_length` is 8; expected more than"),
        ({"bucket": 0}, "`bucket` is 0"), ({"threshold": 0}, "`threshold` is 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            StateDrift(**{"train_length": 8} | kwargs)
    metric = StateDrift(8)
    with pytest.raises(ValueError, match="no state was seen"):
        metric.compute()
    states = recurrence([0.5, 1.0], 12)
    metric.update(states)
    for bad, args, kwargs in (
        (r"shape \(3, 12, 2\); expected \(samples, tokens, heads, ...\)", (states[..., 0, 0],), {}),
        (r"shape \(3, 12, 2, 1\).*two\s+entries", (states[..., 0, :1],), {}),
        ("has 1 heads; expected 2", (states[:, :, :1],), {}), ("`start` is -1", (states,), {"start": -1}),
        (r"`mask` has shape \(3, 4\)", (states,), {"mask": torch.ones(3, 4)}),
        ("NaN or infinite", (states / 0,), {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=bad):
            metric.update(*args, **kwargs)
    for length in (0, 12):
        with pytest.raises(ValueError, match=f"`train_length` is {length}"):
            F.state_drift(states, length)
