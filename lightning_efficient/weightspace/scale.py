"""``Ŵ = W / τ`` on blocks of one parameter: an attention temperature that lives in the weights behind the logits.

One temperature usually drives several parameters (the query projection, its bias, a table of position biases), each
with a transform of its own; what they share is a :class:`Temperature`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_efficient.common.schedule import transition
from lightning_efficient.common.schema import Record, Schema, TensorOf
from lightning_efficient.weightspace.block import Block
from lightning_efficient.weightspace.layout import Layout
from lightning_efficient.weightspace.sums import Sums, summed
from lightning_efficient.weightspace.transform import Transform, compute_dtype

# exp(±20): beyond that a temperature is 0 or infinite for any attention, and dividing it out again would lose bits.
_LARGEST_LOG = 20.0


class Temperature:
    """One temperature, or one per head, shared by the transforms of several parameters.

    All of those parameters belong to one optimizer, and none is frozen, unless the temperature is constant.

    Args:
        tau: The temperature; where it is learned, the first one. Also a function of the optimizer step (0 before the
            first), for a schedule.
        heads: Number of temperatures.
        learnable: Train ``log τ``: :attr:`log_tau` becomes every transform's ``theta``.

    Raises:
        ValueError: A temperature that is not positive and finite, a learned schedule, or fewer than one head.
    """

    def __init__(self, tau: float | Callable[[int], float] = 1.0, heads: int = 1, learnable: bool = False) -> None:
        if callable(tau) and learnable:
            raise ValueError("`learnable=True` with a function for `tau`: a schedule would overwrite what is learned.")
        if heads < 1:
            raise ValueError(f"`heads` is {heads}; expected at least 1.")
        self.schedule = tau if callable(tau) else None
        first = log_of(tau(0) if callable(tau) else tau)
        self.log_tau = nn.Parameter(torch.full((heads,), first, dtype=torch.float64), requires_grad=learnable)
        self._shares: dict[int, Tensor] = {}
        self._sum: Tensor | None = None

    @property
    def moves(self) -> bool:
        """Whether it is scheduled or learned."""
        return self.schedule is not None or self.log_tau.requires_grad

    @property
    def tau(self) -> Tensor:
        """The temperatures now, shape ``(heads,)``."""
        return self.log_tau.detach().clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()

    def follow(self, weight: Tensor) -> None:
        """Move to where a weight is, in its compute dtype."""
        self.log_tau.data = self.log_tau.data.to(weight.device, compute_dtype(weight.dtype))

    def at(self, step: int) -> None:
        """Take the schedule's value at an optimizer step, if there is a schedule."""
        if self.schedule is not None:
            self.log_tau.data.fill_(log_of(self.schedule(step)))

    def add_gradient(self, source: object, share: Tensor) -> None:
        """Set ``log_tau.grad`` to the sum of what the transforms have given since it was last zeroed or taken away."""
        if self._sum is None or self.log_tau.grad is not self._sum:
            self._shares.clear()
        self._shares[id(source)] = share
        self._sum = torch.stack(list(self._shares.values())).sum(0)
        self.log_tau.grad = self._sum


def log_of(tau: float) -> float:
    """``log τ``.

    Args:
        tau: A temperature.

    Raises:
        ValueError: It is not positive, not finite, or beyond ``e^±20``.
    """
    value = float(tau)
    if not (math.isfinite(value) and value > 0 and abs(math.log(value)) <= _LARGEST_LOG):
        raise ValueError(
            f"a temperature `tau` of {tau!r}; expected a finite number above 0 (1 changes nothing, below 1 sharpens)."
        )
    return math.log(value)


def tau_at(step: int, tau: float, steps: int | None) -> float:
    """The temperature on its way from 1 to ``tau``, geometrically.

    Args:
        step: Optimizer steps done.
        tau: Where it goes.
        steps: How many it takes. None: not known yet, before the first step.
    """
    if step == 0 or steps is None:
        return 1.0
    return math.exp(math.log(tau) * (1.0 - transition(step, None, length=steps)))


class ScaleTransform(Transform):
    """``Ŵ = W / τ`` for blocks of a parameter; the rest passes through.

    With ``G = ∂L/∂Ŵ`` the chain rule gives ``∂L/∂W = G / τ`` and ``∂L/∂(log τ) = -⟨G, Ŵ⟩`` over the blocks.

    Args:
        temperature: What divides; shared with the other parameters that it drives.
        blocks: The blocks, without overlap. None at all: a forward reads the temperature itself, and autograd gives its
            gradient; it steps, moves, is saved and is resumed with this parameter, which stays as it is.
        heads: Which of the temperatures each block takes. None: the first.
    """

    kind = "scale"
    order = 30

    def __init__(self, temperature: Temperature, blocks: Sequence[Block], heads: Sequence[int] | None = None) -> None:
        self.temperature = temperature
        self.blocks = self._here = tuple(blocks)
        self.heads = (0,) * len(self.blocks) if heads is None else tuple(heads)
        count = len(temperature.log_tau)
        if len(self.heads) != len(self.blocks) or not all(0 <= head < count for head in self.heads):
            raise ValueError(
                f"`heads` is {self.heads}; expected one of 0..{count - 1} for each of {len(blocks)} blocks."
            )
        self.step = 0
        self._factors = torch.ones(count)

    def place(self, layout: Layout) -> None:
        """Work on the parts of the blocks that are here."""
        super().place(layout)
        self._here = tuple(layout.block(block) for block in self.blocks)

    @property
    def resident(self) -> bool:
        """Where a forward reads the temperature itself."""
        return not self.blocks

    @property
    def theta(self) -> nn.Parameter | None:
        """``log τ``, shape ``(heads,)``, or None when it is not trained."""
        return self.temperature.log_tau if self.temperature.log_tau.requires_grad else None

    def start(self, weight: Tensor) -> None:
        """The first temperature."""
        self.temperature.follow(weight)
        self.temperature.at(self.step)

    @summed
    def pull(self, weight: Tensor, grad: Tensor | None) -> Sums[None]:
        """Multiply by the temperature of the last :meth:`push`; add to ``log_tau.grad``."""
        if grad is not None:
            share = torch.zeros_like(self._factors)
            for block, head in zip(self._here, self.heads, strict=True):
                g = block.of(grad)
                share[head] -= (g * block.of(weight)).sum()
                g.mul_(self._factors[head])
            if self.theta is not None and self.blocks:
                (share,) = yield self.layout.everyone, [share]
                self.temperature.add_gradient(self, share)
        for block, head in zip(self._here, self.heads, strict=True):
            block.of(weight).div_(self._factors[head])

    def advance(self, weight: Tensor) -> None:
        """One step on in the schedule."""
        self.step += 1
        self.temperature.at(self.step)

    def push(self, weight: Tensor) -> None:
        """Divide by the temperature as it is now."""
        # Kept, as another parameter's transform may move the temperature on before this one's is pulled.
        self._factors = 1 / self.temperature.tau.to(weight)
        for block, head in zip(self._here, self.heads, strict=True):
            block.of(weight).mul_(self._factors[head])

    def fits(self, weight: Tensor, tolerance: float) -> bool:
        """Any weights can have come from any temperature."""
        return True

    @classmethod
    def state_schema(cls, weight: Tensor) -> Schema:
        """A finite ``log_tau`` for all heads, or one a head, and a count."""
        log_tau = TensorOf("floating", ndim=1, finite=True)
        return Record({"log_tau": log_tau, "step": TensorOf("integer", shape=(), low=0)})

    def state_dict(self) -> dict[str, Tensor]:
        """``log_tau`` of shape ``(heads,)`` and the number of steps, ``step``."""
        return {"log_tau": self.temperature.log_tau.detach().clone(), "step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take over temperatures and step; the number of temperatures must be the same."""
        expected = {"log_tau": tuple(self.temperature.log_tau.shape), "step": ()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            raise ValueError(f"a state of a temperature holds {expected}; got {found}. Was it one per head?")
        self.temperature.log_tau.data = state["log_tau"].to(weight.device, compute_dtype(weight.dtype), copy=True)
        self.step = int(state["step"])
        self._factors = 1 / self.temperature.tau
