"""Where a fit stands: fresh or resumed, which step of its own schedule, and is that schedule over.

A callback asks nothing else. What a *model* is like (masks on, units gone, a temperature in its weights) is no part of
it: that stays with the model (``lifecycle.state``), so that a second fit, a second model with the same callback and a
model from a file are all told apart by identity. What belongs to a *fit* begins anew in every ``setup("fit")`` and
comes back from a checkpoint only where that fit resumes (``ckpt_path``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_efficient.common.schema import Flag, Int, ListOf, OrNone, Record, Such
from lightning_efficient.trainer.length import remaining_steps

STANDING = Such(
    Record(
        {
            "begun": Flag(), "start": Int(low=0), "schedule": OrNone(ListOf(Int(low=0))),
            "total": OrNone(Int(low=0)),
        }
    ),
    lambda standing: standing["begun"] or standing["schedule"] is None,
    "without a schedule unless it has begun",
)  # fmt: skip


@dataclass
class Standing:
    """What one callback knows of the fit that runs.

    Args:
        begun: Training has begun. A tuner saves before, trains on trial, and puts that state back.
        start: ``trainer.global_step`` when this fit's schedule was at 0; above 0 in a second fit of the same Trainer.
        schedule: In optimizer steps of this fit; fixed once, when its training begins, and kept when it resumes,
            whatever the length of the run is then. None: there is none, or not yet.
        total: The length of a run for which the schedule was made. None: it does not depend on it.
    """

    begun: bool = False
    start: int = 0
    schedule: tuple[int, ...] | None = None
    total: int | None = None
    _end: int | None = None

    @property
    def resumed(self) -> bool:
        """Whether training had begun when this fit was saved; asked before it begins again."""
        return self.begun

    def step(self, trainer: Trainer) -> int:
        """Optimizer steps of this fit done."""
        return trainer.global_step - self.start

    def begin(self, trainer: Trainer) -> None:
        """Training begins, or goes on."""
        # Not in a fit that resumes: it counts on, from a start that its file names.
        if not self.begun:
            self.begun, self.start = True, trainer.global_step

    def length(self, trainer: Trainer) -> int | None:
        """Optimizer steps of this fit from start to end; None: it has no end. In ``on_train_start`` or later."""
        left = remaining_steps(trainer)
        return None if left is None else self.step(trainer) + left

    def fix(
        self,
        trainer: Trainer,
        who: str,
        resolve: Callable[[int | None], Sequence[int]],
        end: Callable[[Sequence[int]], int],
    ) -> tuple[int, ...]:
        """The schedule of this fit in steps: resolved now, or that of the fit which resumes.

        A finished schedule holds, an unfinished one goes on in the steps it had: fractions of another length would
        begin it again, or skip a part. Said in one line where it matters.

        Args:
            trainer: In ``on_train_start``, after :meth:`begin`.
            who: Name of the callback.
            resolve: Length of the fit → the schedule in steps; raises ``ValueError`` if it does not fit.
            end: The step after which nothing of a schedule is left to do.

        Raises:
            ValueError: As ``resolve``; in a smoke run (``fast_dev_run``, ``overfit_batches``) as much of the schedule
                as fits is run instead.
        """
        length = self.length(trainer)
        if self.schedule is None:
            try:
                schedule, self.total = _resolved(trainer, who, resolve, length)
            except ValueError as error:
                if not self.start:
                    raise
                raise ValueError(
                    f"{error} This Trainer had done {self.start} steps before this fit, whose schedule is of the steps "
                    "that are left. To go on with a fit that was interrupted: `trainer.save_checkpoint(path)`, then "
                    "`trainer.fit(model, ckpt_path=path)`."
                ) from None
            self.schedule = tuple(schedule)
            self._end = end(self.schedule)
            return self.schedule
        try:
            asked: tuple[int, ...] | None = tuple(resolve(length))
        except ValueError:  # it would not fit; what the run began with may
            asked = None
        if length is not None and length == self.total and asked not in (None, self.schedule):
            raise ValueError(
                f"{who}: the checkpoint's schedule, in steps, is {list(self.schedule)}, and its arguments make "
                f"{list(asked or ())} of a run of {length} steps: the file is damaged."
            )
        last = self._end = end(self.schedule)
        if self.step(trainer) >= last:
            if asked != self.schedule:
                rank_zero_info(f"{who}: its schedule ended at step {last} of the resumed run, and holds.")
        elif length is not None and last > length:
            rank_zero_warn(
                f"{who}: the resumed run's schedule ends at step {last}, and this run at step {length}: it stops half "
                f"way. Train to step {last} at least (`max_steps`, `max_epochs`) to finish it."
            )
        elif asked != self.schedule:
            rank_zero_info(
                f"{who}: goes on with the schedule of the resumed run in steps, which ends at step {last}; as "
                f"fractions of a run of {length} steps it would be another one."
            )
        return self.schedule

    def missing(self, trainer: Trainer) -> int:
        """Steps that the schedule still needs, when training ends; 0 in a smoke run, which was told so."""
        done = self.step(trainer)
        return 0 if self._end is None or not done or is_smoke_run(trainer) else max(self._end - done, 0)

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        schedule = None if self.schedule is None else list(self.schedule)
        return {"begun": self.begun, "start": self.start, "schedule": schedule, "total": self.total}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Standing:
        """The inverse of :meth:`as_plain`."""
        schedule = plain["schedule"]
        return cls(plain["begun"], plain["start"], None if schedule is None else tuple(schedule), plain["total"])


def is_smoke_run(trainer: Trainer) -> bool:
    """Whether the run only tries whether the code runs: ``fast_dev_run``, ``overfit_batches``."""
    return bool(trainer.fast_dev_run) or trainer.overfit_batches > 0  # type: ignore[attr-defined]


def _resolved(
    trainer: Trainer, who: str, resolve: Callable[[int | None], Sequence[int]], length: int | None
) -> tuple[Sequence[int], int | None]:
    """A schedule, and the length of run that it is for."""
    if not is_smoke_run(trainer) or not length:
        return resolve(length), length
    longer = length  # until one is found that the schedule fits into: its first steps are those of the smoke run
    while True:
        try:
            schedule = resolve(longer)
        except ValueError:
            if longer > _LONGEST_SMOKE:  # wrong in a run of any length
                raise
            longer = math.ceil(longer * 1.25)
            continue
        if longer > length:
            rank_zero_info(
                f"{who}: a smoke run of {length} step(s) is too short for its schedule; it does as much as fits of one "
                f"for {longer} steps."
            )
        return schedule, longer


_LONGEST_SMOKE = 10_000_000
