"""How much each modality contributes to an output, and how much of its gradient to let through (AGM)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor


def mono_modal_responses(outputs: Mapping[frozenset[int], Tensor], modalities: int) -> list[Tensor]:
    """What each modality adds to an output: Shapley values, the empty input's output counted as 0.

    Args:
        outputs: Of every non-empty set of modalities (the others replaced by zeros), by their numbers; of one shape.
        modalities: How many.

    Returns:
        One tensor a modality; their sum is the output of all.
    """
    everyone = range(modalities)
    responses = []
    for m in everyone:
        response = torch.zeros_like(outputs[frozenset(everyone)])
        for size in range(modalities):
            weight = 1 / (modalities * math.comb(modalities - 1, size))
            for others in combinations([i for i in everyone if i != m], size):
                without = frozenset(others)
                gained = outputs[without | {m}] - outputs[without] if without else outputs[frozenset({m})]
                response = response + weight * gained
        responses.append(response)
    return responses


def response_scores(responses: Sequence[Tensor], targets: Tensor) -> Tensor:
    """How badly each modality alone predicts the targets: mean of -log softmax(response)[target], at most -log 1e-8.

    Args:
        responses: ``(samples, classes)`` each.
        targets: ``(samples,)``, classes.

    Returns:
        ``(modalities,)``, at least float32.
    """
    picked = [
        r.detach().to(torch.promote_types(r.dtype, torch.float32)).softmax(1).gather(1, targets[:, None].long())
        for r in responses
    ]
    return torch.stack([-p.clamp_min(1e-8).log().mean() for p in picked])


def discrepancy(scores: Tensor) -> Tensor:
    """How far each modality is ahead of the others: exp of the mean difference of their scores to its own.

    Args:
        scores: ``(modalities,)``.

    Returns:
        ``(modalities,)``; above 1: ahead.
    """
    others = (scores.sum() - scores) / (len(scores) - 1)
    return (others - scores).exp()


def modulation(scores: Tensor, means: Tensor | None, alpha: float, clamp: float = 10.0) -> Tensor:
    """By how much to multiply the gradient that reaches each modality's response.

    Args:
        scores: ``(modalities,)``, of this step.
        means: Running means of the scores before it; None: there are none yet, which counts as all alike.
        alpha: Strength; 0: all are 1.
        clamp: Bound of the exponent, from above.

    Returns:
        ``(modalities,)``: below 1 where a modality is further ahead than usual.
    """
    usual = torch.ones_like(scores) if means is None else discrepancy(means)
    return (alpha * (usual - discrepancy(scores)).clamp(max=clamp)).exp()


def modulated(out: Tensor, responses: Sequence[Tensor], factors: Tensor) -> Tensor:
    """The same output, through whose responses the gradient comes multiplied.

    Args:
        out: Of all modalities; the sum of the responses.
        responses: One a modality.
        factors: ``(modalities,)``.
    """
    z = torch.stack([factor * response for factor, response in zip(factors, responses, strict=True)]).sum(0)
    return out.detach() + (z - z.detach())  # exactly 0 is added


def masked_outputs(
    run: Callable[[frozenset[int]], Tensor], out: Tensor, modalities: int
) -> dict[frozenset[int], Tensor]:
    """The output of every non-empty set of modalities.

    Args:
        run: Runs the network with only these modalities.
        out: Of all of them.
        modalities: How many.
    """
    sets = [frozenset(c) for size in range(1, modalities) for c in combinations(range(modalities), size)]
    return {some: run(some) for some in sets} | {frozenset(range(modalities)): out}
