"""The method card: its snippets run, and its figures are those of the benchmark's file."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from grid_models import GridClassifier
from torch import nn
from zoo import loader

from lightning_efficient.attention.linear import LinearAttention

ROOT = Path(__file__).parents[2]
CARD = (ROOT / "docs" / "linear_attention.md").read_text(encoding="utf-8")


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(1)


@pytest.mark.filterwarnings("ignore:.*logger", "ignore:Starting from v1.9.0")
def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)).replace("max_epochs=100", "max_epochs=1")
    (tmp_path / "card.py").write_text(code, encoding="utf-8")
    given = {"model": GridClassifier("grid"), "data": Data(), "images": torch.randn(2, 1, 8, 8)}
    names = runpy.run_path(str(tmp_path / "card.py"), init_globals=given)
    assert sum(isinstance(m, LinearAttention) for m in given["model"].modules()) == 2
    assert not any(isinstance(m, LinearAttention) for m in names["plain"].modules())
    assert isinstance(names["block"], nn.Sequential)
    assert "Attention becomes linear on 16×16 tokens" in capsys.readouterr().out


def test_the_figures_are_the_measured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "linear_attention_cpu.json").read_text())["rows"]
    ratios = {(row["model"], row["work"], row["tokens"]): row["ratio"] for row in rows}
    columns = list(dict.fromkeys((model, work) for model, work, _ in ratios))
    tokens = list(dict.fromkeys(count for _, _, count in ratios))
    assert (len(columns), len(tokens)) == (4, 8)
    for count in tokens:
        cells = [f"{ratios[(*column, count)]:.2f}" for column in columns]
        assert f"| {count} | {' | '.join(cells)} |" in CARD
    findings = (ROOT / "benchmarks" / "results" / "linear_attention_cpu.md").read_text()
    for line in re.findall(r"^- \d+ channels.*$", findings, re.MULTILINE):
        assert re.search(r"about (\d+) tokens", line)[1] in re.search(r"Crossover.*", CARD)[0]
