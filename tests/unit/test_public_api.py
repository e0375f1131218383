"""The public names: imported on use, and ``export`` stays the function."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import pytest

import lightning_efficient


@pytest.mark.parametrize("name", lightning_efficient.__all__)
def test_every_name_resolves_and_is_documented(name: str) -> None:
    thing = getattr(lightning_efficient, name)
    assert thing.__name__ == name
    assert thing.__doc__
    assert name in dir(lightning_efficient)


def test_the_submodule_does_not_hide_the_function() -> None:
    module = importlib.import_module("lightning_efficient.export")
    from lightning_efficient import export

    assert export is module.export
    assert lightning_efficient.export is module.export


def test_version_and_unknown_names() -> None:
    assert lightning_efficient.__version__ == version("lightning-efficient")
    with pytest.raises(AttributeError, match="no attribute 'SigmaReparm'"):
        lightning_efficient.SigmaReparm  # noqa: B018
