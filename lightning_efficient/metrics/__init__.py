"""torchmetrics classes; the pure functions behind them are in ``lightning_efficient.metrics.functional``."""

from lightning_efficient.metrics.attention_entropy import AttentionEntropy
from lightning_efficient.metrics.embedding_spread import Alignment, Uniformity
from lightning_efficient.metrics.length_collapse import CosineByLength, FilterRate
from lightning_efficient.metrics.length_plot import plot_by_length
from lightning_efficient.metrics.lidar import LiDAR
from lightning_efficient.metrics.neural_collapse import NeuralCollapse
from lightning_efficient.metrics.posterior_collapse import PosteriorCollapse
from lightning_efficient.metrics.pq_index import PQIndex
from lightning_efficient.metrics.sparsity import Sparsity
from lightning_efficient.metrics.spectrum import AlphaReQ, EffectiveRank, ParticipationRatio, RankMe, StableRank
from lightning_efficient.metrics.spectrum_plot import plot_spectrum
from lightning_efficient.metrics.state_drift import StateDrift

__all__ = [
    "Alignment",
    "AlphaReQ",
    "AttentionEntropy",
    "CosineByLength",
    "EffectiveRank",
    "FilterRate",
    "LiDAR",
    "NeuralCollapse",
    "PQIndex",
    "ParticipationRatio",
    "PosteriorCollapse",
    "RankMe",
    "Sparsity",
    "StableRank",
    "StateDrift",
    "Uniformity",
    "plot_by_length",
    "plot_spectrum",
]
