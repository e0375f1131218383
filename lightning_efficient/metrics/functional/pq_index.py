"""PQ index: how unequal the magnitudes of a weight are, a measure of sparsity that counts no zeros."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_pq(p: float, q: float) -> None:
    """Refuse norms for which the index is not defined.

    Args:
        p: The smaller norm.
        q: The larger norm.

    Raises:
        ValueError: Not ``0 < p < q < inf``.
    """
    if not 0 < p < q < math.inf:
        raise ValueError(f"the PQ index needs 0 < p < q; got p={p}, q={q}. Published: (0.5, 1) and (1, 2).")


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """float64, or float32 where the device has no float64 (MPS)."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def pq_index(
    weight: Tensor, p: float = 0.5, q: float = 1.0, *, mask: Tensor | None = None, dim: int | None = None
) -> Tensor:
    """``I = 1 - d^(1/q - 1/p) ‖w‖_p / ‖w‖_q``: 0 if all magnitudes are equal, larger the sparser.

    Computed as ``1 - (mean |w|^p)^(1/p) / (mean |w|^q)^(1/q)``, in float64 and after division by the largest
    magnitude, so that neither small nor large weights under- or overflow.

    Args:
        weight: Any shape, real; float16 and bfloat16 too.
        p: The smaller norm, above 0; below 1 it is no norm, which is fine here.
        q: The larger norm.
        mask: Of the same shape; only entries where it is true count. ``None``: all.
        dim: Keep this dimension, one index for each of its slices (0: one for each neuron). ``None``: one for all.

    Returns:
        Float64 (float32 on MPS), scalar or of length ``weight.shape[dim]``, in ``[0, 1 - d^(1/q - 1/p)]`` with ``d``
        the number of entries counted. A slice without a nonzero entry, for which the index is undefined, gets NaN.

    Raises:
        ValueError: Not ``0 < p < q``, shapes differ, or, without ``dim``, no entry that counts is nonzero.

    Source: Diao et al., ICLR 2023, arXiv 2302.05601, definition 1.
    """
    check_pq(p, q)
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(f"`mask` has shape {tuple(mask.shape)}; expected that of `weight`, {tuple(weight.shape)}.")
    with torch.autocast(weight.device.type, enabled=False):
        magnitude = weight.detach().to(wide_dtype(weight)).abs()
        magnitude = magnitude.reshape(1, -1) if dim is None else magnitude.movedim(dim, 0).flatten(1)
        counted = torch.ones_like(magnitude, dtype=torch.bool)
        if mask is not None:
            counted = (mask != 0).reshape(1, -1) if dim is None else (mask != 0).movedim(dim, 0).flatten(1)
            magnitude = magnitude * counted
        index = _index(magnitude, counted.sum(1), p, q)
    if dim is not None:
        return index
    if not bool((magnitude != 0).any()):
        raise ValueError(
            f"the PQ index of a tensor without a nonzero entry is undefined (shape {tuple(weight.shape)}"
            f"{'' if mask is None else f', {int(counted.sum())} of them counted'}). Leave it out."
        )
    return index[0]


def _index(magnitude: Tensor, count: Tensor, p: float, q: float) -> Tensor:
    """Per row; zeros that do not count change neither sum."""
    if not magnitude.shape[1]:
        return magnitude.new_full((len(magnitude),), math.nan)
    scaled = magnitude / magnitude.amax(1, keepdim=True)  # 0 / 0 = NaN marks an empty row
    return index_of_sums(scaled.pow(p).sum(1), scaled.pow(q).sum(1), count, p, q)


def index_of_sums(sum_p: Tensor, sum_q: Tensor, count: Tensor, p: float, q: float) -> Tensor:
    """The index from ``Σ|w|^p`` and ``Σ|w|^q``, which add up over tensors.

    Args:
        sum_p: ``Σ|w|^p``, any shape.
        sum_q: ``Σ|w|^q``, same shape.
        count: Entries counted, same shape.
        p: The smaller norm.
        q: The larger norm.

    Returns:
        Same shape; NaN where nothing is nonzero.
    """
    index = 1 - (sum_p / count) ** (1 / p) / (sum_q / count) ** (1 / q)
    return index.clamp_min(0)  # equal magnitudes: rounding may leave -1e-16


def pq_bound(index: Tensor, count: Tensor | int, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> Tensor:
    """Theorem 2: to keep all but the share ``eta`` of ``Σ|w|^p``, at least this many entries have to be kept.

    ``r ≥ d (1 + η)^(-q/(q - p)) (1 - I)^(q p/(q - p))``; with ``η = 0``, ``d (1 - I)`` for (0.5, 1) and
    ``d (1 - I)²`` for (1, 2).

    Args:
        index: PQ index, any shape.
        count: ``d``, the entries it was taken over; same shape.
        p: The smaller norm.
        q: The larger norm.
        eta: ``Σ|w|^p`` over what is dropped, divided by that over what is kept; from 0.

    Returns:
        The bound ``r``, not rounded, same shape.

    Raises:
        ValueError: Not ``0 < p < q``, or ``eta`` is negative.

    Source: Diao et al., ICLR 2023, arXiv 2302.05601, theorem 2.
    """
    check_pq(p, q)
    if not eta >= 0:
        raise ValueError(f"`eta` must not be negative; got {eta}.")
    share = torch.pow(1 - index, q * p / (q - p))
    return share * count * float((1 + eta) ** (-q / (q - p)))
