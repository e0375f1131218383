"""How much is pruned when: pure functions of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_efficient.pruning.selection import check_amount
from lightning_efficient.schedule import transition_steps

KINDS = ("cubic", "one_shot", "constant", "iterative")
# Where each begins and how long it takes unless said otherwise, as fractions of the run: late enough for weights to
# mean something, early enough to recover.
_START = {"cubic": 0.1, "one_shot": 0.5}
_LENGTH = {"cubic": 0.6}


def one_shot(step: int, first: int, amount: float) -> float:
    """Nothing before ``first``, everything from there on.

    Args:
        step: Optimizer steps done.
        first: When it happens.
        amount: Final share.
    """
    return amount if step >= first else 0.0


def constant(step: int, amount: float) -> float:
    """The final share from the very first step: sparse training.

    Args:
        step: Optimizer steps done.
        amount: Final share.
    """
    return amount


def cubic(step: int, first: int, span: int, amount: float, initial: float = 0.0, every: int = 1) -> float:
    """``s_f + (s_i - s_f) (1 - (t - t_0)/span)³``: much at first, when there is much to spare, and little in the end.

    Args:
        step: Optimizer steps done, ``t``.
        first: ``t_0``; nothing is pruned before.
        span: Steps from the first to the last change, ``n Δt``.
        amount: Final share ``s_f``.
        initial: Share ``s_i`` at ``t_0``.
        every: ``Δt``, steps between two changes.

    Source: Zhu & Gupta 2017, arXiv 1710.01878, equation 1.
    """
    if step < first:
        return 0.0
    if step >= first + span:
        return amount
    done = (step - first) // every * every / span
    return amount + (initial - amount) * (1 - done) ** 3


def iterative(step: int, total: int, amount: float, rounds: int) -> float:
    """``rounds`` prunings that each keep the same share of what is left, at equal distances over the run.

    Args:
        step: Optimizer steps done.
        total: Optimizer steps in the run; it has ``rounds + 1`` equal parts, the first one dense.
        amount: Final share.
        rounds: How many times.

    Source: Frankle & Carbin, ICLR 2019, arXiv 1803.03635.
    """
    done = min(step * (rounds + 1) // max(total, 1), rounds)
    # The last round is exact, whatever the power rounds to.
    return amount if done == rounds else 1 - (1 - amount) ** (done / rounds)


@dataclass(frozen=True)
class Schedule:
    """A schedule for a run of a given length.

    Args:
        kind: ``"cubic"``, ``"one_shot"``, ``"constant"`` or ``"iterative"``.
        start: When pruning begins: steps (int) or fraction of the run (float). None: 0.1 for cubic, 0.5 for one_shot.
        length: How long cubic takes, likewise. None: 0.6.
        every: Between two changes of cubic, likewise; at least one step.
        rounds: How often iterative prunes.
    """

    kind: Literal["cubic", "one_shot", "constant", "iterative"] = "cubic"
    start: int | float | None = None
    length: int | float | None = None
    every: int | float = 0.01
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`schedule` must be one of {KINDS}; got {self.kind!r}.")
        for name, allowed in (("start", _START), ("length", _LENGTH)):
            if getattr(self, name) is not None and self.kind not in allowed:
                raise ValueError(
                    f"`{name}`={getattr(self, name)!r} has no meaning for schedule={self.kind!r}, only for "
                    f"{sorted(allowed)}. Leave it out."
                )
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"`rounds` must be a whole number from 1; got {self.rounds!r}.")
        valid = isinstance(self.every, (int, float)) and not isinstance(self.every, bool) and self.every > 0
        if not valid or (isinstance(self.every, float) and self.every > 1):
            raise ValueError(
                f"`every` must be steps (int from 1) or a fraction of the run in (0, 1]; got {self.every!r}."
            )

    def steps(self, total: int | None) -> tuple[int, int, int]:
        """What the fractions are in a run of ``total`` steps.

        Args:
            total: Optimizer steps of the run; None: unknown.

        Returns:
            ``(first, span, every)``; zeros where the schedule has no use for one. A run of zero steps has no schedule.

        Raises:
            ValueError: The schedule does not fit into the run, or needs a length that is unknown.
        """
        if total == 0 or self.kind == "constant":
            return 0, 0, 1
        if self.kind == "iterative":
            if total is None:
                raise ValueError("schedule='iterative' divides the run: set `max_steps` or `max_epochs`.")
            if total <= self.rounds:
                raise ValueError(
                    f"{self.rounds} rounds of schedule='iterative' need more than {self.rounds} steps, but the run has "
                    f"{total}. Lower `rounds`."
                )
            return -(-total // (self.rounds + 1)), total, 1
        start = _START[self.kind] if self.start is None else self.start
        length = 0 if self.kind == "one_shot" else _LENGTH[self.kind] if self.length is None else self.length
        try:
            first, span = transition_steps(total, hold=start, length=length)
        except ValueError as error:
            raise ValueError(f"schedule={self.kind!r}, `start` (here `hold`) and `length`: {error}") from None
        if total is not None and first >= total:
            raise ValueError(
                f"schedule={self.kind!r} would start at step {first} of a run of {total}, so nothing would be pruned. "
                f"Lower `start` ({start!r})."
            )
        if isinstance(self.every, int):
            return first, span, self.every
        if total is None:
            if span == 0:
                return first, span, 1
            raise ValueError(
                f"`every`={self.every} is a fraction of the run, but the run's length is unknown. Set `max_steps` or "
                "`max_epochs`, or give `every` in steps, as an int."
            )
        return first, span, max(math.floor(self.every * total), 1)

    def amount_at(self, step: int, total: int | None, amount: float) -> float:
        """The share that is to be pruned after ``step`` of ``total`` steps.

        Args:
            step: Optimizer steps done.
            total: Optimizer steps of the run; None: unknown.
            amount: Final share, in [0, 1).

        Raises:
            ValueError: See :meth:`steps`.
        """
        check_amount(amount)
        first, span, every = self.steps(total)
        if self.kind == "constant":
            return constant(step, amount)
        if total == 0:
            return 0.0
        if self.kind == "one_shot":
            return one_shot(step, first, amount)
        if self.kind == "cubic":
            return cubic(step, first, span, amount, every=every)
        return iterative(step, span, amount, self.rounds)
