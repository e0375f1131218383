"""The contract of a weight-space transform ``Ŵ = T(W; θ, s)``: pull back, advance, push."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_efficient.common.schema import MapOf, Schema, TensorOf, Text
from lightning_efficient.weightspace.layout import Layout


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a transform computes in: float64 for float64 weights, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Transform(ABC):
    """One reparametrization of one parameter.

    Every method works in place, under ``torch.no_grad``, on tensors of the compute dtype. Inverting is part of the
    contract unless ``invertible`` is False, in which case the site keeps a copy of ``W``.

    Of a parameter that is cut over processes a transform is given what is here, and :attr:`layout` says which part that
    is; states in files are of the whole parameter. A method that needs sums over all parts is a generator that asks for
    them. A transform that knows nothing of all this belongs to a callback that says so: its ``sharded`` is False.

    Attributes:
        kind: What the transform does; a parameter takes at most one transform of each kind.
        order: Position in the chain from ``W`` (low) to ``Ŵ`` (high).
        invertible: Whether :meth:`pull` recovers ``W`` from ``Ŵ``.
    """

    kind: ClassVar[str]
    order: ClassVar[int]
    invertible: ClassVar[bool] = True
    layout: Layout = Layout()

    def place(self, layout: Layout) -> None:
        """Take note of how the parameter is cut, once, before anything else."""
        self.layout = layout

    @property
    def resident(self) -> bool:
        """Whether :attr:`theta` stays in the optimizer between steps, because a forward reads it and autograd makes its
        gradient. Else it visits for the time of a step, and optimizers keep their parameters to themselves."""
        return False

    @property
    def theta(self) -> nn.Parameter | None:
        """The transform's own trainable parameter, if any; it follows the weight's learning rate, without decay."""
        return None

    @abstractmethod
    def start(self, weight: Tensor) -> None:
        """Choose the first state from ``weight``, the transform's input ``W``."""

    def tend(self, memory: Mapping[str, Any]) -> None:  # noqa: B027
        """See to what the optimizer remembers of the weight, before its step; updates stay what they are."""

    @abstractmethod
    def pull(self, weight: Tensor, grad: Tensor | None) -> None:
        """Turn ``Ŵ`` into ``W`` and, if given, ``∂L/∂Ŵ`` into ``∂L/∂W``, in place; sets ``theta.grad``."""

    @abstractmethod
    def advance(self, weight: Tensor) -> None:
        """Move the state one optimizer step on, from the new ``W``."""

    def follow(self, weight: Tensor) -> Any:  # noqa: B027
        """Take note that ``W`` was changed between two steps (pruned, shrunk); the default does not depend on it."""

    @abstractmethod
    def push(self, weight: Tensor) -> None:
        """Turn ``W`` into ``Ŵ`` in place."""

    @abstractmethod
    def fits(self, weight: Tensor, tolerance: float) -> bool:
        """Whether ``weight``, an output ``Ŵ``, can have come from the present state (checked after loading).

        ``tolerance`` is the relative rounding of the weights' own dtype.
        """

    def rebase(self, weight: Tensor) -> None:  # noqa: B027
        """Re-derive the state from ``weight``, an output that does not fit; the default has nothing to derive."""

    @classmethod
    def state_schema(cls, weight: Tensor) -> Schema:
        """What a state of ``weight``, an output, looks like in a file, as far as that does not depend on arguments.

        Files are checked against it before anything is loaded. The default knows of tensors only.
        """
        return MapOf(Text(), TensorOf())

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The state as plain tensors, ``theta`` included."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take over a copy of a state, in ``weight``'s device and compute dtype.

        Raises ``ValueError`` before anything changes when names or shapes are not those of a state of ``weight``.
        """
