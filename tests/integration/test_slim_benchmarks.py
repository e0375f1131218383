"""Short slices of the scripts behind the card of structured pruning."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("structured_zoo")


@pytest.mark.parametrize("name", ["YOLO", "attention, fused gqa", "LSTM"])
def test_a_slice_of_the_zoo(zoo: Any, name: str) -> None:
    row = zoo.ours(name)
    assert row["error"] <= 1e-9
    assert row["exact"] > 0.4
    assert row["runs"] == "yes"
    assert row["heads"] == 2 * name.startswith("attention")


def test_what_is_not_equal_is_not_claimed(zoo: Any) -> None:
    row = zoo.ours("MLP with sigmoid")
    assert row["exact"] == 0.0
    assert row["inexact"] > 0.9
    assert "f(0)" in row["refused"]["0"]
