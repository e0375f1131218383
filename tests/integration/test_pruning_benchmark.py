"""A slice of the pruning study: every arm gives points, runs repeat themselves, the study goes on where it stopped."""

from __future__ import annotations

import gzip
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("pruning_study")
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module.common, "RESULTS", tmp_path / "results")
    return module


@pytest.fixture
def data(study: Any) -> Any:
    whole = study.digits()
    return type(whole)("tiny", tuple(t[:200] for t in whole.train), whole.val, whole.test)


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


def test_the_splits_share_no_image(study: Any) -> None:
    whole = study.digits()
    parts = [{tuple(x.flatten().tolist()) for x in part[0]} for part in (whole.train, whole.val, whole.test)]
    assert sum(len(p[0]) for p in (whole.train, whole.val, whole.test)) == 1797
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_every_arm(study: Any, data: Any) -> None:
    plan = study.Plan(("MLP",), 1, rounds=2, epochs=1, batch=20)
    firsts = []
    for arm in (*study.ITERATED, *study.SINGLE):
        row = study.run(data, plan, "MLP", arm, "global", 0.9, 0)
        assert json.loads(json.dumps(row)) == row
        points = row["points"]
        left = [point["left"] for point in points]
        assert left == sorted(left, reverse=True)
        if arm in study.ITERATED:
            firsts.append(points[0])
            assert left[0] == pytest.approx(1, abs=1e-3)
            assert [point["epochs"] for point in points] == [1, 2, 3]
        else:
            assert [point["epochs"] for point in points] == [2]
            assert left[0] == pytest.approx(0.1, rel=0.1)
        if arm == "lottery ticket":
            assert left == pytest.approx([1, 0.02**0.5, 0.02], abs=1e-3)
    assert all(first == firsts[0] for first in firsts), "the arms start alike"
    again = study.run(data, plan, "MLP", "SAP (1, 2)", "global", 0.0, 0)
    assert without_time(again) == without_time(study.run(data, plan, "MLP", "SAP (1, 2)", "global", 0.0, 0))


def test_the_cnn(study: Any, data: Any) -> None:
    plan = study.Plan(("CNN",), 1, rounds=1, epochs=1, batch=50)
    row = study.run(data, plan, "CNN", "lottery ticket", "layer", 0.0, 0)
    assert [p["left"] for p in row["points"]] == pytest.approx([1, 0.02], abs=0.01)


def test_the_study_goes_on_where_it_stopped(study: Any, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ITERATED", ("SAP (1, 2)",))
    monkeypatch.setattr(study, "SINGLE", ("cubic",))
    monkeypatch.setattr(study, "AMOUNTS", (0.5, 0.9))
    monkeypatch.setattr(study, "SCOPES", ("global",))
    plan = study.Plan(("MLP",), 1, rounds=1, epochs=1, batch=50)
    ran: list[Any] = []
    real = study.run
    monkeypatch.setattr(study, "run", lambda *cell: ran.append(cell) or real(*cell))
    assert study.study(data, plan, budget=-1) == []
    first = study.study(data, plan)
    assert len(ran) == len(first) == 3
    assert study.study(data, plan) == first
    assert len(ran) == 3
    later = list(study.Plan(("MLP",), 1, first=1).cells())
    assert {cell[-1] for cell in later} == {1}
    text = study.report(data, plan, first)
    assert "| MLP | global | cubic | 1 | 2 |" in text
    assert (study.common.RESULTS / "pruning_study_tiny.png").stat().st_size > 10_000


def test_interpolation_between_points(study: Any) -> None:
    points = [{"left": 1.0, "test_acc": 0.9}, {"left": 0.1, "test_acc": 0.7}]
    assert study.at_level(points, 10**-0.5) == pytest.approx(0.8)
    assert study.at_level(points, 0.01) is None
    assert study.cell_text([0.8, None]) == "not reached (1/2)"
    assert study.cell_text([0.8, 0.82]) == f"81.0 ± {12.706 * 0.01 * 100 * math.sqrt(2) / math.sqrt(2):.1f}"


def test_idx_files(study: Any, tmp_path: Path) -> None:
    tasks = importlib.import_module("pruning_tasks")
    values = torch.arange(24, dtype=torch.uint8)
    content = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]) + bytes(values.tolist())
    (tmp_path / "images.gz").write_bytes(gzip.compress(content))
    assert torch.equal(tasks.read_idx(tmp_path / "images.gz"), values.view(2, 3, 4))
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        tasks.fashion(tmp_path / "missing")
