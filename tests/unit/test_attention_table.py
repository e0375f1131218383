from __future__ import annotations

import math

import pytest
import torch

from lightning_efficient.attention import AttentionCall, HeadTable
from lightning_efficient.metrics.functional import attention_rows, rows_from_logits


def call(site: str, logits: list[list[float]]) -> AttentionCall:
    """One head per list, all its queries with these logits."""
    return AttentionCall(site, "softmax", rows_from_logits(torch.tensor(logits)[None, :, None, :].expand(2, -1, 3, -1)))


UNIFORM, SHARP, SINK = [0.0] * 4, [0.0, 0.0, 50.0, 0.0], [3.0, 0.0, 0.0, 0.0]


def test_scalars_count_heads_not_rows():
    table = HeadTable.of([call("a", [UNIFORM, SHARP]), call("b", [SINK])])
    assert [row.tolist() for row in table.collapsed()] == [[False, True], [False]]
    assert [row.tolist() for row in table.sinks()] == [[False, False], [True]]
    weights = torch.tensor(SINK, dtype=torch.float64).softmax(0)
    sink = float(torch.special.entr(weights).sum())
    scalars = table.scalars()
    assert scalars["entropy_mean"] == pytest.approx((math.log(4) + 0 + sink) / 3, abs=1e-6)
    assert scalars["entropy_min"] == pytest.approx(0, abs=1e-6)
    assert scalars["entropy_normalized_min"] == pytest.approx(0, abs=1e-6)
    assert scalars["collapsed_fraction"] == pytest.approx(1 / 3)
    assert scalars["sink_fraction"] == pytest.approx(1 / 3)
    assert scalars["logit_norm_max"] == pytest.approx(50 * math.sqrt(3 / 4), rel=1e-6)
    assert 0 <= scalars["entropy_bound_min"] < 1e-12
    # One raised logit attains the bound.
    assert table.values["bound"][1].item() == pytest.approx(sink, rel=1e-5)
    assert table.layers() == {
        "a/entropy_mean": pytest.approx(math.log(4) / 2, abs=1e-6),
        "a/entropy_normalized_min": pytest.approx(0, abs=1e-6),
        "b/entropy_mean": pytest.approx(sink, abs=1e-6),
        "b/entropy_normalized_min": pytest.approx(sink / math.log(4), abs=1e-6),
    }


def test_the_threshold_is_on_the_mean_normalised_entropy():
    calls = [call("a", [UNIFORM, SINK])]
    assert HeadTable.of(calls, threshold=0.1).scalars()["collapsed_fraction"] == 0
    assert HeadTable.of(calls, threshold=0.5).scalars()["collapsed_fraction"] == 0.5


def test_calls_without_a_choice_are_left_out_and_nan_is_not():
    single = attention_rows(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 1, 4))
    table = HeadTable.of([AttentionCall("one key", "softmax", single), call("a", [UNIFORM])])
    assert table.sites == ["a"]
    assert HeadTable.of([AttentionCall("one key", "softmax", single)]).sites == []
    assert HeadTable.of([]).sites == []
    diverged = HeadTable.of([call("a", [UNIFORM]), call("b", [[math.nan] * 4])])
    assert math.isnan(diverged.scalars()["entropy_min"])
    assert math.isnan(diverged.scalars()["entropy_mean"])
    assert diverged.picture(3).shape[0] == 3


def test_the_picture_spans_zero_to_the_ceiling(monkeypatch):
    import lightning_efficient.attention.table as module

    seen = {}
    monkeypatch.setattr(module, "heatmap", lambda values, labels, **options: seen.update(options, values=values))
    HeadTable.of([call("a", [UNIFORM, SHARP])]).picture(1200)
    assert seen["low"] == 0
    assert seen["high"] == pytest.approx(math.log(4))
    assert "1200" in seen["title"]
    assert seen["unit"] == "nats"
    assert seen["frames"] == [[False, True]]
