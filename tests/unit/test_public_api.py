"""The public names: imported on use, and none of them hides a module."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from forking import forked

import lightning_efficient


@pytest.mark.parametrize("name", lightning_efficient.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    thing = getattr(lightning_efficient, name)
    assert inspect.unwrap(thing).__name__ == name  # `export` is a module too, once that is imported
    assert thing.__doc__
    assert name in dir(lightning_efficient)


FRESH = """
import sys
for name in [n for n in sys.modules if n.partition(".")[0] == "lightning_efficient"]:
    del sys.modules[name]
from inspect import signature
from types import ModuleType
from torch import nn, ones
from lightning_efficient.deploy.export import export as real
given, wanted = (nn.Linear(2, 2), ones(1, 2)), signature(real)
"""
MODULES = [m.name for m in pkgutil.walk_packages(lightning_efficient.__path__, "lightning_efficient.")]


def test_importing_a_module_gives_the_module() -> None:
    """No function hides a module of its name; torchmetrics' habit, a file for each function, is kept where it is."""
    for name in MODULES:
        if not name.startswith("lightning_efficient.metrics.") and not name.endswith("__main__"):
            importlib.import_module(name)
            parent, _, last = name.rpartition(".")
            assert isinstance(getattr(sys.modules[parent], last), ModuleType), name


@pytest.mark.forks
def test_export_is_a_module_and_the_function_whichever_is_imported_first(tmp_path: Path) -> None:
    """In a process that has not imported the package: an import leaves its mark on it."""
    module = "import lightning_efficient.export as E; assert isinstance(E, ModuleType) and E.export(*given)"
    function = "from lightning_efficient import export; assert export(*given); assert signature(export) == wanted"
    (tmp_path / "fresh.py").write_text("\n".join([FRESH, function, module, function, module]), encoding="utf-8")
    ended = forked(tmp_path / "fresh.py")
    assert ended == (0, ""), ended.output


def test_version_and_unknown_names() -> None:
    assert lightning_efficient.__version__ == version("lightning-efficient")
    with pytest.raises(AttributeError, match="no attribute 'SigmaReparm'"):
        lightning_efficient.SigmaReparm  # noqa: B018
