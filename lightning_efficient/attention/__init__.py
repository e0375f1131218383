"""Reading attention of a model whose code is not touched."""

from lightning_efficient.attention.limits import UnknownAttentionError
from lightning_efficient.attention.probe import AttentionCall, AttentionProbe
from lightning_efficient.attention.table import HeadTable

__all__ = ["AttentionCall", "AttentionProbe", "HeadTable", "UnknownAttentionError"]
