"""The way of a transition through a run: a schedule over optimizer steps that waits while training is in trouble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from lightning_efficient.common.guard import Clock, JumpGuard
from lightning_efficient.common.schedule import transition, transition_steps


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
        self.asked = hold, length
        self.shape, self.guard = shape, guard
        self.guard_factor, self.guard_length = guard_factor, guard_length
        self.start = 1.0
        self.total: int | None = None
        self.first = self.length = 0
        self._saved: tuple[int, int] | None = None
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

    def plan(self, total: int | None) -> str:
        """Fix the schedule for a run of ``total`` optimizer steps (None: unknown).

        A resumed run keeps the steps it had: if its length were read anew, a finished transition could begin again.

        Returns:
            How the arguments and the length of this run disagree with that, for a warning; empty if they do not.

        Raises:
            ValueError: It does not fit into the run.
        """
        hold, length = self.asked
        self.total, saved, self._saved = total, self._saved, None
        if saved is None:
            self.first, self.length = transition_steps(total, hold=hold, length=length)
            return ""
        self.first, self.length = transition_steps(total, hold=saved[0], length=saved[1])
        try:
            asked = transition_steps(total, hold=hold, length=length)
        except ValueError:  # it does not fit, but what the run began with does
            return ""
        if asked == saved:
            return ""
        return (
            f"the resumed run's transition went from step {saved[0]} to {sum(saved)}, and still does; `hold`={hold!r} "
            f"and `transition`={length!r} of a run of {total} steps would be {asked[0]} to {sum(asked)}."
        )

    def at(self, step: int) -> float:
        """The weight at a step."""
        time = self._clock.at(step)
        return self.start * transition(time, self.total, hold=self.first, length=self.length, shape=self.shape)

    def begins(self, step: int) -> bool:
        """Whether the way down begins at this step, after a hold."""
        return self.start == 1.0 and self._clock.at(step) == self.first > 0

    def over(self, step: int) -> bool:
        """Whether the run has had all its steps (False where that is unknown)."""
        return self.total is not None and step >= self.total

    @property
    def jumps(self) -> int:
        """How often the guard has found something out of range."""
        return self._watchdog.guard.jumps

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Gradients are complete and unscaled."""
        if self.guard != "off" and self.at(trainer.global_step) > 0:
            self._watchdog.before_step(trainer, optimizer)

    def after_batch(self, trainer: Trainer, outputs: Any) -> None:
        """A batch is over."""
        if self._watchdog.stepped:
            self._watchdog.after_step(trainer, outputs)

    def settle(self) -> str:
        """Hold the schedule if the latest step was out of range.

        Returns:
            What happened, for a warning; empty if nothing did.
        """
        step, wrong = self._watchdog.settle()
        if not wrong or self._clock.at(step) <= self.first or self.at(step) == 0:
            return ""
        share, before = self.guard_length, self.at(step)
        length = share if isinstance(share, int) else max(1, round(share * self.length))
        self._clock.hold(step, length, length if self.guard == "rollback" else 0, self.first + 1)
        return (
            f"{wrong} after step {step}. The transition stays at lam = {self.at(step):.3f} (it was {before:.3f}) for "
            f"{length} steps. If this recurs, a longer `transition` or a smaller learning rate helps; guard='off' lets "
            "it go on."
        )

    def state_dict(self) -> dict[str, Any]:
        """Where it began, how far it is, what the guard has seen: plain data. Call :meth:`settle` before."""
        state = {"start": self.start, "steps": [self.first, self.length], "clock": self._clock.state_dict()}
        return state | {"guard": self._watchdog.guard.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.start = float(state["start"])
        first, length = state["steps"]
        self._saved = int(first), int(length)
        self._clock.load_state_dict(state["clock"])
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
            norm = torch.nn.utils.get_total_norm(grads).detach().float()
            precision = trainer.precision_plugin
            if isinstance(precision, MixedPrecision) and precision.scaler is not None:
                # The scaler tries large scales and skips the steps that overflow: nothing to judge, marked by -1.
                norm = torch.where(norm.isfinite(), norm, -1.0)
            self._norms[name] = norm

    def after_step(self, trainer: Trainer, outputs: Any) -> None:
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
            self._pending = trainer.global_step, list(values), packed

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
