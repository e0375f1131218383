"""Pruning: which weights (targets), how they are scored (criteria), cut (units), chosen (selection) and held (masks).

Everything here is torch only; when it happens inside a Trainer stands in ``lightning_efficient.callbacks``.
"""

from lightning_efficient.pruning.masks import MaskTransform, pack_mask, set_mask, unpack_mask
from lightning_efficient.pruning.schedules import Schedule
from lightning_efficient.pruning.selection import make_mask, make_masks

__all__ = ["MaskTransform", "Schedule", "make_mask", "make_masks", "pack_mask", "set_mask", "unpack_mask"]
