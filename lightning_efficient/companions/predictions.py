"""What a model predicts, read off the cross-entropies that its own step computes, and scores of that.

Whatever the model and its output are, the call of ``cross_entropy`` has the logits, the targets shifted as they should
be, and the index that marks padding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_efficient.metrics.functional import rankme

_CALLS = {F.cross_entropy: inspect.signature(F.cross_entropy), F.nll_loss: inspect.signature(F.nll_loss)}
_RANK_ROWS = 1024


def perplexity(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """``exp(total negative log-likelihood / tokens)``: of a corpus, as torchmetrics has it.

    Args:
        logits: ``(..., classes)``.
        targets: ``(...)``, class indices.
        ignore_index: Targets that do not count.

    Returns:
        Scalar, at least 1; NaN if nothing counts.
    """
    nll, counted = _nll(logits, targets, ignore_index)
    return (nll.sum() / counted.sum()).exp()


def sequence_perplexity(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean over sequences of ``exp(mean negative log-likelihood of its tokens)``: ME-PPL (arXiv 2402.09656).

    A single broken sequence moves it far more than :func:`perplexity`.

    Args:
        logits: ``(sequences, ..., classes)``.
        targets: ``(sequences, ...)``, class indices.
        ignore_index: Targets that do not count.

    Returns:
        Scalar, at least 1; NaN if nothing counts.
    """
    nll, counted = _nll(logits, targets, ignore_index)
    nll, tokens = nll.flatten(1).sum(1) if nll.ndim > 1 else nll, counted.view(len(nll), -1).sum(1)
    return (nll[tokens > 0] / tokens[tokens > 0]).exp().mean()


def _nll(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Of every target, zero where it does not count; and whether it does."""
    classes = logits.shape[-1]
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)}; expected the classes "
            "on the last axis of the logits, and the other axes of both the same."
        )
    nll = F.cross_entropy(
        logits.reshape(-1, classes).to(torch.promote_types(logits.dtype, torch.float32)),
        targets.reshape(-1), ignore_index=ignore_index, reduction="none",
    )  # fmt: skip
    return nll.view(targets.shape), targets != ignore_index


@dataclass
class Predictions:
    """What was predicted, row by row (a sample, or a token of one), in what is kept of it.

    Args:
        nll: Negative log-likelihoods of the rows that count, one tensor a call.
        sequences: Which sequence each of them belongs to; None: not known.
        correct: How many rows have their target as the largest logit.
        total: Sum of the predicted distributions, ``(classes,)``.
        rows: Logits, at most 1024 rows of them.
    """

    nll: list[Tensor] = field(default_factory=list)
    sequences: list[Tensor] | None = field(default_factory=list)
    correct: int = 0
    total: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    count: int = 0

    def add(self, logits: Tensor, targets: Tensor, counted: Tensor, samples: int | None) -> None:
        """Take in one call.

        Args:
            logits: ``(rows, classes)``, or log-probabilities.
            targets: ``(rows,)`` class indices, or ``(rows, classes)`` probabilities.
            counted: ``(rows,)`` bool.
            samples: In the batch, each with as many rows; None: not known.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logs = logits.log_softmax(-1)
        soft = targets.ndim == 2
        safe = targets if soft else targets.long().masked_fill(~counted, 0)
        nll = -(targets * logs).sum(-1) if soft else -logs.gather(1, safe[:, None])[:, 0]
        self.nll.append(nll[counted].cpu())
        if samples is None or len(nll) % samples:
            self.sequences = None
        elif self.sequences is not None:
            where = torch.arange(len(nll)) // (len(nll) // samples) + self.count
            self.sequences.append(where[counted.cpu()])
            self.count += samples
        hard = targets.argmax(-1) if soft else targets
        self.correct += int((logits.argmax(-1) == hard)[counted].sum())
        mean = logs.exp()[counted].sum(0).cpu()
        self.total = mean if self.total is None else self.total + mean
        room = _RANK_ROWS - sum(map(len, self.rows))
        self.rows.append(logits[counted][: max(room, 0)].cpu())


class CrossEntropies(TorchFunctionMode):
    """Context manager: the cross-entropies of class predictions that are computed inside.

    Of several in one step the one over the most predictions counts (auxiliary losses have fewer), the last of equals.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: tuple[Tensor, Tensor, Tensor, int] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The call itself, and a look at its arguments."""
        if func in _CALLS:
            self._look(_CALLS[func].bind(*args, **(kwargs or {})).arguments)
        return func(*args, **(kwargs or {}))

    def _look(self, given: Mapping[str, Any]) -> None:
        logits, targets = given["input"].detach(), given["target"].detach()
        axis = 1 if logits.ndim > 1 else 0
        soft = targets.ndim == logits.ndim
        rows = logits.movedim(axis, -1).reshape(-1, logits.shape[axis])
        targets = targets.movedim(axis, -1).reshape(rows.shape) if soft else targets.reshape(-1)
        counted = (
            torch.ones_like(targets[:, 0], dtype=torch.bool) if soft else targets != given.get("ignore_index", -100)
        )
        if self._found is None or len(rows) >= len(self._found[0]):
            self._found = rows, targets, counted, logits.shape[0] if logits.ndim > 2 else 0

    def give(self, to: Predictions, samples: int | None) -> bool:
        """Hand the step's predictions over.

        Args:
            to: Takes them in.
            samples: In the batch, where it is known.

        Returns:
            Whether there were any.
        """
        if self._found is None:
            return False
        rows, targets, counted, leading = self._found
        to.add(rows, targets, counted, leading or samples)
        return True


def _perplexity(seen: Predictions) -> float:
    return math.exp(min(float(torch.cat(seen.nll).double().mean()), 700.0))


def _sequence_perplexity(seen: Predictions) -> float:
    if seen.sequences is None:
        raise ValueError(
            "score='sequence_perplexity' needs to know which tokens belong to one sequence, and the cross-entropy of "
            "this model is computed over rows that the batch's samples do not divide evenly. Use score='perplexity'."
        )
    nll, where = torch.cat(seen.nll).double(), torch.cat(seen.sequences)
    sums = torch.zeros(seen.count, dtype=nll.dtype).index_add_(0, where, nll)
    tokens = torch.bincount(where, minlength=seen.count)
    return float((sums[tokens > 0] / tokens[tokens > 0]).clamp(max=700.0).exp().mean())


def _accuracy(seen: Predictions) -> float:
    return seen.correct / sum(map(len, seen.nll))


def _entropy(seen: Predictions) -> float:
    assert seen.total is not None
    mean = seen.total.double() / seen.total.double().sum()
    return float(-torch.special.xlogy(mean, mean).sum())


def _rank(seen: Predictions) -> float:
    return float(rankme(torch.cat(seen.rows)))


# Score → its function, and whether the model is better where it is smaller.
SCORES: dict[str, tuple[Callable[[Predictions], float], bool]] = {
    "perplexity": (_perplexity, True),
    "sequence_perplexity": (_sequence_perplexity, True),
    "accuracy": (_accuracy, False),
    "entropy": (_entropy, False),
    "rank": (_rank, False),
}


def score_of(name: str, seen: Predictions) -> float:
    """A score of predictions; NaN where one of them is not finite, or nothing was predicted.

    Args:
        name: One of :data:`SCORES`.
        seen: What was predicted.
    """
    nll = torch.cat(seen.nll)
    read = torch.cat(seen.rows) if name == "rank" else nll  # logits may be -inf on purpose
    finite = len(nll) > 0 and bool(nll.isfinite().all()) and bool(read.isfinite().all())
    return SCORES[name][0](seen) if finite else math.nan
