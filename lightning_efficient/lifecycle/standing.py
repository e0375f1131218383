"""What a run resumes from."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_efficient.lifecycle.recipe import RecipeError


def check_same_schedule(method: str, saved: Sequence[int] | None, now: Sequence[int], parts: str) -> None:
    """Refuse to go on with a schedule that another length of the run would move.

    Args:
        method: Name of the callback.
        saved: The schedule of the run that is resumed, in steps. None or empty: there is none.
        now: The schedule of this run.
        parts: What the numbers are.

    Raises:
        RecipeError: They differ.
    """
    if saved and tuple(saved) != tuple(now):
        raise RecipeError(
            f"{method}: the schedule of the resumed run was {tuple(saved)} ({parts}), now it is {tuple(now)}: the "
            "length of the run was changed, and the schedule is given as fractions of it. Resume with the same length, "
            "or give steps, as int."
        )
