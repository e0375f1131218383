"""Reading attention of a model whose code is not touched, and scaling its logits."""

from lightning_efficient.attention.probe import AttentionCall, AttentionProbe
from lightning_efficient.attention.sdpa import UnknownAttentionError
from lightning_efficient.attention.sites import Attention, AttentionSite, find_attention
from lightning_efficient.attention.table import HeadTable

__all__ = [
    "Attention",
    "AttentionCall",
    "AttentionProbe",
    "AttentionSite",
    "HeadTable",
    "UnknownAttentionError",
    "find_attention",
]
