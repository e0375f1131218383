"""Granularity: which entries of a weight live or die together.

A weight is seen as ``(outputs, inputs, kernel)``: a linear layer has one kernel entry, a convolution the product of
its kernel size, and its inputs are those of one group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from einops import rearrange, reduce, repeat
from torch import Tensor

NAMES = ("element", "row", "channel", "head")


@dataclass(frozen=True)
class Granularity:
    """How a weight is cut.

    Args:
        kind: One of ``NAMES``, ``"n:m"`` or ``"block"``.
        first: ``n`` of ``n:m`` (entries kept), or the rows of a block.
        second: ``m`` of ``n:m``, or the columns of a block.
    """

    kind: str
    first: int = 1
    second: int = 1

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """Read ``"element"``, ``"row"``, ``"channel"``, ``"head"``, ``"2:4"`` (kept:run) or ``"4x1"`` (rows x columns).

        Raises:
            ValueError: None of these, or numbers that make no sense.
        """
        if text in NAMES:
            return cls(text)
        found = re.fullmatch(r"(\d+)([:x])(\d+)", text)
        if found is not None:
            first, second = int(found[1]), int(found[3])
            if found[2] == ":" and 0 < first < second:
                return cls("n:m", first, second)
            if found[2] == "x" and first > 0 and second > 0:
                return cls("block", first, second)
        raise ValueError(
            f"`granularity` must be one of {NAMES}, 'n:m' with 0 < n < m such as '2:4', or 'rows x columns' of a block "
            f"such as '4x1' or '16x16'; got {text!r}."
        )

    def check(self, name: str, shape: tuple[int, int, int]) -> None:
        """Refuse a weight that does not divide.

        Args:
            name: Name of the weight, for the message.
            shape: ``(outputs, inputs, kernel)``.

        Raises:
            ValueError: A dimension is no multiple of the run or of the block's sides.
        """
        outputs, inputs, kernel = shape
        sides: list[tuple[str, int, int]] = []
        if self.kind == "n:m":
            sides = [("inputs", inputs, self.second)]
        elif self.kind == "block":
            sides = [("outputs", outputs, self.first), ("inputs x kernel", inputs * kernel, self.second)]
        for what, size, side in sides:
            if size % side:
                raise ValueError(
                    f"{name!r} has {size} {what}, no multiple of {side}, so `granularity` cannot cut it. `exclude` "
                    f"{name.rpartition('.')[0]!r}, or choose another granularity."
                )

    def units(self, scores: Tensor, heads: int | None = None) -> Tensor:
        """The score of every unit: the mean over its entries, so that units of different sizes compare.

        Args:
            scores: Of entries, ``(outputs, inputs, kernel)``.
            heads: How many heads the inputs hold, for ``"head"``.

        Returns:
            ``(rows, units)``: one row for each output for ``"element"``, one for each run for ``"n:m"``.
        """
        if self.kind == "element":
            return rearrange(scores, "o i k -> o (i k)")
        if self.kind == "n:m":
            return rearrange(scores, "o (i m) k -> (o i k) m", m=self.second)
        if self.kind == "block":
            flat = rearrange(scores, "o i k -> o (i k)")
            return reduce(flat, "(o a) (i b) -> o i", "mean", a=self.first, b=self.second)
        if self.kind == "row":
            return reduce(scores, "o i k -> 1 o", "mean")
        return reduce(scores, "o (h i) k -> 1 h", "mean", h=scores.shape[1] if self.kind == "channel" else heads)

    def entries(self, units: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The inverse of :meth:`units` for masks: every entry takes the value of its unit.

        Args:
            units: ``(rows, units)`` as :meth:`units` returns.
            shape: ``(outputs, inputs, kernel)``.

        Returns:
            ``(outputs, inputs, kernel)``.
        """
        o, i, k = shape
        if self.kind == "element":
            return rearrange(units, "o (i k) -> o i k", k=k)
        if self.kind == "n:m":
            return rearrange(units, "(o i k) m -> o (i m) k", o=o, k=k)
        if self.kind == "block":
            return repeat(units, "o i -> (o a) (i b)", a=self.first, b=self.second).reshape(shape)
        if self.kind == "row":
            return repeat(units, "1 o -> o i k", i=i, k=k)
        return repeat(units, "1 h -> o (h i) k", o=o, i=i // units.shape[1], k=k)
