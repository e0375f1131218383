"""Cells of the battery for the callbacks that accompany the methods: together with one that leaves a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cells import rare
from test_contract import data, variants

from lightning_efficient import CollapseGuard, Distillation, MagnitudePruning, ModuleTimer, PaddingReport
from lightning_efficient.testing import SCENARIOS, assert_method_contract

METHODS: dict[str, Callable[[], Any]] = {
    "taught": lambda: (Distillation(alpha=0.3), MagnitudePruning(amount=0.5)),
    "guarded": lambda: (CollapseGuard(every_n_steps=2, max_ratio=1e3), MagnitudePruning(amount=0.5)),
    # labels, as if they were lengths
    "timed": lambda: (ModuleTimer(every_n_steps=2, table=False), MagnitudePruning(amount=0.5)),
    "padding": lambda: (PaddingReport(mask="1"), MagnitudePruning(amount=0.5)),
}
# Compiled code runs as written under the canary, which costs no graph; spawned processes are slow to start.
CELLS = [(m, s) for m in METHODS for s in SCENARIOS if s != "ddp_spawn"]
REFUSED = {("taught", "manual"): "optimizes manually: its losses are not seen"}


def tail(test: str, cell: dict[str, Any]) -> bool:
    """What only looks has little to break; a teacher and a way back are copies, whatever made the module."""
    also = ("compile", "disabled", "ddp")
    if cell["method"] not in ("padding", "timed"):
        also += ("accumulation", "checkpointing", "bf16_mixed", "manual", "copy_and_pickle", "configure_model")
    return rare(cell["scenario"], False, also)


@pytest.mark.parametrize(("method", "scenario"), CELLS)
def test_contract(method: str, scenario: str) -> None:
    refused = {scenario: REFUSED[method, scenario]} if (method, scenario) in REFUSED else {}
    table = assert_method_contract(METHODS[method], variants("cnn"), data, scenarios=[scenario], refused=refused)
    assert table[scenario] == "passed" or (refused and table[scenario].startswith("refused"))
