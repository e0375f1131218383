"""Reading attention of a model whose code is not touched."""

from lightning_efficient.attention.limits import UnknownAttentionError
from lightning_efficient.attention.probe import AttentionCall, AttentionProbe

__all__ = ["AttentionCall", "AttentionProbe", "UnknownAttentionError"]
