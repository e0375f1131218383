"""The methods as pure functions: ``import lightning_efficient.functional as F``."""

from lightning_efficient.metrics.functional import (
    attention_entropy,
    entropy_lower_bound,
    rankme,
    row_logit_norm,
    spectral_norms,
)

__all__ = ["attention_entropy", "entropy_lower_bound", "rankme", "row_logit_norm", "spectral_norms"]
