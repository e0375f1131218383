"""Cells of the battery for the callbacks that accompany the methods: together with one that leaves a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cells import rare
from test_contract import data, variants

from lightning_efficient import (
    AdaptiveGradientModulation,
    CollapseGuard,
    Distillation,
    FixedETFHead,
    MagnitudePruning,
    ModuleTimer,
    PaddingReport,
    RunCost,
)
from lightning_efficient.testing import HISTORIES, SCENARIOS, assert_method_contract

METHODS: dict[str, tuple[Callable[[], Any], str]] = {
    "taught": (lambda: (Distillation(alpha=0.3), MagnitudePruning(amount=0.5)), "cnn"),
    "guarded": (lambda: (CollapseGuard(every_n_steps=2, max_ratio=1e3), MagnitudePruning(amount=0.5)), "cnn"),
    "timed": (lambda: (ModuleTimer(every_n_steps=2, table=False), MagnitudePruning(amount=0.5)), "cnn"),
    # labels, as if they were lengths
    "padding": (lambda: (PaddingReport(mask="1"), MagnitudePruning(amount=0.5)), "cnn"),
    "cost": (lambda: (RunCost(), MagnitudePruning(amount=0.5)), "cnn"),
    "head": (
        lambda: (FixedETFHead(include=["head"], steps=20), MagnitudePruning(amount=0.5, exclude=["head"])), "halves",
    ),
    "modulation": (
        lambda: (
            AdaptiveGradientModulation(modalities={"upper": 0, "lower": "lower"}, module="net.both"),
            MagnitudePruning(amount=0.5),
        ),
        "halves",
    ),
}  # fmt: skip
# Those of a teacher and of a guard are in `test_histories.py`.
NAMES = {m: [*SCENARIOS, *(() if m in ("taught", "guarded") else HISTORIES)] for m in METHODS}
# Spawned processes are slow to start; micro-batches have factors of their own, so that they are not one batch.
CELLS = [(m, s) for m in METHODS for s in NAMES[m] if s != "ddp_spawn" and (m, s) != ("modulation", "accumulation")]
TOO_LATE = "made or made trainable after the callbacks' setup"
REFUSED = {
    ("taught", "manual"): "optimizes manually: its losses are not seen",
    ("head", "configure_model"): TOO_LATE,
    ("head", "setup"): TOO_LATE,
}
WATCH = ("padding", "timed", "cost")


def tail(test: str, cell: dict[str, Any]) -> bool:
    """What only looks has little to break; a teacher and a way back are copies, whatever made the module."""
    also: tuple[str, ...] = ("disabled", "ddp", "longer")
    if cell["method"] not in WATCH:
        also += ("compile", "accumulation", "checkpointing", "bf16_mixed", "manual", "copy_and_pickle")
        also += ("configure_model", "second_model")
    return rare(cell["name"], False, also)


@pytest.mark.parametrize(("method", "name"), CELLS)
def test_contract(method: str, name: str) -> None:
    make, net = METHODS[method]
    refused = {name: REFUSED[method, name]} if (method, name) in REFUSED else {}
    table = assert_method_contract(make, variants(net), data, scenarios=[name], refused=refused, more_graphs=8)
    assert table[name] == "passed" or (refused and table[name].startswith("refused"))
