"""torchmetrics classes; the pure functions behind them are in ``lightning_efficient.metrics.functional``."""

from lightning_efficient.metrics.attention_entropy import AttentionEntropy
from lightning_efficient.metrics.pq_index import PQIndex
from lightning_efficient.metrics.rankme import RankMe
from lightning_efficient.metrics.sparsity import Sparsity

__all__ = ["AttentionEntropy", "PQIndex", "RankMe", "Sparsity"]
