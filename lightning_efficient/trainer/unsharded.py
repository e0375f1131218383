"""A module as it was before it was cut over processes: what can be asked of whole networks only is asked of a copy."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy

from lightning.pytorch import LightningModule

from lightning_efficient.trainer.example import ModuleView
from lightning_efficient.trainer.stand_in import stand_in


def unsharded(pl_module: LightningModule) -> LightningModule:
    """A stand-in for a module, on copies of its networks.

    Args:
        pl_module: Whole, and attached to a Trainer.
    """
    view = deepcopy(ModuleView(pl_module, nullcontext))
    return stand_in(pl_module, swapped=view.swapped(pl_module))
