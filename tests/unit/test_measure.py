"""Sizes, MACs and latencies against closed forms; the clock against a model of known duration."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from lightning_efficient.common.comparing import ExportError
from lightning_efficient.common.running import Call
from lightning_efficient.deploy import measure
from lightning_efficient.deploy.measure import ExportReport, compare_models, count_macs


def macs(model: nn.Module, *args: Any) -> int:
    with torch.no_grad():
        return count_macs(model.eval(), Call(args))


def test_macs_of_linear_and_convolution() -> None:
    assert macs(nn.Linear(5, 7), torch.randn(3, 5)) == 3 * 5 * 7
    conv = nn.Conv2d(4, 6, 3, groups=2)
    assert macs(conv, torch.randn(2, 4, 8, 8)) == 2 * (6 * 6) * 6 * (4 // 2) * 9


@pytest.mark.parametrize("heads", [1, 4])
def test_macs_of_attention_count_under_fused_kernels(heads: int) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    batch, length, width = 2, 10, 8
    assert macs(Attention(), torch.randn(batch, heads, length, width)) == batch * heads * 2 * length**2 * width


def test_macs_of_an_encoder_in_evaluation_mode() -> None:
    width, hidden, length, batch = 32, 64, 10, 2
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True), 2)
    per_token = 4 * width**2 + 2 * width * hidden + 2 * length * width
    assert macs(model, torch.randn(batch, length, width)) == 2 * batch * length * per_token
    assert torch.backends.mha.get_fastpath_enabled()


def test_rows_against_closed_forms() -> None:
    before = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 4))
    after = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 4))
    after.load_state_dict({k.replace("2.", "1."): v for k, v in before.state_dict().items() if k[0] != "1"})
    x = torch.randn(6, 10)
    report = compare_models(before, after, x, batch_sizes=(3, 5))
    rows = {row.quantity: row for row in report.rows}
    assert (rows["parameters"].before, rows["parameters"].after) == (220 + 40 + 84, 220 + 84)
    assert (rows["buffer elements"].before, rows["buffer elements"].after) == (41, 0)
    assert rows["parameters"].ratio == pytest.approx(304 / 344)
    assert rows["MACs, batch 3"].before == rows["MACs, batch 3"].after == 3 * (200 + 80)
    assert [q for q in rows if "latency" in q] == ["latency, batch 3", "latency, batch 5"]
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    assert rows["state dict file"].before == len(file.getvalue())
    with torch.no_grad():
        expected = (before.eval()(x) - after(x)).abs().max()
    assert report.difference.absolute == pytest.approx(float(expected), rel=1e-6)


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    untied = copy.deepcopy(model)
    model[1].weight = model[0].weight
    rows = {row.quantity: row for row in compare_models(untied, model, torch.randn(1, 30), (1,)).rows}
    assert rows["parameters"].before - rows["parameters"].after == 900
    assert rows["state dict file"].before - rows["state dict file"].after >= 3600


class Clock:
    """Stands in for ``time``: models move it on."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Slow(nn.Module):
    """Takes ``base`` ms a sample; the first runs and some later ones are a hundred times slower."""

    def __init__(self, clock: Clock, base: float, log: list[float]) -> None:
        super().__init__()
        self.clock, self.base, self.log, self.runs = clock, base, log, 0

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.base)
        self.runs += 1
        self.clock.now += self.base * len(x) / 1e3 * (100 if self.runs < 5 or self.runs % (5 + self.base) == 0 else 1)
        return x


def test_latency_is_a_median_of_interleaved_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(), []
    monkeypatch.setattr(measure, "time", clock)
    report = compare_models(Slow(clock, 2, log), Slow(clock, 6, log), torch.randn(2, 3), batch_sizes=(4,))
    row = report.rows[-1]
    assert row.quantity == "latency, batch 4"
    assert (row.before, row.after, row.ratio) == pytest.approx((8, 24, 3))
    # Every round runs both, and which goes first alternates, so that neither profits from the other's caches.
    assert log[-40:] in ([2, 6, 6, 2] * 10, [6, 2, 2, 6] * 10)


def test_models_and_random_state_are_left_alone() -> None:
    before = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    before[1].eval()
    x = torch.randn(4, 3)
    state, rng = copy.deepcopy(before.state_dict()), torch.get_rng_state()
    compare_models(before, copy.deepcopy(before), x, batch_sizes=None)
    assert [m.training for m in before] == [True, False, True]
    assert all(torch.equal(state[k], v) for k, v in before.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_keyword_inputs_and_mixed_first_axes() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return x @ table

    inputs = {"x": torch.randn(2, 3), "table": torch.randn(3, 4)}
    rows = {r.quantity: r for r in compare_models(Net(), Net(), inputs, batch_sizes=None).rows}
    assert rows["MACs, batch as given"].before == 2 * 3 * 4
    assert rows["parameters"].ratio is None
    with pytest.raises(ValueError, match=r"no first \(batch\) axis.*'x': 2, 'table': 3.*batch_sizes=None"):
        compare_models(Net(), Net(), inputs)


def test_report_as_data_and_as_table() -> None:
    report = compare_models(nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(1, 3), batch_sizes=(1,))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["max_abs_difference"] == report.difference.absolute
    assert [row["quantity"] for row in data["rows"]] == [row.quantity for row in report.rows]
    assert data["rounds"] == 20
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.table(after="exported"))
    text = console.export_text()
    threads = torch.get_num_threads()
    assert f"cpu, {threads} thread" in text
    for piece in ("median of 20", "exported ÷ before", "parameters", "ms", "max abs difference", "1.000"):
        assert piece in text
    assert isinstance(report, ExportReport)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 19}, "`rounds` is 19"),
        ({"batch_sizes": ()}, r"`batch_sizes` is \(\)"),
        ({"batch_sizes": (1, 0)}, "`batch_sizes`"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_models(nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(1, 3), **arguments)


def test_outputs_of_another_shape() -> None:
    with pytest.raises(ExportError, match="structure"):
        compare_models(nn.Linear(3, 2), nn.Linear(3, 4), torch.randn(1, 3))


def test_models_that_draw_random_numbers_draw_the_same() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    assert compare_models(Noisy(), Noisy(), torch.zeros(2, 3), batch_sizes=None).difference.absolute == 0.0
