"""The way of a transition through a run: a schedule over optimizer steps that waits while training is in trouble."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from lightning_efficient.common.guard import Clock, JumpGuard
from lightning_efficient.common.schedule import check_spans, transition, transition_steps
from lightning_efficient.common.schema import Int, ListOf, MapOf, Number, Record, Text
from lightning_efficient.common.shards import total_norm

TRANSITION = Record(
    {
        "start": Number(low=0, high=1),
        "clock": Record({"step": Int(low=0), "time": Int(low=0)}),
        "guard": Record({"jumps": Int(low=0), "past": MapOf(Text(), ListOf(Number()))}),
    }
)


class GuardedTransition:
    """The weight of what is being phased out, as a function of the optimizer step.

    Args:
        length: Length of the way down: a fraction of the run (float) or optimizer steps (int).
        shape: ``"linear"`` or ``"cosine"``.
        hold: How long it stays 1 first: fraction or steps.
        guard: ``"pause"``, ``"rollback"`` or ``"off"``.
        guard_factor: See :class:`~lightning_efficient.common.guard.JumpGuard`.
        guard_length: How long a pause is and how far back a rollback goes: a share of the transition, or steps.

    Raises:
        ValueError: An argument of the guard is out of range; those of the schedule are checked once the run is known.
    """

    def __init__(
        self,
        length: int | float,
        shape: Literal["linear", "cosine"],
        hold: int | float,
        guard: Literal["pause", "rollback", "off"],
        guard_factor: float,
        guard_length: int | float,
    ) -> None:
        if guard not in ("pause", "rollback", "off"):
            raise ValueError(f"`guard` must be 'pause', 'rollback' or 'off'; got {guard!r}.")
        if not (guard_length >= 1 if type(guard_length) is int else 0 < guard_length <= 1):
            raise ValueError(f"`guard_length` must be steps (int from 1) or a share in (0, 1]; got {guard_length!r}.")
        if not 1 < guard_factor < math.inf:
            raise ValueError(f"`guard_factor` must be a number above 1; got {guard_factor!r}.")
        check_spans(hold=hold, transition=length)
        if shape not in ("linear", "cosine"):
            raise ValueError(f"`shape` must be 'linear' or 'cosine'; got {shape!r}.")
        self.asked = hold, length
        self.shape, self.guard = shape, guard
        self.guard_factor, self.guard_length = guard_factor, guard_length
        self.start, self.first, self.length = 1.0, 0, 0
        self.restart(1.0)

    def config(self) -> dict[str, Any]:
        """The arguments, by the names that callbacks give them."""
        hold, length = self.asked
        guard = {"guard": self.guard, "guard_factor": self.guard_factor, "guard_length": self.guard_length}
        return {"transition": length, "shape": self.shape, "hold": hold, **guard}

    def restart(self, start: float) -> None:
        """Begin anew, from a weight that an earlier run has led to."""
        self.start = start
        self._clock, self._watchdog = Clock(), Watchdog(JumpGuard(self.guard_factor))

    def resolve(self, total: int | None) -> tuple[int, int]:
        """First step and number of steps of the way down, in a run of ``total`` optimizer steps (None: unknown).

        Raises:
            ValueError: It does not fit into the run.
        """
        hold, length = self.asked
        return transition_steps(total, hold=hold, length=length, names=("hold", "transition"))

    def fix(self, first: int, length: int) -> None:
        """Take a schedule in steps."""
        self.first, self.length = first, length

    def at(self, step: int) -> float:
        """The weight at a step."""
        time = self._clock.at(step)
        return self.start * transition(time, None, hold=self.first, length=self.length, shape=self.shape)

    def begins(self, step: int) -> bool:
        """Whether the way down begins at this step, after a hold."""
        return self.start == 1.0 and self._clock.at(step) == self.first > 0

    @property
    def jumps(self) -> int:
        """How often the guard has found something out of range."""
        return self._watchdog.guard.jumps

    def before_step(self, trainer: Trainer, optimizer: Optimizer, step: int) -> None:
        """Gradients of a step are complete and unscaled."""
        if self.guard != "off" and self.at(step) > 0:
            self._watchdog.before_step(trainer, optimizer)

    def after_batch(self, trainer: Trainer, outputs: Any, step: int) -> None:
        """A batch is over, and ``step`` steps are done."""
        if self._watchdog.stepped:
            self._watchdog.after_step(trainer, outputs, step)

    def pause(self, length: int) -> int:
        """How many steps the guard holds up a way of ``length`` steps."""
        share = self.guard_length
        return share if isinstance(share, int) else max(1, round(share * length))

    def settle(self) -> str:
        """Hold the schedule if the latest step was out of range.

        Returns:
            What happened, for a warning; empty if nothing did.
        """
        step, wrong = self._watchdog.settle()
        if not wrong or self._clock.at(step) <= self.first or self.at(step) == 0:
            return ""
        before, length = self.at(step), self.pause(self.length)
        self._clock.hold(step, length, length if self.guard == "rollback" else 0, self.first + 1)
        return (
            f"{wrong} after step {step}. The transition stays at lam = {self.at(step):.3f} (it was {before:.3f}) for "
            f"{length} steps. If this recurs, a longer `transition` or a smaller learning rate helps; guard='off' lets "
            "it go on."
        )

    def state_dict(self) -> dict[str, Any]:
        """Where it began, how far it is, what the guard has seen: plain data. Call :meth:`settle` before."""
        return {"start": self.start, "clock": self._clock.state_dict(), "guard": self._watchdog.guard.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.start = float(state["start"])
        self._clock.load_state_dict(state["clock"])
        self._watchdog = Watchdog(JumpGuard(self.guard_factor))  # what the last one was about to judge is not of then
        self._watchdog.guard.load_state_dict(state["guard"])


class Watchdog:
    """Collects what a :class:`JumpGuard` judges.

    Args:
        guard: The judge.
    """

    def __init__(self, guard: JumpGuard) -> None:
        self.guard = guard
        self._norms: dict[str, Tensor] = {}
        self._pending: tuple[int, list[str], Tensor] | None = None

    @property
    def stepped(self) -> bool:
        """Whether an optimizer is about to step, or has stepped, in this batch."""
        return bool(self._norms)

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Gradients are complete and unscaled."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if grads:
            several = len(trainer.optimizers) > 1
            name = f"gradient norm of optimizer {trainer.optimizers.index(optimizer)}" if several else "gradient norm"
            norm = total_norm(grads).float()
            precision = trainer.precision_plugin
            if isinstance(precision, MixedPrecision) and precision.scaler is not None:
                # The scaler tries large scales and skips the steps that overflow: nothing to judge, marked by -1.
                norm = torch.where(norm.isfinite(), norm, -1.0)
            self._norms[name] = norm

    def after_step(self, trainer: Trainer, outputs: Any, step: int) -> None:
        """The batch with which a step ended is over."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        values = dict(self._norms)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            values["loss"] = loss.detach().float().reshape(())
        self._norms = {}
        if values:
            packed = torch.stack(list(values.values()))
            if trainer.world_size > 1:  # every process must come to the same conclusion
                packed = trainer.strategy.reduce(packed, reduce_op="mean")
            self._pending = step, list(values), packed

    def settle(self) -> tuple[int, str]:
        """Show the guard the latest numbers it has not seen.

        Returns:
            After which optimizer step something was wrong, and what; the text is empty if nothing is.
        """
        if self._pending is None:
            return 0, ""
        (step, names, packed), self._pending = self._pending, None
        wrong = [
            self.guard.observe(name, value, "shift" if name == "loss" else "scale")
            for name, value in zip(names, packed.tolist(), strict=True)
            if name == "loss" or value != -1.0
        ]
        return step, "; ".join(filter(None, wrong))
