"""The methods as pure functions: ``import lightning_efficient.functional as F``."""

from lightning_efficient.attention.linear import apply_linear_attention
from lightning_efficient.attention.temperature import apply_temp_scale, remove_temp_scale
from lightning_efficient.companions.distillation import (
    attention_transfer,
    distillation_cosine,
    distillation_kl,
    distillation_mse,
)
from lightning_efficient.companions.ffn_skip import ffn_skip_
from lightning_efficient.companions.lengths import balance, padding_of, sequence_cost, token_mean
from lightning_efficient.companions.modulation import discrepancy, modulation, mono_modal_responses, response_scores
from lightning_efficient.companions.predictions import perplexity, sequence_perplexity
from lightning_efficient.companions.simplex import fix_head, simplex_etf
from lightning_efficient.metrics.functional import (
    alignment,
    alpha_req,
    attention_entropy,
    attention_filter_rate,
    cosine_by_length,
    effective_rank,
    entropy_lower_bound,
    filter_rate,
    gof,
    kl_per_unit,
    lidar,
    mean_cosine,
    participation_ratio,
    pq_bound,
    pq_index,
    predict_active_units,
    rankme,
    row_logit_norm,
    sparsity,
    spectral_norms,
    stable_rank,
    state_drift,
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
    "alpha_req",
    "apply_linear_attention",
    "apply_norm_swap",
    "apply_sigma_reparam",
    "apply_slim",
    "apply_temp_scale",
    "attention_entropy",
    "attention_filter_rate",
    "attention_transfer",
    "balance",
    "classification_scores",
    "cosine_by_length",
    "cut_states",
    "discrepancy",
    "distillation_cosine",
    "distillation_kl",
    "distillation_mse",
    "effective_rank",
    "entropy_lower_bound",
    "ffn_skip_",
    "filter_rate",
    "find_groups",
    "fix_head",
    "gof",
    "kl_per_unit",
    "lidar",
    "mean_cosine",
    "modulation",
    "mono_modal_responses",
    "padding_of",
    "participation_ratio",
    "perplexity",
    "pq_bound",
    "pq_index",
    "predict_active_units",
    "rankme",
    "recalibrate",
    "remove_temp_scale",
    "response_scores",
    "retrieval_scores",
    "row_logit_norm",
    "sequence_cost",
    "sequence_perplexity",
    "simplex_etf",
    "sparsity",
    "spectral_norms",
    "stable_rank",
    "state_drift",
    "token_mean",
    "tune_temperature",
    "uniformity",
]
