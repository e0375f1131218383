"""The public names: imported on use, and none of them hides a module."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.metadata import version
from types import ModuleType

import pytest

import lightning_efficient


@pytest.mark.parametrize("name", lightning_efficient.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    thing = getattr(lightning_efficient, name)
    assert thing.__name__ == name
    assert thing.__doc__
    assert name in dir(lightning_efficient)


MODULES = [m.name for m in pkgutil.walk_packages(lightning_efficient.__path__, "lightning_efficient.")]


def test_importing_a_module_gives_the_module() -> None:
    """No function hides a module of its name; torchmetrics' habit, a file for each function, is kept where it is."""
    for name in MODULES:
        if not name.startswith("lightning_efficient.metrics.") and not name.endswith("__main__"):
            importlib.import_module(name)
            parent, _, last = name.rpartition(".")
            assert isinstance(getattr(sys.modules[parent], last), ModuleType), name
    assert callable(lightning_efficient.export)
    assert lightning_efficient.export is importlib.import_module("lightning_efficient.deploy.export").export


def test_version_and_unknown_names() -> None:
    assert lightning_efficient.__version__ == version("lightning-efficient")
    with pytest.raises(AttributeError, match="no attribute 'SigmaReparm'"):
        lightning_efficient.SigmaReparm  # noqa: B018
