"""``Ŵ = clamp(W, -b, b)`` with a bound that tightens from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_efficient import Change, Plan, Transform, WeightSpaceCallback, select_modules


class Clamp(Transform):
    """``Ŵ = clamp(W, -b, b)``, ``b = bound · shrink^step``; what is outside learns nothing.

    Args:
        bound: At the start.
        shrink: Factor of a step.
    """

    kind = "clamp"
    order = 35  # behind the temperature's 30
    invertible = False

    def __init__(self, bound: float, shrink: float) -> None:
        self.bound, self.shrink, self.step = bound, shrink, 0

    @property
    def now(self) -> float:
        """The bound of this step."""
        return self.bound * self.shrink**self.step

    def start(self, weight: Tensor) -> None:
        """Nothing depends on the weight."""

    def pull(self, weight: Tensor, grad: Tensor | None) -> None:
        """The site gives ``W`` back."""
        if grad is not None:
            grad.masked_fill_(weight.abs() >= self.now, 0.0)

    def advance(self, weight: Tensor) -> None:
        """One step on in the schedule."""
        self.step += 1

    def push(self, weight: Tensor) -> None:
        """Clamp."""
        weight.clamp_(-self.now, self.now)

    def fits(self, weight: Tensor, tolerance: float) -> bool:
        """Whether all is within the bound."""
        return bool(weight.abs().max() <= self.now * (1 + tolerance))

    def state_dict(self) -> dict[str, Tensor]:
        """The step."""
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take over the step."""
        if set(state) != {"step"}:
            raise ValueError(f"the state of a clamp holds 'step'; got {sorted(state)}.")
        self.step = int(state["step"])


class Clipped(WeightSpaceCallback):
    """Keep the weights of linear layers and convolutions within a bound.

    Args:
        enabled: On or off.
        include: Globs over module names.
        exclude: Globs over module names, applied after ``include``.
        bound: Largest absolute value of a weight at the start.
        shrink: Factor on it of every step.
    """

    method = "clipped"

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        bound: float = 0.2,
        shrink: float = 0.95,
    ) -> None:
        super().__init__(enabled, include, exclude)
        if bound <= 0:
            raise ValueError(f"`bound` is {bound}; expected a number above 0.")
        self.bound, self.shrink = bound, shrink

    def config(self) -> dict[str, Any]:
        """The arguments."""
        return super().config() | {"bound": self.bound, "shrink": self.shrink}

    def plan(self, pl_module: LightningModule) -> Plan:
        """Every linear layer and convolution."""
        types = (nn.Linear, nn.Conv2d)
        found = select_modules(pl_module, types=types, include=self.include, exclude=self.exclude, method=self.method)
        change = Change(self.method, skipped=dict(found.skipped))
        plan = Plan(change=change)
        for name, module in found.matched.items():
            plan.sites[f"{name}.weight"] = (module.weight, partial(Clamp, self.bound, self.shrink))
            change.targets[f"{name}.weight"] = f"|w| <= {self.bound}"
        return plan

    def quantities(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """The bound."""
        first = next(iter(transforms.values()))
        assert isinstance(first, Clamp)
        return {"bound": torch.tensor(first.now)}
