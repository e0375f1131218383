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
from lightning_efficient.metrics.functional.lidar import lidar
from lightning_efficient.metrics.functional.neural_collapse import gof
from lightning_efficient.metrics.functional.posterior_collapse import kl_per_unit, predict_active_units
from lightning_efficient.metrics.functional.pq_index import pq_bound, pq_index
from lightning_efficient.metrics.functional.sparsity import sparsity
from lightning_efficient.metrics.functional.spectral import spectral_norms
from lightning_efficient.metrics.functional.spectrum import (
    alpha_req,
    effective_rank,
    participation_ratio,
    rank_of_spectrum,
    rankme,
    singular_values,
    stable_rank,
)
from lightning_efficient.metrics.functional.state_drift import state_drift, state_variance

__all__ = [
    "AttentionRows",
    "alignment",
    "alpha_req",
    "attention_entropy",
    "attention_filter_rate",
    "attention_rows",
    "bin_labels",
    "cosine_by_length",
    "effective_rank",
    "entropy_lower_bound",
    "filter_rate",
    "gof",
    "kl_per_unit",
    "length_bins",
    "lidar",
    "mean_cosine",
    "normalized_entropy",
    "participation_ratio",
    "pq_bound",
    "pq_index",
    "predict_active_units",
    "query_indices",
    "rank_of_spectrum",
    "rankme",
    "row_logit_norm",
    "rows_from_logits",
    "singular_values",
    "sparsity",
    "spectral_norms",
    "stable_rank",
    "state_drift",
    "state_variance",
    "uniformity",
    "visible_keys",
]
