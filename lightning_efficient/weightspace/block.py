"""Matrices inside a parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A matrix inside a parameter: ``length`` slices along ``dim`` from ``start``, the other axes flattened.

    A fused query-key-value projection holds three of them; a convolution kernel ``(out, in/groups, k, ...)`` is the
    matrix ``(out, in/groups · k · ...)``. With ``stack`` it is the ``length`` matrices of a parameter
    ``(length, m, n)`` that is nothing but a stack of them (experts): what holds for a matrix holds for each.
    """

    start: int
    length: int
    dim: int = 0
    stack: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The block as a view of ``tensor``, in the tensor's own number of dimensions (safe to write to)."""
        if self.start == 0 and self.length == tensor.shape[self.dim]:
            return tensor
        return tensor.narrow(self.dim, self.start, self.length)


def as_matrices(block: Block, tensor: Tensor) -> Tensor:
    """The matrices of a block, ``(matrices, m, n)``, for reading: one, but of a stack."""
    part = block.of(tensor)
    return part if block.stack else as_matrix(part).unsqueeze(0)


def as_matrix(block: Tensor) -> Tensor:
    """``block`` as a matrix, for reading only: a channels-last kernel is copied here."""
    # Not `reshape(rows, -1)`: a part may have no rows.
    return block.flatten(1) if block.ndim > 1 else block.unsqueeze(1)
