"""How much of an attention call is measured, and what is said of one that cannot be."""

from __future__ import annotations

from typing import NamedTuple


class UnknownAttentionError(ValueError):
    """A call that looks like attention and cannot be read without guessing; the message says why."""


class Limits(NamedTuple):
    """What is measured of each call.

    Args:
        max_samples: Rows of the batch, from the first. ``None``: all.
        max_queries: Evenly spaced queries. ``None``: all.
    """

    max_samples: int | None = None
    max_queries: int | None = None

    def samples(self, batch: int) -> int:
        """How many samples of a batch of this size are measured."""
        return batch if self.max_samples is None else min(batch, self.max_samples)
