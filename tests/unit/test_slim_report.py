"""The report of a smaller model: figures, widths, a picture."""

from __future__ import annotations

import copy
from pathlib import Path

import rich

from lightning_efficient.deploy.measure import slim_report
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.slim import apply_slim
from tests.slim_models import ResNet, images, lively


def test_report_and_picture(tmp_path: Path) -> None:
    model = lively(ResNet())
    groups = find_groups(model, images())
    groups.found["a.0"].zero(dict(model.named_parameters()), [1, 2, 3])
    slim = copy.deepcopy(model)
    apply_slim(slim, {"a.0": [0, 4, 5]}, groups)
    report = slim_report(model, slim, images(), batch_sizes=(1, 4))
    rows = {row.quantity: row for row in report.measured.rows}
    assert report.measured.difference.absolute < 1e-5
    assert rows["parameters"].after < rows["parameters"].before
    assert rows["MACs, batch 1"].after < rows["MACs, batch 1"].before
    assert {"latency, batch 1", "latency, batch 4"} <= set(rows)
    assert report.widths["a.0"] == (6, 3)
    assert report.widths["stem.0"] == (8, 8)
    assert report.to_dict()["widths"]["a.0"] == [6, 3]
    console = rich.console.Console(record=True, width=100)
    console.print(report.table())
    assert "1 of 7 layers are narrower" in console.export_text()
    assert report.draw(tmp_path / "widths.png").stat().st_size > 5000
