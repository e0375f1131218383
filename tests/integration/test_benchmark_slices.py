"""Seconds-long slices of the benchmark scripts: they import, run one tiny configuration, and repeat themselves."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def stability(script: Any) -> Any:
    return script("stability")


@pytest.fixture
def tiny(stability: Any) -> Any:
    return stability.digits(batch=8, depth=1)


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


FIELDS = {
    *("task", "arm", "factor", "lr", "warmup", "seed", "train_loss", "val_loss", "first_train_loss", "first_val_loss"),
    *("diverged", "min_entropy", "collapsed_heads", "stable_rank", "curve", "seconds"),
}


def test_every_arm_gives_a_row(stability: Any, tiny: Any) -> None:
    rows = {arm: stability.run(tiny, arm, 4, True, 0, 6) for arm in stability.ARMS}
    for arm, row in rows.items():
        assert set(row) == FIELDS
        assert (row["arm"], row["lr"]) == (arm, pytest.approx(4e-3))
        assert row["diverged"] is (row["train_loss"] > row["first_train_loss"])
        assert 0 < row["min_entropy"] <= 1
        assert json.loads(json.dumps(row)) == row
    first = rows["baseline"]["first_val_loss"]
    assert rows["sigmaReparam"]["first_val_loss"] == pytest.approx(first, abs=1e-5)
    assert rows["sigmaReparam (frozen gain)"]["first_val_loss"] == pytest.approx(first, abs=1e-5)
    assert len({row["val_loss"] for row in rows.values()}) == len(stability.ARMS)


def test_the_plain_run_is_reproduced(stability: Any, tiny: Any) -> None:
    first, again = (stability.run(tiny, "baseline", 4, False, 0, 6) for _ in range(2))
    assert without_time(first) == without_time(again)
    assert stability.run(tiny, "baseline", 4, False, 1, 6)["val_loss"] != first["val_loss"]


def test_a_run_that_is_not_finite_says_so(stability: Any, tiny: Any) -> None:
    row = stability.run(tiny, "baseline", 10**30, False, 0, 6)
    assert row["diverged"]
    assert row["val_loss"] is None
    assert row["train_loss"] is None
    assert row["stable_rank"] is None or math.isfinite(row["stable_rank"])


def test_without_shakespeare_the_text_is_named(
    stability: Any, script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script("stability_tasks"), "SHAKESPEARE", tmp_path / "missing.tar.gz")
    task = stability.characters(batch=2, depth=1)
    assert "Python language reference" in task.data
    row = stability.run(task, "sigmaReparam", 1, True, 0, 4)
    assert row["first_val_loss"] > task.blind > 2
    seen = stability.head_entropies(task.build(True), task.held_out[0][:3])
    assert seen.shape == (1, 4)


def test_head_entropies_match_an_explicit_softmax(stability: Any, script: Any) -> None:
    tasks = script("stability_tasks")
    torch.manual_seed(0)
    model = tasks.Decoder(7, 5, 1, qk_norm=True).double()
    nn.init.normal_(model.blocks[0].attn.qkv.weight, std=1.0)
    x = torch.randint(0, 7, (3, 5))
    block = model.blocks[0]
    q, k, _ = tasks.queries_keys_values(block.attn, block.norm1(model.embed(x) + model.position(torch.arange(5))))
    expected = torch.zeros(4, dtype=torch.float64)
    for b in range(3):
        for head in range(4):
            for i in range(1, 5):
                p = torch.softmax(k[b, head, : i + 1] @ q[b, head, i] / 4, 0)
                expected[head] -= (p * p.log()).sum() / math.log(i + 1) / 12
    torch.testing.assert_close(stability.head_entropies(model, x)[0], expected, rtol=1e-10, atol=1e-12)


def test_sensitivity_caps_at_the_first_loss(script: Any) -> None:
    report = script("stability_report")
    assert report.sensitivity([1.0, 0.5, 9.0, None], first=2.0) == pytest.approx((1 + 0.5 + 2 + 2) / 4 - 0.5)
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.30265 / 3**0.5, rel=1e-5))


def test_the_study_goes_on_where_it_stopped(
    stability: Any, script: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stability, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(script("common"), "RESULTS", tmp_path / "results")
    ran: list[Any] = []
    real = stability.run
    monkeypatch.setattr(stability, "run", lambda *cell: ran.append(cell) or real(*cell))
    first = stability.study(stability.Plan(2, (1,), 2), [tiny])
    assert len(ran) == 2 * 2 * len(stability.ARMS)
    ran.clear()
    rows = stability.study(stability.Plan(2, (1, 64), 2), [tiny])
    assert {cell[2] for cell in ran} == {64}
    assert all(row in rows for row in first)

    facts = {"name": tiny.name, "data": tiny.data, "blind": tiny.blind, "batch": tiny.batch, "base_lr": tiny.base_lr}
    text = script("stability_report").write(rows, [facts], 2, 0.2)
    assert all(f"| {arm} |" in text for arm in stability.ARMS)
    assert len(json.loads((tmp_path / "results" / "stability.json").read_text())["rows"]) == len(rows)
    assert (tmp_path / "results" / "stability.png").stat().st_size > 10_000


def test_step_time_measures_every_variant(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step_time = script("step_time")
    size = {"layers": 1, "width": 16, "heads": 2, "symbols": 10, "length": 8}
    entry = (lambda: step_time.Decoder(**size), lambda batch: torch.randint(0, 10, (batch, 8)), 2)
    monkeypatch.setitem(step_time.MODELS, "tiny", entry)
    rows = step_time.measure("tiny", rounds=3, device="cpu", compiled=False, batch=None)
    assert [row["variant"] for row in rows] == list(step_time.VARIANTS)
    assert rows[0]["ratios"] == [1.0] * 3
    for row in rows:
        assert row["model"] == "tiny, batch 2"
        assert row["step_ms"] > 0
        assert row["ratio"] == sorted(row["ratios"])[1]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mixtral", {"temperature": "exact, weights", "padded": "exact", "save": "kept", "monitor": "2 read"}),
        ("mamba", {"temperature": "nothing to do", "linear": "nothing to do"}),
        ("mpt", {"temperature": "exact, 2 of 2 by an adapter", "padded": "exact", "save": "refused by name"}),
        ("by hand: mask -100", {"temperature": "exact, weights", "monitor": "1 read"}),
        ("fnet", {"temperature": "nothing to do"}),
    ],
)
def test_the_zoo_of_methods(script: Any, family: str, expected: dict[str, str]) -> None:
    row = script("methods_zoo").row_of(family)
    assert {key: row[key] for key in expected} == expected
    assert all(value < 1e-9 for key, value in row.items() if key.endswith("error"))
    assert "not bounded" in row["sigma"]


def test_the_table_of_methods_has_no_silent_cell() -> None:
    rows = json.loads((BENCHMARKS / "results" / "methods_zoo.json").read_text())["rows"]
    assert len(rows) >= 60
    for row in rows:
        assert row["temperature"].startswith(("exact", "refused by name", "nothing to do")), row["family"]
        assert row["monitor"].endswith(" read") or "named: " in row["monitor"], row["family"]
        assert row.get("save", "kept") in ("kept", "refused by name", "no such method"), row["family"]
        assert row["norms"].startswith(("repbn: ", "affine, as ", "nothing to do", "refused by name")), row["family"]
        assert "%" in row["units"] or "none: structured pruning: nothing of " in row["units"], row["family"]
        assert row["masks"].endswith("%"), row["family"]
        assert all(value < 1e-9 for key, value in row.items() if key.endswith("error")), row["family"]


def test_the_page_of_models_says_what_the_results_say(script: Any) -> None:
    works = script("works_page")
    assert works.PAGE.read_text("utf-8") == works.page(), "python benchmarks/works_page.py"
