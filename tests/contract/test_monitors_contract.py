"""The battery for what only watches, beside a method that changes weights; and alone against a run without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from test_contract import data, variants

from lightning_efficient import (
    MagnitudePruning,
    NeuralCollapseMonitor,
    PosteriorCollapseMonitor,
    RepresentationMonitor,
    StateDriftMonitor,
)
from lightning_efficient.testing import HISTORIES, SCENARIOS, assert_method_contract

MONITORS: dict[str, Callable[[], Any]] = {
    "representation_train": lambda: RepresentationMonitor(module="net", stage="train"),
    "representation_val": lambda: RepresentationMonitor(module="net.head", metrics=["rankme", "uniformity"]),
    "neural": NeuralCollapseMonitor,
    # channels as if they were tokens, rows as heads
    "drift_train": lambda: StateDriftMonitor(module="net.stem", train_length=2, stage="train"),
    "posterior_train": lambda: PosteriorCollapseMonitor(mu="net.head", stage="train"),
}
ALWAYS = ("plain", "disabled", "resume", "manual", "configure_model", "ddp", "copy_and_pickle", "fit_twice_then_test")


def tail(test: str, cell: dict[str, Any]) -> bool:
    head = cell["monitor"] == "representation_train"
    return cell["name"] not in ALWAYS or not (head or cell["name"] in ("plain", "resume"))


@pytest.mark.parametrize("name", [s for s in SCENARIOS if s != "ddp_spawn"] + list(HISTORIES))
@pytest.mark.parametrize("monitor", MONITORS)
def test_contract(monitor: str, name: str) -> None:
    make = MONITORS[monitor]
    table = assert_method_contract(
        lambda: (make(), MagnitudePruning(amount=0.5)), variants("cnn"), data, scenarios=[name], more_graphs=8
    )
    assert table == {name: "passed"}
