"""Lengths of samples, and what they cost: padding, compute, balance between processes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

Lengths: TypeAlias = Sequence[float] | Tensor | str | Callable[[Any], float]


def sample_lengths(lengths: Lengths, dataset: Any = None) -> Tensor:
    """The length of every sample, in any unit (tokens, frames, seconds).

    Args:
        lengths: The numbers themselves; or the name of an attribute or column of ``dataset`` that holds them; or a
            function of one sample, which is then called on each, once.
        dataset: Where to look; of a ``Subset`` or ``ConcatDataset`` the data sets inside are asked. None: not needed
            for numbers.

    Returns:
        ``(samples,)``, float64.

    Raises:
        ValueError: There is nothing of that name, or not one finite number from 0 up for each sample.
    """
    if isinstance(lengths, str) or callable(lengths):
        if dataset is None:
            raise ValueError(f"`lengths` is {lengths!r}, which says where to look in a data set: give `dataset`, too.")
        found = _asked(lengths, dataset)
    else:
        found = lengths
    try:
        numbers = torch.as_tensor(found, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`lengths` should be one number for each sample; got {type(found).__name__}.") from error
    if numbers.dim() != 1 or len(numbers) == 0:
        raise ValueError(f"`lengths` should be one number for each sample; got the shape {tuple(numbers.shape)}.")
    if dataset is not None and len(dataset) != len(numbers):
        raise ValueError(f"`lengths` has {len(numbers)} numbers, and `dataset` {len(dataset)} samples.")
    wrong = ~(numbers.isfinite() & (numbers >= 0))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"`lengths` of sample {at} is {numbers[at].item()}; expected a finite number from 0 up.")
    return numbers


def _asked(lengths: str | Callable[[Any], float], dataset: Any) -> Any:
    if not isinstance(lengths, str):
        return [lengths(dataset[i]) for i in range(len(dataset))]
    if hasattr(dataset, lengths):
        found = getattr(dataset, lengths)
        return found() if callable(found) else found
    if isinstance(dataset, Subset):
        return torch.as_tensor(_asked(lengths, dataset.dataset))[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([torch.as_tensor(_asked(lengths, part)) for part in dataset.datasets])
    if lengths in (getattr(dataset, "column_names", None) or ()):
        return list(dataset[lengths])
    raise ValueError(
        f"`lengths` is {lengths!r}, and {type(dataset).__name__} has no attribute or column of that name. Give the "
        "numbers, or a function of one sample."
    )


def sequence_cost(lengths: Tensor, d_model: float = 768) -> Tensor:
    """Compute of a Transformer layer on sequences, relative to a token without attention: l + l² / (6 d).

    From 12 l d² multiply-adds in the projections and 2 l² d in attention.

    Args:
        lengths: Any shape, tokens.
        d_model: Width of the model; the smaller, the more attention counts.

    Returns:
        The same shape, float64.
    """
    tokens = lengths.double()
    return tokens + tokens.square() / (6 * d_model)


class Padding(NamedTuple):
    """What padding takes of a batch.

    Args:
        fill: Share of tokens that are no padding; scalar.
        wasted: Share of the compute that goes into padding, by :func:`sequence_cost`; scalar.
    """

    fill: Tensor
    wasted: Tensor


def padding_of(lengths: Tensor, padded: float, d_model: float = 768) -> Padding:
    """What padding takes of one batch.

    Args:
        lengths: ``(samples,)``, tokens that count.
        padded: Length to which all are padded.
        d_model: See :func:`sequence_cost`.
    """
    tokens = lengths.double()
    whole = sequence_cost(tokens.new_tensor(padded), d_model) * len(tokens)
    return Padding(tokens.sum() / (padded * len(tokens)), 1 - sequence_cost(tokens, d_model).sum() / whole)


def balance(costs: Tensor, parts: int, method: Literal["lpt", "snake"] = "lpt") -> list[Tensor]:
    """Deal samples out so that every part costs about the same.

    Args:
        costs: ``(samples,)``, of each; at least as many as parts.
        parts: How many.
        method: ``"lpt"``: the next costliest to the part that has least (longest processing time first); parts may
            differ in number. ``"snake"``: back and forth, as equal in number as possible.

    Returns:
        Indices into ``costs``, one tensor a part, none empty.

    Raises:
        ValueError: Fewer samples than parts, or an unknown method.
    """
    if len(costs) < parts:
        raise ValueError(f"{len(costs)} samples cannot be dealt out to {parts} parts; expected at least one each.")
    order = costs.argsort(descending=True, stable=True).tolist()
    dealt: list[list[int]] = [[] for _ in range(parts)]
    if method == "snake":
        for place, sample in enumerate(order):
            turn, column = divmod(place, parts)
            dealt[column if turn % 2 == 0 else parts - 1 - column].append(sample)
    elif method == "lpt":
        loads = [(0.0, 0, part) for part in range(parts)]  # at equal cost to the one that has fewer
        values = costs.tolist()
        for sample in order:
            load, count, part = heapq.heappop(loads)
            dealt[part].append(sample)
            heapq.heappush(loads, (load + values[sample], count + 1, part))
    else:
        raise ValueError(f"`method` is {method!r}; expected 'lpt' or 'snake'.")
    return [torch.tensor(part) for part in dealt]


def token_mean(
    loss: Tensor, tokens: Tensor | float, *, accumulate: int = 1, step_tokens: Tensor | float | None = None
) -> Tensor:
    """The mean over all tokens of a step, from the sum over those of this process and micro-batch.

    DDP averages gradients over processes and a Trainer divides by the micro-batches of a step. So means over local
    tokens give a token of a small batch more weight than one of a large batch. The value returned here, put through
    these averages, has the gradient of the mean over all tokens.

    Args:
        loss: Sum of the loss over the tokens of this call; a scalar with a gradient.
        tokens: How many these are.
        accumulate: Micro-batches a step, by which the loss will be divided (``accumulate_grad_batches``).
        step_tokens: With ``accumulate``: tokens of all micro-batches of the step in this process. Needed unless it is
            1, because the first backward comes before the last batch is known.

    Returns:
        Scalar: loss × processes × ``accumulate`` / tokens of the step on all processes. Every process has to call it.

    Raises:
        ValueError: ``accumulate`` without ``step_tokens``, or no tokens at all.
    """
    if accumulate < 1 or (accumulate > 1 and step_tokens is None):
        raise ValueError(
            f"`accumulate` is {accumulate} and `step_tokens` is {step_tokens}; expected the tokens of all micro-batches"
            " of a step beside an `accumulate` above 1."
        )
    mine = tokens if step_tokens is None else step_tokens
    total = torch.as_tensor(mine).to(loss.device, torch.promote_types(loss.dtype, torch.float32), copy=True)
    processes = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        torch.distributed.all_reduce(total)
    if total.device.type == "cpu" and total <= 0:  # elsewhere the loss is NaN, which is seen without waiting
        raise ValueError(f"`tokens` of this step add up to {total.item()} on all processes; expected at least 1.")
    return loss * (processes * accumulate / total).to(loss.dtype)
