"""Pure functions behind the metrics: tensors in, tensors out."""

from lightning_efficient.metrics.functional.attention_entropy import (
    AttentionRows,
    attention_entropy,
    attention_rows,
    entropy_lower_bound,
    normalized_entropy,
    query_indices,
    row_logit_norm,
    rows_from_logits,
)
from lightning_efficient.metrics.functional.pq_index import pq_bound, pq_index
from lightning_efficient.metrics.functional.rankme import rank_of_spectrum, rankme
from lightning_efficient.metrics.functional.sparsity import sparsity
from lightning_efficient.metrics.functional.spectral import spectral_norms

__all__ = [
    "AttentionRows",
    "attention_entropy",
    "attention_rows",
    "entropy_lower_bound",
    "normalized_entropy",
    "pq_bound",
    "pq_index",
    "query_indices",
    "rank_of_spectrum",
    "rankme",
    "row_logit_norm",
    "rows_from_logits",
    "sparsity",
    "spectral_norms",
]
