"""A package that knows lightning_efficient by its public names only, as one from an index would."""

from clipped.callback import Clipped
from lightning_efficient import register_method

__all__ = ["Clipped", "register"]


def register() -> None:
    """What importing the package does, once more: tests forget it."""
    register_method(
        "clipped",
        Clipped,
        after="temp_scale",
        excludes={"sap_pruning": "SAP scores the weights that clipping has moved: use MagnitudePruning instead"},
        charts={"bound": "efficient/clipped/bound", "share at the bound": "efficient/clipped/share"},
    )


register()
