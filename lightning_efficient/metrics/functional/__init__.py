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
    visible_keys,
)
from lightning_efficient.metrics.functional.embedding_spread import (
    alignment,
    cosine_by_length,
    mean_cosine,
    uniformity,
)
from lightning_efficient.metrics.functional.filter_rate import attention_filter_rate, filter_rate
from lightning_efficient.metrics.functional.lengths import bin_labels, length_bins
from lightning_efficient.metrics.functional.pq_index import pq_bound, pq_index
from lightning_efficient.metrics.functional.rankme import rank_of_spectrum, rankme
from lightning_efficient.metrics.functional.sparsity import sparsity
from lightning_efficient.metrics.functional.spectral import spectral_norms

__all__ = [
    "AttentionRows",
    "alignment",
    "attention_entropy",
    "attention_filter_rate",
    "attention_rows",
    "bin_labels",
    "cosine_by_length",
    "entropy_lower_bound",
    "filter_rate",
    "length_bins",
    "mean_cosine",
    "normalized_entropy",
    "pq_bound",
    "pq_index",
    "query_indices",
    "rank_of_spectrum",
    "rankme",
    "row_logit_norm",
    "rows_from_logits",
    "visible_keys",
    "sparsity",
    "spectral_norms",
    "uniformity",
]
