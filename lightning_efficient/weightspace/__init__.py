"""Methods that live in weight space: the network uses ``Ŵ = T(W)``, the optimizer moves ``W``.

The model's own parameter holds ``Ŵ`` whenever a forward can run, so forward, backward, gradient accumulation,
activation checkpointing, ``torch.compile``, DDP, EMA copies and checkpoints all see an ordinary model. Only inside
``optimizer.step()`` does the parameter hold ``W``: :class:`Boundary` opens and closes that window once per step.
"""

from lightning_efficient.weightspace.block import Block
from lightning_efficient.weightspace.boundary import Boundary
from lightning_efficient.weightspace.scale import ScaleTransform, Temperature
from lightning_efficient.weightspace.site import Site
from lightning_efficient.weightspace.spectral import SpectralTransform, leading_singular_triplet
from lightning_efficient.weightspace.transform import Transform

__all__ = [
    "Block",
    "Boundary",
    "ScaleTransform",
    "Site",
    "SpectralTransform",
    "Temperature",
    "Transform",
    "leading_singular_triplet",
]
