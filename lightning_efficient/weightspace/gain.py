"""The gains ``γ`` of sigmaReparam: what the optimizer moves, and how far.

An optimizer that adapts to each entry moves a gain by about the learning rate a step, while the spectral norm of a
plain ``m × n`` matrix can move ``√(m n)`` times as fast. ``rate`` makes up for that; the logarithm makes a step
relative to the gain, so that none leads through zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Gain:
    """Gains, one a matrix, behind one trained parameter: ``γ`` itself, or ``log γ``.

    Args:
        count: Number of gains.
        log: Train ``log γ``; a gain then keeps its sign, which is positive.
        rate: Factor on the learning rate of the parameter, whatever that is in this step.
        learnable: Whether the gains are trained at all.
    """

    def __init__(self, count: int, log: bool = False, rate: float = 1.0, learnable: bool = True) -> None:
        self.log = log
        self.rate = rate
        self.parameter = nn.Parameter(torch.zeros(count) if log else torch.ones(count), requires_grad=learnable)
        self._before: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """``γ``, shape ``(count,)``; without the logarithm a view of the parameter."""
        stored = self.parameter.detach()
        return stored.exp() if self.log else stored

    def set(self, value: Tensor) -> None:
        """Give the gains new values, all above zero if the logarithm is trained."""
        self.parameter.data = value.log() if self.log else value.clone()

    def pull(self, rates: Tensor, products: Tensor) -> None:
        """Leave the gradient of the parameter in its ``grad``.

        Args:
            rates: ``∂L/∂γ``.
            products: ``∂L/∂(log γ) = γ ∂L/∂γ``, which whoever calls has had before the other.
        """
        if self.parameter.requires_grad:
            self.parameter.grad = products if self.log else rates

    def begin(self) -> None:
        """The optimizer steps next."""
        # The step is made longer afterwards, not the rate before: so it follows groups, schedules and rates that the
        # user sets by hand, and what optimizers and files hold is as without it.
        if self.rate != 1.0:
            self._before = self.parameter.detach().clone()

    def end(self) -> None:
        """The optimizer has stepped: make its step ``rate`` times as long."""
        if self._before is not None:
            self.parameter.data = torch.lerp(self._before, self.parameter.detach(), self.rate)
            self._before = None

    def state_dict(self) -> dict[str, Tensor]:
        """``gain`` or ``log_gain``, shape ``(count,)``."""
        return {"log_gain" if self.log else "gain": self.parameter.detach().clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over gains from a state of either kind.

        Raises:
            ValueError: A gain that is not above zero, where the logarithm is trained; nothing has changed then.
        """
        if self.log == ("log_gain" in state):
            self.parameter.data = state["log_gain" if self.log else "gain"]
            return
        value = state["gain"] if self.log else state["log_gain"].exp()
        if self.log and not bool((value > 0).all()):
            raise ValueError(
                f"a gain of {value.min().item():.3g} has no logarithm; go on from it with `gain='linear'`."
            )
        self.set(value)
