"""The methods as pure functions: ``import lightning_efficient.functional as F``."""

from lightning_efficient.attention.linear import apply_linear_attention
from lightning_efficient.attention.temperature import apply_temp_scale, remove_temp_scale
from lightning_efficient.metrics.functional import (
    alignment,
    attention_entropy,
    attention_filter_rate,
    cosine_by_length,
    entropy_lower_bound,
    filter_rate,
    mean_cosine,
    pq_bound,
    pq_index,
    rankme,
    row_logit_norm,
    sparsity,
    spectral_norms,
    uniformity,
)
from lightning_efficient.norms.recalibrate import recalibrate
from lightning_efficient.norms.swap import apply_norm_swap
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.slim import apply_slim
from lightning_efficient.surgery.cuts import cut_states
from lightning_efficient.tuning import classification_scores, retrieval_scores, tune_temperature
from lightning_efficient.weightspace.sigma_reparam import apply_sigma_reparam

__all__ = [
    "alignment",
    "apply_linear_attention",
    "apply_norm_swap",
    "apply_sigma_reparam",
    "apply_slim",
    "apply_temp_scale",
    "attention_entropy",
    "attention_filter_rate",
    "classification_scores",
    "cosine_by_length",
    "cut_states",
    "entropy_lower_bound",
    "filter_rate",
    "find_groups",
    "mean_cosine",
    "pq_bound",
    "pq_index",
    "rankme",
    "recalibrate",
    "remove_temp_scale",
    "retrieval_scores",
    "row_logit_norm",
    "sparsity",
    "spectral_norms",
    "tune_temperature",
    "uniformity",
]
