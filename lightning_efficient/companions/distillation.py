"""Losses that pull a student towards its teacher; the teacher's side gets no gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def distillation_kl(student: Tensor, teacher: Tensor, temperature: float = 2.0, mask: Tensor | None = None) -> Tensor:
    """``T² KL(softmax(z_t / T) || softmax(z_s / T))``, mean over rows (Hinton et al., arXiv 1503.02531).

    ``T²`` keeps its gradients as large as those of a cross-entropy; for ``T → ∞`` it is half the mean squared
    difference of the centred logits.

    Args:
        student: Logits, ``(..., classes)``.
        teacher: Likewise.
        temperature: ``T``.
        mask: ``(...)``, true or nonzero where a row counts. None: all rows do.

    Returns:
        Scalar, not negative; 0 if no row counts.

    Raises:
        ValueError: The shapes differ.
    """
    student, teacher = _pair(student, teacher)
    ours, theirs = (z.div(temperature).log_softmax(-1) for z in (student, teacher))
    likely = theirs.exp()
    # Where the teacher excludes a class (a logit of -inf), so may the student.
    terms = torch.where(likely > 0, likely * (theirs - ours), 0.0)
    return temperature**2 * _mean(terms.sum(-1), mask)


def distillation_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rows and classes of the squared difference of logits.

    Args:
        student: Logits, ``(..., classes)``.
        teacher: Likewise.
        mask: See :func:`distillation_kl`.

    Raises:
        ValueError: The shapes differ.
    """
    student, teacher = _pair(student, teacher)
    return _mean((student - teacher).square().mean(-1), mask)


def distillation_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rows of ``1 - cos(h_s, h_t)``, as DistilBERT uses it (arXiv 1910.01108).

    Args:
        student: Hidden states, ``(..., width)``.
        teacher: Likewise.
        mask: See :func:`distillation_kl`.

    Raises:
        ValueError: The shapes differ.
    """
    student, teacher = _pair(student, teacher)
    return _mean(1 - torch.cosine_similarity(student, teacher, -1), mask)


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance of where two networks are active (Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928).

    The map of a sample is the mean square over its channels at each position, scaled to length 1. Widths may differ.

    Args:
        student: Hidden states, ``(samples, positions, width)``.
        teacher: ``(samples, positions, any width)``.
        mask: ``(samples, positions)``, true or nonzero where a position counts. None: all do.

    Returns:
        Scalar in [0, 2], mean over samples.

    Raises:
        ValueError: Samples or positions differ, or there is one position only.
    """
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2] or student.shape[1] < 2:
        raise ValueError(
            f"attention maps are compared over positions: expected (samples, positions, width) of the same samples and "
            f"positions, more than one; got {tuple(student.shape)} of the student, {tuple(teacher.shape)} of the "
            "teacher."
        )
    maps = [_float(h).square().mean(-1) for h in (student, teacher.detach())]
    if mask is not None:
        maps = [m * (mask != 0) for m in maps]
    ours, theirs = (torch.nn.functional.normalize(m, dim=-1) for m in maps)
    return (ours - theirs).square().sum(-1).mean()


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's output has shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; expected "
            "the same. Logits need the same classes in the same order; hidden states of other widths can be compared "
            "by where they are large, kind='attention'."
        )
    return _float(student), _float(teacher.detach())


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return rows.mean()
    counted = mask != 0
    return torch.where(counted, rows, 0.0).sum() / counted.sum().clamp(min=1)
