"""The demo: a real, small data set, a model that knows nothing of this package, and a YAML file a variant."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_efficient.demo.data import Digits
    from lightning_efficient.demo.model import DigitsViT

__all__ = ["Digits", "DigitsViT"]


def __getattr__(name: str) -> object:
    # Late, so that `lightning-efficient demo --help` imports no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{'data' if name == 'Digits' else 'model'}"), name)
