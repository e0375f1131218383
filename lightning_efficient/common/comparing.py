"""How far two results are apart. Two NaN are never equal: what is not a number agrees with nothing, itself included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        absolute: Largest ``|before - after|`` of all elements, in the output's own unit; inf where one is not finite
            and the other is something else, and where both are NaN.
        relative: Largest ratio, over the tensors of the output, of that to the tensor's scale ``max |before|`` (1 if
            the tensor is all zero).
        output: Path of the tensor with the largest ratio.
        undefined: Whether ``before`` holds NaN there.
    """

    absolute: float
    relative: float
    output: str
    undefined: bool = False

    def __str__(self) -> str:
        return f"max abs difference {self.absolute:.3g} ({self.relative:.3g} of the output scale)"

    def check(self, tolerance: float, what: str) -> None:
        """Raise if the relative difference is above ``tolerance``.

        Raises:
            ExportError: With both figures, and the tensor they were found in; or the model's own output is NaN.
        """
        where = f" in output {self.output!r}" if self.output else ""
        if self.undefined:
            raise ExportError(
                f"the model itself computes NaN{where} for the example inputs, so {what} cannot be compared with it. "
                "Has it diverged? Export an earlier checkpoint, or pass example inputs for which it is defined."
            )
        if not self.relative <= tolerance:
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
    found = [Difference(*_apart(left[n], right[n]), n, bool(left[n].isnan().any())) for n in left]
    worst = max(found, key=lambda d: (d.undefined, d.relative))
    return Difference(max(d.absolute for d in found), worst.relative, worst.output, worst.undefined)


def largest_gap(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], which: Callable[[str], bool] = lambda _: True
) -> float:
    """Largest :func:`gap` between tensors of one name; infinite where one is missing.

    Args:
        before: The reference.
        after: What is judged; further names in it are not looked at.
        which: Names that are compared.
    """
    pairs = [(one, after.get(name)) for name, one in before.items() if which(name)]
    return max((torch.inf if two is None else gap(one, two) for one, two in pairs), default=0.0)


def gap(before: Tensor, after: Tensor) -> float:
    """Largest ``|before - after|`` relative to ``max |before|``, in float64.

    Equal infinities are no difference; a NaN is an infinite one, and so is another shape.

    Args:
        before: The reference; its scale is that of its finite values, 1 if they are all zero.
        after: What is judged.
    """
    return _apart(before, after)[1] if before.shape == after.shape else torch.inf


def _apart(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Largest absolute difference of two tensors of one shape, and the same relative to the scale of the first."""
    if before.numel() == 0:
        return 0.0, 0.0
    wide = torch.complex128 if before.is_complex() or after.is_complex() else torch.float64
    a, b = (t.detach().to("cpu").to(wide) for t in (before, after))  # on the CPU: not every device has float64
    apart, size = (a - b).abs(), a.abs()
    if not apart.max().isfinite():  # there are infinities or NaN
        apart = torch.where(a == b, 0.0, apart).nan_to_num(nan=torch.inf, posinf=torch.inf)
        size = size[size.isfinite()]
    scale = float(size.max()) if size.numel() else 0.0
    absolute = float(apart.max())
    return absolute, absolute / (scale or 1.0)
