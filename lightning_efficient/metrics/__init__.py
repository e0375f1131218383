"""torchmetrics classes; the pure functions behind them are in ``lightning_efficient.metrics.functional``."""

from lightning_efficient.metrics.attention_entropy import AttentionEntropy
from lightning_efficient.metrics.embedding_spread import Alignment, Uniformity
from lightning_efficient.metrics.length_collapse import CosineByLength, FilterRate
from lightning_efficient.metrics.length_plot import plot_by_length
from lightning_efficient.metrics.pq_index import PQIndex
from lightning_efficient.metrics.rankme import RankMe
from lightning_efficient.metrics.sparsity import Sparsity

__all__ = [
    "Alignment",
    "AttentionEntropy",
    "CosineByLength",
    "FilterRate",
    "PQIndex",
    "RankMe",
    "Sparsity",
    "Uniformity",
    "plot_by_length",
]
