"""How far two results are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.common.nests import named_tensors


class ExportError(RuntimeError):
    """A model cannot be exported, or the export does not compute the same; nothing has been changed."""


@dataclass(frozen=True)
class Difference:
    """How far two outputs are apart.

    Args:
        absolute: Largest ``|before - after|`` of all elements, in the output's own unit; inf where one is not
            finite and the other is something else.
        relative: Largest ratio, over the tensors of the output, of that to the tensor's scale ``max
            |before|`` (1 if the tensor is all zero).
        output: Path of the tensor with the largest ratio.
    """

    absolute: float
    relative: float
    output: str

    def __str__(self) -> str:
        return f"max abs difference {self.absolute:.3g} ({self.relative:.3g} of the output scale)"

    def check(self, tolerance: float, what: str) -> None:
        """Raise if the relative difference is above ``tolerance``.

        Raises:
            ExportError: With both figures, and the tensor they were found in.
        """
        if not self.relative <= tolerance:
            where = f" in output {self.output!r}" if self.output else ""
            raise ExportError(
                f"{what} differs from the model{where}: {self}; `tolerance` is {tolerance:g}. Nothing was "
                "changed or kept. If rounding alone explains it (float16, bfloat16), raise `tolerance`."
            )


def difference(before: Any, after: Any) -> Difference:
    """Compare two outputs tensor by tensor, in float64.

    Args:
        before: Output of the reference: tensors, or anything nested that holds some.
        after: Output to judge, of the same structure. Values that are not tensors are not compared.

    Raises:
        ExportError: No tensor found, or the numbers, names or shapes of the tensors differ.
    """
    left, right = dict(named_tensors(before)), dict(named_tensors(after))
    if not left:
        raise ExportError(f"the model returned {type(before).__name__}, in which no tensor was found to compare.")
    shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (left, right)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the outputs differ in structure: expected {shapes[0]}, got {shapes[1]}.")
    found = [_pair(name, left[name], right[name]) for name in left]
    worst = max(found, key=lambda d: d.relative)
    return Difference(max(d.absolute for d in found), worst.relative, worst.output)


def _pair(name: str, before: Tensor, after: Tensor) -> Difference:
    wide = torch.complex128 if before.is_complex() or after.is_complex() else torch.float64
    a, b = (t.detach().to("cpu").to(wide) for t in (before, after))
    if a.numel() == 0:
        return Difference(0.0, 0.0, name)
    gap = (a - b).abs()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, gap).nan_to_num(nan=torch.inf, posinf=torch.inf)
    finite = a.abs()[a.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    absolute = float(gap.max())
    return Difference(absolute, absolute / (scale or 1.0), name)


def _gap(one: Tensor, two: Tensor) -> float:
    """Equal infinities are no difference; NaN is an infinite one, to itself, too."""
    gap = torch.where(one == two, 0.0, (one - two).abs()).nan_to_num(nan=torch.inf)
    finite = one.abs()[one.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    return float(gap.max()) / (scale or 1.0) if gap.numel() else 0.0
