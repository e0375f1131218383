"""A seconds-long slice of ``benchmarks/sigma_gain_study.py``: the models are what they say, seeds do not meet."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def study(script: Any) -> Any:
    return script("sigma_gain_study")


def test_the_transformer_is_the_tours(script: Any) -> None:
    """The same logits as timm's ViT with the same weights, of the second of two seeds."""
    tasks = script("sigma_gain_tasks")
    ours = tasks.Transformers(tasks.Shape(16, 32, 2, 10, 4, small=True), [0, 1])
    size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2}
    theirs = timm.models.VisionTransformer(**size, num_heads=4, class_token=False, global_pool="avg")
    names = {"embed": "patch_embed.proj", "norm": "fc_norm", "head": "head"}
    for i in range(2):
        names |= {f"{a}{i}": f"blocks.{i}.{b}{a}" for a, b in (("qkv", "attn."), ("proj", "attn."))}
        names |= {f"{a}{i}": f"blocks.{i}.mlp.{a}" for a in ("fc1", "fc2")}
        names |= {f"{a}_{i}": f"blocks.{i}.{a}" for a in ("norm1", "norm2")}
    state = theirs.state_dict()
    for name, other in names.items():
        for part, suffix in (("weight", ""), ("bias", "_bias")):
            target = state[f"{other}.{part}"]
            target.copy_(ours.get_parameter(name + suffix)[1].view(target.shape))
    state["pos_embed"].copy_(ours.position[1:])
    images = torch.randn(2, 3, 1, 8, 8)
    found = ours(torch.stack([tasks.patches(x) for x in images]))
    torch.testing.assert_close(found[1], theirs(images[1]), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[0], theirs(images[0]))


def test_seeds_side_by_side_are_seeds_alone(study: Any) -> None:
    setting = study.Setting(lr=3e-3, steps=4)
    for arm in (study.PLAIN, study.Arm("log", 10.0)):
        together = study.run(setting, arm, [0, 1])
        (alone,) = study.run(setting, arm, [1])
        assert together[1]["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)
        assert together[0]["val_loss"] != together[1]["val_loss"]
        assert json.loads(json.dumps(together)) == together


def test_the_study_goes_on_where_it_stopped(
    study: Any, script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = script("sigma_gain_report")
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    for module in (script("common"), report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    ran: list[Any] = []
    real = study.run
    monkeypatch.setattr(study, "run", lambda *cell: ran.append(cell) or real(*cell))
    tiny = replace(study.CENTRE, steps=2)
    sigma = [study.Arm("log", 10.0), replace(study.PUBLISHED, head=False), replace(study.PUBLISHED, init="one")]
    plan = [(tiny, arm) for arm in (study.PLAIN, *sigma)]
    lamb = [(replace(tiny, optimizer="LAMB"), arm) for arm in (study.PLAIN, study.PUBLISHED)]
    rows = study.study(plan, [0, 1])
    assert [cell[2] for cell in ran] == [[0, 1]] * 4
    ran.clear()
    assert study.study(plan, [0, 1]) == rows
    assert not ran
    rows = study.study([*plan, *lamb], [0, 1])
    assert [cell[2] for cell in ran] == [[0], [1], [0], [1]], "a step of LAMB must not see two seeds in one parameter"

    text = report.write(rows)
    assert all(name in text for name in ("linear ×1, head out", "linear ×1, γ = 1", "log ×10", "ViT, LAMB 0.001"))
    assert len(json.loads((tmp_path / "results" / "sigma_gain.json").read_text())["rows"]) == len(rows) == 12
    assert (tmp_path / "results" / "sigma_gain.png").stat().st_size > 10_000


def test_differences_are_paired_by_seed(script: Any) -> None:
    report = script("sigma_gain_report")
    setting = {
        "task": "ViT",
        "optimizer": "AdamW",
        "lr": 1e-3,
        "warmup": False,
        "decay": 0.05,
        "norms": True,
        "steps": 9,
    }
    rows = [
        {
            "setting": setting,
            "arm_name": arm,
            "seed": seed,
            "val_acc": accuracy,
            "val_loss": None,
            "gains": [None, None],
        }
        for arm, values in {"plain": (0.6, 0.8, 0.7), "log ×10": (0.7, 0.9, 0.8)}.items()
        for seed, accuracy in enumerate(values)
    ]
    cells = report.group(rows)
    differences = report.paired(cells, ("ViT, AdamW 0.001, 9 steps", "log ×10"), "val_acc")
    assert differences == pytest.approx([0.1, 0.1, 0.1])
    (verdict,) = report.verdicts(rows)
    assert "of 1 settings in which the plain model trains, clearly better in 1 and clearly worse in 0" in verdict


def test_the_committed_study_bears_the_defaults(study: Any, script: Any) -> None:
    """What ``SigmaReparam()`` does is in no setting in which the plain model trains clearly worse than it."""
    from lightning_efficient import SigmaReparam

    config = SigmaReparam().config()
    name = str(study.Arm(config["gain"], config["gain_lr"]))
    report = script("sigma_gain_report")
    rows = json.loads((BENCHMARKS / "results" / "sigma_gain.json").read_text())["rows"]
    assert {row["seed"] for row in rows} >= {0, 1, 2}
    verdict = next(text for text in report.verdicts(rows) if text.startswith(f"{name}:"))
    assert "clearly worse in 0;" in verdict
