"""A slice of the study of pretrained encoders, on a small BERT with random weights: arms, cuts, tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
HIDDEN, HEADS, LAYERS = 32, 4, 4


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    study, tasks, report = (importlib.import_module(f"pretrained_{name}") for name in ("study", "tasks", "report"))
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr(study.common, "RESULTS", tmp_path / "results")
    return study, tasks, report


def small_task(tasks: Any) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=20, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=64,
        max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(1, 20, (48, 10), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10) < 4 + torch.arange(48).unsqueeze(1) % 7).long()
    split = (ids * mask, mask), ids[:, 0] % 2
    return tasks.Task(
        "text", lambda: tasks.TextEncoder(BertModel(config, add_pooling_layer=False), 2), split, split, split,
        (10, 20), 1e-3,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning, Torch-Pruning and of methods about so short a run
@pytest.mark.parametrize("arm", ["torch-pruning", "fewer layers", "HESSOPruning", "MagnitudePruning", "ModelPruning"])
def test_every_arm_leaves_half_of_the_weights(scripts: Any, arm: str) -> None:
    study, tasks, _ = scripts
    row = study.Study(small_task(tasks)).run(arm, 0.5, 0)
    assert json.loads(json.dumps(row)) == row
    assert row["weights"] == pytest.approx(0.5, abs=0.1)
    assert row["steps"] == (30 if arm == "fewer layers" else 20)
    if arm in ("MagnitudePruning", "ModelPruning"):
        assert "macs" not in row, "masks take nothing out"
    else:
        assert row["macs"] == pytest.approx(0.5, abs=0.1)


def test_the_cells_are_all_there_once_and_half_of_the_network_first(scripts: Any) -> None:
    study, _, report = scripts
    found = list(study.cells(["text", "image"], 2))
    assert len(set(found)) == len(found) == 2 * 2 * (5 + 3 * len(report.PRUNED)) - 2
    assert all(amount in (0.0, 0.5) for _, _, amount, _ in found[: len(found) // 3])
    assert [arm for task, arm, _, seed in found if (task, seed) == ("text", 0) and "PRepBN" in arm] == [
        "PRepBN, distilled"
    ]


def test_all_alleles_of_a_gene_and_no_padding_beyond_the_longest(scripts: Any) -> None:
    _, tasks, _ = scripts
    ids, mask = tasks._residues(["ACX", "Y"])
    assert ids.tolist() == [[0, 4, 5, 3, 2], [0, 23, 2, 1, 1]]
    assert mask.sum(1).tolist() == [5, 3]
    assert [x.shape for x in tasks.trimmed((ids[1:], mask[1:]))] == [(1, 3), (1, 3)]


def test_the_committed_tables_are_those_of_the_committed_rows(scripts: Any) -> None:
    _, _, report = scripts
    results = ROOT / "benchmarks" / "results"
    rows = json.loads((results / "pretrained_study.json").read_text("utf-8"))["rows"]
    text = (results / "pretrained_study.md").read_text("utf-8")
    for task in report.TITLES:
        for line in report.summary(rows, task):
            cells = " | ".join(str(line.get(column, "")) for column in report.COLUMNS)
            assert f"| {cells} |" in text, (task, cells)
