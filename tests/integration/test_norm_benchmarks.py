"""Seconds-long slices of the norm-swap benchmarks: tiny configurations, and their figures against plain arithmetic."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.swap import apply_norm_swap

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("norm_tasks", "norm_study"):
        monkeypatch.setattr(importlib.import_module(name), "RUNS", tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path / "results")
    return importlib.import_module


@pytest.fixture
def images(script: Any) -> Any:
    def split(n: int) -> Any:
        y = torch.arange(n) % 10
        return torch.randn(n, 1, 28, 28) + y[:, None, None, None], y

    torch.manual_seed(0)
    return script("norm_tasks").Images(split(300), split(40), split(30))


@pytest.fixture
def plan(script: Any) -> Any:
    sizes = {"seeds": 2, "steps": 8, "tune_steps": 6, "batch": 8, "recalibration": 1, "points": 4, "depth": 1}
    return script("norm_study").Plan(**sizes, rates=(1e-3, 2e-3), tune_rates=(1e-3,))


# -- data and memory -------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: torch.Tensor) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.to(torch.uint8).numpy().tobytes()))


def test_fashion_splits_do_not_overlap(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tasks = script("norm_tasks")
    number = torch.arange(50)[:, None, None].expand(50, 28, 28)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", number)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", torch.arange(50))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", number + 100)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", torch.arange(50) + 100)
    monkeypatch.setattr(tasks, "FASHION", (tmp_path / "missing", tmp_path))
    found = tasks.fashion(30, 12, 7)
    assert [len(s[0]) for s in (found.train, found.validation, found.test)] == [30, 12, 7]
    labels = [set(s[1].tolist()) for s in (found.train, found.validation, found.test)]
    assert len(labels[0] | labels[1]) == 42
    assert labels[2] == set(range(100, 107))
    x, y = found.train
    assert x.shape == (30, 1, 28, 28)
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-5)
    assert torch.corrcoef(torch.stack([x[:, 0, 0, 0], y.float()]))[0, 1] > 1 - 1e-6  # images stay with their labels


def test_a_missing_data_set_says_how_to_get_it(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script("norm_tasks"), "FASHION", (tmp_path,))
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        script("norm_tasks").fashion()


def test_finished_runs_are_not_repeated(script: Any) -> None:
    tasks = script("norm_tasks")
    made = []

    def run() -> dict[str, Any]:
        made.append(1)
        return {"value": len(made)}

    assert tasks.Finished("a.jsonl").get(("x", 1, 0.5), run) == {"value": 1}
    again = tasks.Finished("a.jsonl")
    assert again.get(("x", 1, 0.5), run) == {"value": 1}
    assert again.get(("x", 2, 0.5), run) == {"value": 2}
    assert len(tasks.Finished("a.jsonl").rows) == 2


def test_batches_depend_on_the_seed_alone(script: Any) -> None:
    data = torch.arange(20.0), torch.arange(20)
    first, again, other = (torch.stack([y for _, y in script("norm_tasks").batches(data, 6, s)]) for s in (0, 0, 1))
    assert first.shape == (3, 6)
    assert len(set(first.flatten().tolist())) == 18
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_token_batch_norm_normalizes_over_all_tokens(script: Any) -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64) * 3 + 1
    expected = (x - x.mean((0, 1))) / (x.var((0, 1), unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(script("norm_tasks").TokenBatchNorm(3).double()(x), expected)


# -- accuracy study --------------------------------------------------------------------------------------------------


def test_the_study_runs_every_variant_and_goes_on(
    script: Any, images: Any, plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = script("norm_study")
    drawn = ("PRepBN, slab init, T = 0.8", "affine, copy init")
    scratch = [v for v in study.SCRATCH if v.name in ("LN", "BN from the start", *drawn)]
    swap = [v for v in study.SWAP if v.name == "LN, trained on" or v.name.startswith("repbn, slab init")]
    monkeypatch.setattr(study, "SCRATCH", scratch)
    monkeypatch.setattr(study, "SWAP", swap)
    rows = study.study(plan, images)
    assert len(rows) == 2 * (len(scratch) + len(swap))
    assert json.loads(json.dumps(rows)) == rows
    ran: list[Any] = []
    monkeypatch.setattr(study, "run", lambda *cell: ran.append(cell))
    assert study.study(plan, images) == rows
    assert not ran

    swapped = [r for r in rows if "exported_agrees" in r]
    assert len(swapped) == 2 * (len(scratch) + len(swap) - 3)
    assert {r["exported_agrees"] for r in swapped} == {1.0}
    assert all(r["recalibrated"] is ("repbn" in r["variant"].lower() or "BN" in r["variant"]) for r in rows)
    lm = {r["seed"]: r for r in rows if r["variant"] == "LN"}
    assert {r["lr"] for r in rows if not r["tuned"]} == {lm[0]["lr"]} <= {1e-3, 2e-3}
    text = script("norm_report").write_study(rows, vars(plan), 300)
    assert all(f"| {v.name} |" in text for v in (*scratch, *swap))
    assert len(json.loads((tmp_path / "results" / "norm_study.json").read_text())["rows"]) == len(rows)
    assert (tmp_path / "results" / "norm_study.png").stat().st_size > 10_000


def test_the_curve_follows_blend_and_finished_form_without_touching_the_run(
    script: Any, images: Any, plan: Any
) -> None:
    study = script("norm_study")
    variant = next(v for v in study.SCRATCH if v.curve and v.swap is not None)
    row = study.run(variant, 0, images, plan, 1e-3)
    assert [p["step"] for p in row["curve"]] == [2, 4, 6, 8]
    # T = 0.8 of 8 steps is 6: the steps before these used lam of step 1, 3, 5, 7.
    assert [p["lam"] for p in row["curve"]] == pytest.approx([1 - 1 / 6, 1 - 3 / 6, 1 - 5 / 6, 0])
    assert row["curve"][-1]["blend"] == row["curve"][-1]["finished"] == row["val_acc"]
    unwatched = study.run(study.Variant(variant.name, variant.swap), 0, images, plan, 1e-3)
    same = ("val_loss", "test_loss", "peak_grad_norm", "last_train_loss")
    assert {k: row[k] for k in same} == {k: unwatched[k] for k in same}


def test_a_tuned_run_starts_from_the_trained_model(script: Any, images: Any, plan: Any) -> None:
    study = script("norm_study")
    first = study.run(study.SCRATCH[0], 0, images, plan, 1e-3)
    still = study.run(study.SWAP[0], 0, images, plan, 0.0, 1e-3)
    assert still["test_loss"] == pytest.approx(first["test_loss"], rel=1e-6)


def test_accuracy_counts(script: Any) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = Fixed()
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.5, 0.0]])
    found = script("norm_study").accuracy(model, (scores, torch.tensor([0, 0, 0, 1])))
    each = [math.log1p(math.exp(-m)) for m in (2, -1, 3, -0.5)]
    assert found == (50.0, pytest.approx(statistics.fmean(each), rel=1e-6))
    assert model.training


def test_report_numbers(script: Any) -> None:
    report = script("norm_report")
    assert report.shown([1.0, 2.0, 3.0]) == "2.00 ± 2.48"  # t(0.975, 2) = 4.303, deviation 1
    runs = [{"variant": "a", "seed": s, "test_acc": v, "test_acc_recalibrated": v + 1} for s, v in ((1, 5.0), (0, 3.0))]
    base = [{"variant": "LN", "seed": s, "test_acc": v} for s, v in ((0, 1.0), (1, 2.0))]
    assert sorted(report.paired(runs, base, "test_acc")) == [3.0, 4.0]
    assert [report.verdict(d) for d in ([1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, -1.0, 0.2], [1.0])] == [1, -1, 0, 0]
    assert report.clearly([*runs, *base], "LN") == "above LN: none. Below: none. Not told apart: a (+3.50)."


# -- language model --------------------------------------------------------------------------------------------------


@pytest.fixture
def lm(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = script("norm_lm")
    monkeypatch.setattr(module, "read_text", lambda: ("Shall I compare thee to a summer's day? " * 40, "a line"))
    return module


def test_the_text_is_split_in_three(lm: Any) -> None:
    text = lm.Text(12)
    assert [text.parts[k] for k in ("train", "val", "test")] == [(0, 1440), (1440, 1520), (1520, 1600)]
    for part, (first, last) in text.parts.items():
        x, y = text.even(part, 5)
        assert torch.equal(x[0], text.data[first : first + 12])
        assert torch.equal(y[-1], text.data[last - 12 : last])
    drawn = list(text.draw(50, 8, seed=0))
    assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in drawn)
    assert torch.equal(drawn[0][0], next(text.draw(1, 8, seed=0))[0])


def test_batch_statistics_change_the_past_in_training_only(script: Any, lm: Any) -> None:
    text = lm.Text(12)
    decoder = script("stability_tasks").Decoder(len(text.symbols), 12, 1, False)
    assert lm.change_of_the_past(decoder.train(), text, 3) < 1e-6
    apply_norm_swap(decoder, {"target": "repbn"})
    for norm in blend_norms(decoder).values():
        norm.finish()
    assert lm.change_of_the_past(decoder.train(), text, 3) > 1e-3
    assert lm.change_of_the_past(decoder.eval(), text, 3) < 1e-6
    data = text.even("test", 5)
    expected = F.cross_entropy(decoder(data[0]).flatten(0, 1), data[1].flatten()).item()
    assert lm.loss(decoder, data, 2) == pytest.approx(expected, rel=1e-5)


def test_the_language_model_study_reports(
    script: Any, lm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = lm.Plan(seeds=2, steps=4, length=8, depth=1, rates=(1e-3,))
    text = lm.Text(8)
    rows = lm.study(plan, text)
    assert [r["variant"] for r in rows] == [v.name for v in lm.VARIANTS] * 2
    monkeypatch.setattr(lm, "run", lambda *cell: pytest.fail(f"repeated {cell}"))
    assert lm.study(plan, text) == rows
    found = script("norm_report").write_lm(rows, vars(plan), text.source)
    assert all(f"| {v.name} |" in found for v in lm.VARIANTS)
    assert (tmp_path / "results" / "norm_lm.md").read_text() == found


# -- timings ---------------------------------------------------------------------------------------------------------


def test_the_published_layout_computes_what_the_blend_computes(script: Any) -> None:
    step = script("norm_step")
    torch.manual_seed(0)
    theirs = step.PublishedLayout(6, steps=4).double()
    ours = step.swapped("repbn", 6, False).double()
    x = torch.randn(5, 7, 6, dtype=torch.float64)
    for lam in (1.0, 0.75, 0.5, 0.25, 0.0, 0.0):
        ours.lam.fill_(lam)
        torch.testing.assert_close(ours(x), theirs(x))
    ours.finish()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_norm_timings_cover_every_variant(script: Any) -> None:
    step = script("norm_step")
    rows = step.measure_norms((2, 5, 8), 3, "cpu")
    assert [r["norm"] for r in rows] == list(step.norm_variants(8))
    assert rows[0]["ratio"] == 1.0
    published = next(r for r in rows if r["norm"] == "published layout")
    assert published["published"] == 1.0
    times = {r["norm"]: r["times"] for r in rows}
    expected = [b / a for a, b in zip(times["LN"], times["blend, repbn"], strict=True)]
    blend = next(r for r in rows if r["norm"] == "blend, repbn")
    assert blend["ratio"] == sorted(expected)[1]


def test_step_timings_of_a_small_model(script: Any) -> None:
    step = script("norm_step")
    small = lambda: nn.Sequential(nn.Conv2d(3, 4, 56, 56), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 100))  # noqa: E731
    rows = step.measure_steps("small", step.Case(small, 3), 3, "cpu")
    names = ["LN", "blend, repbn", "finished, repbn", "blend, affine", "finished, affine"]
    assert [r["norms"] for r in rows] == names
    assert {r["model"] for r in rows} == {"small, batch 3, 1 norms"}
    slow = [{**r, "ratio": 2.0} for r in rows]
    assert "blend ÷ LN ≤ 1.35 in 0 of 2 (not: small blend, repbn 2.00; small blend, affine 2.00)" in step.reading(
        step.measure_norms((2, 5, 8), 3, "cpu"), slow
    )


def test_latency_compares_four_networks(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    latency = script("norm_latency")
    monkeypatch.setitem(latency.MODELS, "tiny", "test_vit")
    nets, counts = latency.networks("test_vit", 160)
    assert tuple(nets) == latency.VARIANTS
    assert counts["left"] == 0
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(nets["exported"](x), nets["RepBN, not folded"](x), rtol=1e-4, atol=1e-5)
    bare = [m for m in nets["norms deleted"].modules() if isinstance(m, nn.LayerNorm)]
    assert not bare
    rows = latency.measure("tiny", [1], 2, "cpu", torch.float32, 160)
    assert [r["network"] for r in rows] == list(latency.VARIANTS)
    assert len(rows[0]["times"]) == 6
    assert "in 1 of 1 cells" in latency.reading([{**r, "limit": 1.0} for r in rows])


def test_the_interval_of_a_median_is_made_of_order_statistics(script: Any) -> None:
    latency = script("norm_latency")
    reference = [float(n) for n in range(1, 16)]
    # 15 values: the 4th and the 12th have 96.5 % of the median between them, the 5th and 11th 88 %.
    assert latency.interval(reference, [1.0] * 15) == "4.000 to 12.000"
    assert latency.speed(reference, [1.0] * 15) == 8.0
