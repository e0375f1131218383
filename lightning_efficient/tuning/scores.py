"""Scores of a model, one number per query or sample, for ``tune_temperature``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_reciprocal_rank

Score = Callable[[nn.Module], Any]
Embed = Callable[[nn.Module, Sequence[Any]], Tensor]


def retrieval_scores(
    embed: Embed,
    queries: Sequence[Any],
    documents: Sequence[Any],
    relevant: Sequence[int | Collection[int]],
    metric: Literal["ndcg", "mrr"] = "ndcg",
    k: int = 10,
) -> Score:
    """How well each query finds its documents by cosine similarity.

    Args:
        embed: ``embed(model, items)`` → ``(items, features)``. Batching and tokenizing are up to it.
        queries: What ``embed`` takes.
        documents: What ``embed`` takes.
        relevant: For each query the index, or indices, of the documents that answer it.
        metric: ``"ndcg"`` (normalized discounted cumulative gain) or ``"mrr"`` (reciprocal rank of the first hit).
        k: Documents beyond this rank count nothing.

    Returns:
        A function of the model that gives ``(queries,)`` scores in [0, 1], higher is better.

    Raises:
        ValueError: No queries, not one entry of ``relevant`` a query, or an index that no document has.
    """
    if metric not in ("ndcg", "mrr") or k < 1:
        raise ValueError(f"`metric` is {metric!r} and `k` {k!r}; expected 'ndcg' or 'mrr', and at least 1.")
    if not len(queries) or len(relevant) != len(queries):
        raise ValueError(f"got {len(queries)} `queries` and {len(relevant)} entries of `relevant`; expected as many.")
    answers = [sorted({entry} if isinstance(entry, int) else set(entry)) for entry in relevant]
    for i, answer in enumerate(answers):
        if not answer or not 0 <= answer[0] <= answer[-1] < len(documents):
            raise ValueError(
                f"`relevant`[{i}] is {relevant[i]!r}; expected indices of documents, 0 to {len(documents) - 1}."
            )

    def score(model: nn.Module) -> Tensor:
        q, d = _embedded(embed, model, queries, "queries"), _embedded(embed, model, documents, "documents")
        return score_ranking(q @ d.T, answers, metric, k)

    return score


def score_ranking(
    similarity: Tensor, relevant: Sequence[Collection[int]], metric: Literal["ndcg", "mrr"] = "ndcg", k: int = 10
) -> Tensor:
    """The same from a matrix of similarities.

    Args:
        similarity: ``(queries, documents)``.
        relevant: For each query the indices of its documents.
        metric: ``"ndcg"`` or ``"mrr"``.
        k: Documents beyond this rank count nothing.

    Returns:
        ``(queries,)`` in [0, 1].
    """
    of = {"ndcg": retrieval_normalized_dcg, "mrr": retrieval_reciprocal_rank}[metric]
    scores = []
    for row, answer in zip(similarity, relevant, strict=True):
        target = torch.zeros(len(row), dtype=torch.long, device=row.device)
        target[list(answer)] = 1
        scores.append(of(row, target, top_k=min(k, len(row))))
    return torch.stack(scores)


def classification_scores(
    batches: Iterable[tuple[Any, Tensor]],
    metric: Literal["accuracy", "log_likelihood"] = "accuracy",
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Score:
    """How well each sample is classified.

    Args:
        batches: ``(inputs, labels)``, labels int64 ``(batch,)``; a DataLoader, or anything that can be iterated again
            and gives the same each time.
        metric: ``"accuracy"`` (1 where the largest logit is right) or ``"log_likelihood"`` of the label, which shows
            smaller differences.
        forward: ``forward(model, inputs)`` → logits ``(batch, classes)``. ``None``: ``model(inputs)``.

    Returns:
        A function of the model that gives ``(samples,)`` scores, higher is better.

    Raises:
        ValueError: ``metric`` is neither; ``batches`` is an iterator, which is over after one pass.
    """
    if metric not in ("accuracy", "log_likelihood"):
        raise ValueError(f"`metric` is {metric!r}; expected 'accuracy' or 'log_likelihood'.")
    if iter(batches) is batches:
        raise ValueError("`batches` is an iterator, which is over after one pass; give a list or a DataLoader.")

    def score(model: nn.Module) -> Tensor:
        scores = []
        for inputs, labels in batches:
            logits = model(inputs) if forward is None else forward(model, inputs)
            if logits.dim() != 2 or labels.shape != logits.shape[:1]:
                raise ValueError(
                    f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit; expected "
                    "(batch, classes) and (batch,). `forward` can pick them."
                )
            labels = labels.to(logits.device)
            if metric == "accuracy":
                scores.append((logits.argmax(1) == labels).double())
            else:
                scores.append(-F.cross_entropy(logits.double(), labels, reduction="none"))
        if not scores:
            raise ValueError("`batches` gave nothing.")
        return torch.cat(scores)

    return score


def _embedded(embed: Embed, model: nn.Module, items: Sequence[Any], name: str) -> Tensor:
    found = embed(model, items)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(items):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"`embed` gave {shape} for {len(items)} {name}; expected a tensor (items, features).")
    return F.normalize(found.double(), dim=1)
