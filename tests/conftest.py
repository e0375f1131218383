"""Shared by all tests. Warnings are errors; the exceptions and their reasons stand in pyproject.toml and here."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
import torch.distributed

# Lightning 2.6's LightningCLI calls functions that jsonargparse 4.49 renamed; this is jsonargparse's documented switch.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _installed_once() -> Iterator[None]:
    """A Trainer reads what every installed package declares, a tenth of a short fit: once for each path of modules."""
    from lightning.fabric.utilities import registry  # not above: the process that hands out tests needs no Lightning

    @cache
    def read(group: str, path: tuple[str, ...]) -> Any:
        return entry_points(group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", lambda group: read(group, tuple(sys.path)))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, alone or after others."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No test leaves a process group, variables (such as a port that is taken) or threads behind.

    Lightning sets all for ``strategy="ddp"`` and takes none back.
    """
    before = dict(os.environ)
    torch.set_num_threads(1)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def uninstall(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on the package cannot be imported, as if it were not installed: pickles do not find its names."""

    def hide() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "lightning_efficient"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "lightning_efficient", None)

    return hide


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the long tail of a matrix, and puts tests that fork first, then slow ones, so that no process ends alone.

    A module's ``tail(test, parameters)`` says which cells of its matrices are ``exhaustive``: run on request only.
    Autograd in a forked child fails once its parent has started autograd's threads, and compiling does start them. The
    battery's scenarios ``ddp``, ``fsdp2`` and ``tp`` fork, and so does what is marked.
    """
    for item in items:
        tail, cell = getattr(getattr(item, "module", None), "tail", None), getattr(item, "callspec", None)
        if tail is not None and cell is not None and tail(item.originalname, cell.params):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.exhaustive)

    def first(item: pytest.Item) -> tuple[bool, bool]:
        scenario = getattr(item, "callspec", None) and item.callspec.params.get("scenario")
        forks = scenario in ("ddp", "fsdp2", "tp") or item.get_closest_marker("forks") is not None
        return forks, item.get_closest_marker("slow") is not None

    items.sort(key=first, reverse=True)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: no collection of garbage needs to look at it again."""
    gc.collect()
    gc.freeze()
