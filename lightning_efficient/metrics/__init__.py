"""torchmetrics classes; the pure functions behind them are in ``lightning_efficient.metrics.functional``."""

from lightning_efficient.metrics.attention_entropy import AttentionEntropy
from lightning_efficient.metrics.rankme import RankMe

__all__ = ["AttentionEntropy", "RankMe"]
