"""A second-long slice of the crossover benchmark, and its arithmetic."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path)
    return importlib.import_module("linear_attention")


def test_a_slice_writes_its_table(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "WIDTHS", ((8, 2),))
    benchmark.main(["--tokens", "4", "9", "--rounds", "3"])
    content = json.loads((tmp_path / "linear_attention_cpu.json").read_text())
    found = [(row["work"], row["tokens"]) for row in content["rows"]]
    assert found == [(work, tokens) for work in ("forward", "forward + backward") for tokens in (4, 9)]
    for row in content["rows"]:
        assert row["ratio"] == sorted(row["ratios"])[1] > 0
        assert row["softmax_ms"] > 0
        assert row["linear_ms"] > 0
    text = (tmp_path / "linear_attention_cpu.md").read_text()
    assert "float32, batch 1; CPU time, medians of 3 interleaved rounds" in text
    assert "| 8 channels, 2 heads | forward + backward | 9 |" in text
    assert "Not run on a GPU yet" in text


def test_both_layers_have_the_same_projections(benchmark: Any) -> None:
    softmax, linear = benchmark.layers(8, 2, 3)
    assert type(softmax).__name__ == "Attention"
    assert type(linear).__name__ == "LinearAttention"
    for name, value in softmax.state_dict().items():
        assert torch.equal(linear.state_dict()[name], value)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([2.0, 0.5, 0.25], 200.0),  # halfway between 100 and 400 in both logarithms
        ([4.0, 0.5, 0.25], 100 * 4 ** (2 / 3)),
        ([0.5, 2.0, 0.5], 800.0),  # from where on it stays faster
        ([0.9, 0.5, 0.2], 100.0),
        ([0.9, 0.5, 1.1], None),
    ],
)
def test_crossover(benchmark: Any, ratios: list[float], expected: float | None) -> None:
    rows = [{"tokens": n, "ratio": r} for n, r in zip((100, 400, 1600), ratios, strict=True)]
    found = benchmark.crossover(rows)
    assert found == (None if expected is None else pytest.approx(expected))
