"""Which methods run in a loop, and why the others do not."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_efficient.loops.norms import NormSwapPart
from lightning_efficient.loops.parts import Part
from lightning_efficient.loops.units import HessoPart
from lightning_efficient.loops.weights import MagnitudePruningPart, SigmaReparamPart, TempScalePart

PARTS: dict[str, type[Part]] = {
    part.method: part for part in (NormSwapPart, SigmaReparamPart, TempScalePart, MagnitudePruningPart, HessoPart)
}
# Why the others have none, and what to do instead.
REFUSED = {
    "linear_attention": "it has no schedule: `functional.apply_linear_attention(model)` before you make the optimizer",
    "pagcp_pruning": "it measures the validation loss of every cut; use PAGCPPruning in a Lightning Trainer",
    "sap_pruning": "its iterations go back and need a validation metric; use SAPPruning in a Lightning Trainer",
    "distillation": "its teacher is a line of your loop: add `alpha * F.mse_loss(student, teacher)`, say, to the loss",
    "collapse_monitor": "it only looks; use `lightning_efficient.metrics` in the loop",
}


def names_of(keys: Collection[str]) -> Sequence[str]:
    """Keys in the order in which methods apply."""
    return [name for name in (*PARTS, *keys) if name in keys]
