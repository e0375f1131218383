"""Schedules as pure functions of the step, so that resuming, repeating and skipping steps cannot get them wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


def transition(
    step: int,
    total: int | None,
    *,
    hold: int | float = 0,
    length: int | float = 0.8,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """The weight of what is being phased out: 1 while held, then down to 0 and 0 from there on.

    With ``hold=0`` and ``shape="linear"`` this is ``1 - step / length``, SLAB's schedule (arXiv 2405.11582).

    Args:
        step: Optimizer steps done so far, from 0.
        total: Optimizer steps in the run. None, -1 or infinity: unknown, which only works for lengths given in steps.
        hold: How long to stay at 1: an ``int`` in steps, or a ``float`` as a fraction of the run.
        length: How long the way down takes, likewise; 0 is a jump.
        shape: ``"linear"``, or ``"cosine"`` (half a period: slow at both ends).

    Returns:
        A number in [0, 1]: exactly 1 up to step ``hold`` (unless ``length`` is 0), exactly 0 from ``hold + length``.

    Raises:
        ValueError: The transition would not end within the run, a fraction is given for a run of unknown length, or a
            value is out of range.
    """
    if step < 0:
        raise ValueError(f"`step` counts from 0; got {step}.")
    if shape not in ("linear", "cosine"):
        raise ValueError(f"`shape` must be 'linear' or 'cosine'; got {shape!r}.")
    first, span = transition_steps(total, hold=hold, length=length)
    if step >= first + span:
        return 0.0
    if step <= first:
        return 1.0
    progress = (step - first) / span
    return 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def transition_steps(
    total: int | None,
    *,
    hold: int | float = 0,
    length: int | float = 0.8,
    names: tuple[str | None, str | None] = ("hold", "length"),
) -> tuple[int, int]:
    """When a transition starts and how many steps it takes.

    Args:
        total: Optimizer steps in the run; None, -1 or infinity: unknown.
        hold: Steps (``int``) or fraction of the run (``float``) before it starts.
        length: Steps or fraction of the run from its start to its end.
        names: Of the two, as the user knows them, for messages; None: there is no such argument, or it was not given.

    Returns:
        (first step, number of steps). Fractions that fit together always do, however short the run: ``hold`` is rounded
        down, and a ``length`` above 0 is at least one step.

    Raises:
        ValueError: As for ``transition``.
    """
    known = total is not None and math.isfinite(total) and total >= 0
    for name, default, value in zip(names, ("hold", "length"), (hold, length), strict=True):
        check_span(name or default, value, known)
    run = total if known and total is not None else 0
    first = hold if isinstance(hold, int) else math.floor(hold * run + 1e-9)
    if isinstance(length, int):
        span = length
    elif isinstance(hold, int):
        span = max(round(length * run), 1) if length > 0 else 0
    elif length > 0:
        # Rounded where it ends, not in how long it is, so that 0.2 and 0.8 make a whole in a run of 2 steps.
        first = min(first, run - 1) if hold + length <= 1 else first
        span = max(round((hold + length) * run) - first, 1)
    else:
        span = 0
    if known and first + span > run:
        said = [f"`{name}`={value!r}" for name, value in zip(names, (hold, length), strict=True) if name is not None]
        where = "ends" if len(said) == 1 else "together end"
        if said and first > run and names[0] is not None:  # whatever the length
            said, where = said[:1], "begins"
        raise ValueError(
            f"{' and '.join(said) or 'the schedule'} {where} at step {first if where == 'begins' else first + span}, "
            f"but the run has {total} steps. Lower {'it' if len(said) == 1 else 'one of them'}, or train longer."
        )
    return first, span


def check_spans(**spans: int | float | None) -> None:
    """Refuse what is no length of time, and what comes one after the other and fits into no run.

    Args:
        **spans: Argument → steps (int) or fraction of a run (float), one after the other; None: unknown.

    Raises:
        ValueError: Says which.
    """
    for name, value in spans.items():
        if value is not None:
            check_span(name, value)
    fractions = {name: value for name, value in spans.items() if isinstance(value, float)}
    if sum(fractions.values()) > 1 + 1e-9:
        said = " and ".join(f"`{name}`={value!r}" for name, value in fractions.items())
        raise ValueError(f"{said} are more than a whole run: together they may be 1.0 at most.")


def check_amount(amount: float, name: str = "amount") -> None:
    """Refuse what is no share to prune.

    Args:
        amount: What the user wrote.
        name: Of the argument, for the message.

    Raises:
        ValueError: Not a number in [0, 1).
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < 1:
        raise ValueError(
            f"`{name}` is the share of weights to prune, a number in [0, 1) such as 0.5; got {amount!r}. "
            "Pruning all of them leaves nothing to train."
        )


def check_span(name: str, value: int | float, known: bool = True) -> None:
    """Refuse what is no length of time.

    Args:
        name: Of the argument.
        value: Steps (int) or fraction of a run (float).
        known: Whether the run's length is; a fraction of an unknown one means nothing.

    Raises:
        ValueError: It is neither, out of range, or a fraction of what is unknown.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{name}` must be steps (int) or a fraction of the run (float); got {value!r}.")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(
                f"`{name}` must not be negative: steps (int) or a share of the run (float); got {value!r}."
            )
    elif not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` as a fraction of the run must be within [0, 1]; got {value!r}. Steps are an int.")
    elif not known:
        raise ValueError(
            f"`{name}`={value} is a fraction of the run, but the run's length is unknown. Set `max_steps` or "
            f"`max_epochs`, or give `{name}` in steps, as an int."
        )


def moments(total: int | None, start: int | float, every: int | float, rounds: int) -> tuple[int, ...]:
    """The steps before which something happens ``rounds`` times.

    Args:
        total: Optimizer steps in the run; None: unknown, which only works for steps. A run of none has no moments.
        start: Of the first: steps (``int``) or a fraction of the run (``float``).
        every: From one to the next, likewise; at least one step.
        rounds: How often.

    Returns:
        Ascending steps, all before the end of the run.

    Raises:
        ValueError: A fraction is given for a run of unknown length, a value is out of range, or the last moment lies at
            the end of the run or beyond it.
    """
    known = total is not None and math.isfinite(total) and total >= 0
    check_span("start", start, known)
    if rounds > 1:
        check_span("every", every, known)
    if total == 0:
        return ()
    run = total if known and total is not None else 0
    first = start if isinstance(start, int) else math.floor(start * run + 1e-9)
    apart = max(every if isinstance(every, int) else math.floor(every * run + 1e-9), 1)
    steps = tuple(first + i * apart for i in range(rounds))
    if known and steps[-1] >= run:
        several = f", `every`={every!r} and `rounds`={rounds} make the last one begin" if rounds > 1 else " is"
        raise ValueError(
            f"`start`={start!r}{several} at step {steps[-1]}, but the run has {total} steps. Start earlier"
            f"{', or have fewer rounds' if rounds > 1 else ''}."
        )
    return steps


def check_moments(start: int | float, every: int | float, rounds: int) -> None:
    """Refuse moments that lie in no run, whatever its length; as :func:`moments` does once that is known.

    Raises:
        ValueError: Says which argument.
    """
    check_span("start", start)
    check_span("every", every)
    apart = every * (rounds - 1) if isinstance(every, float) or rounds == 1 else 0
    if isinstance(start, float) and start + apart >= 1:
        more = f", `every`={every!r} and `rounds`={rounds} make the last one begin" if rounds > 1 else " is"
        raise ValueError(f"`start`={start!r}{more} at the end of the run, or beyond it. Start earlier.")


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
        start, length = (getattr(self, name) for name in ("start", "length"))
        check_spans(start=start, length=length)
        if isinstance(start, float) and start >= 1:
            raise ValueError(
                f"`start`={start!r} is the end of the run, so nothing would be pruned. Give less than 1.0."
            )
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
        names = None if self.start is None else "start", None if self.length is None else "length"
        try:
            first, span = transition_steps(total, hold=start, length=length, names=names)
        except ValueError as error:
            raise ValueError(f"schedule={self.kind!r}: {error}") from None
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

    def share(self, step: int, steps: tuple[int, int, int], amount: float) -> float:
        """The share that is to be pruned after ``step`` steps of a schedule that is fixed already.

        Args:
            step: Optimizer steps done.
            steps: From :meth:`steps`, perhaps of a run of another length.
            amount: Final share, in [0, 1).
        """
        check_amount(amount)
        first, span, every = steps
        if self.kind == "constant":
            return constant(step, amount)
        if self.kind == "one_shot":
            return one_shot(step, first, amount)
        if self.kind == "cubic":
            return cubic(step, first, span, amount, every=every)
        return iterative(step, span, amount, self.rounds)

    def end(self, steps: Sequence[int]) -> int:
        """Optimizer steps done when the last change has come."""
        first, span, *_ = steps
        return -(-span * self.rounds // (self.rounds + 1)) if self.kind == "iterative" else first + span
