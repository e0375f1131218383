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
    return importlib.import_module("slim_zoo")


@pytest.mark.parametrize("name", ["U-Net", "two tasks", "ViT, heads"])
def test_zeroed_equals_removed_where_claimed(zoo: Any, name: str) -> None:
    row = zoo.run(name, zoo.CASES[name])
    assert row["exact"] == "yes"
    assert float(row["difference"]) <= 1e-5
    assert row["macs"] < 0.9


def test_what_is_not_equal_is_not_claimed(zoo: Any) -> None:
    row = zoo.run("sigmoid", zoo.CASES["sigmoid"])
    assert row["exact"] == "no"
    assert "f(0)" in row["why"]
    assert float(row["difference"]) > 1e-3
