"""``SimplifiedLinearAttention``: linear attention for softmax attention, from outside the LightningModule."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_efficient.attention.linear import (
    METHOD,
    LinearAttentionConfig,
    apply_linear_attention,
    describe,
    find_attention,
)
from lightning_efficient.common.change import Change
from lightning_efficient.lifecycle.state import Request
from lightning_efficient.lifecycle.structural import StructuralCallback
from lightning_efficient.lifecycle.weights import Plan


class SimplifiedLinearAttention(StructuralCallback):
    """Swap softmax attention on square token grids for linear attention (SLA of SLAB, arXiv 2405.11582).

    The projections of timm's attention are reused; a positional term and a depthwise convolution are new. The function
    changes at once, so train from scratch or fine-tune. Class and register tokens, grids that are not square, masks,
    relative position biases, rotary embeddings, causal and cross-attention are refused. The files of such a run load
    with :func:`lightning_efficient.load_from_checkpoint`.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names; a glob also matches every module below a matching one. ``None``: all.
        exclude: Globs over module names, applied after ``include``.
        kernel_size: Side of the depthwise convolution on the grid of values: odd, in tokens.
        grid: Side of the square token grid. ``None``: read off the timm ``VisionTransformer`` around the attention.
        eps: Added to the normaliser.

    Raises:
        ValueError: An argument is of the wrong type or out of range.
    """

    method = METHOD

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        kernel_size: int = 5,
        grid: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(enabled, include, exclude)
        self.options = LinearAttentionConfig(kernel_size, grid, eps)

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return super().config() | vars(self.options)

    def request(self) -> Request:
        """What to do to a model: plain data and a function, so that copies of the model can carry it."""
        config = self.config()
        return Request(METHOD, self.state_key, config, partial(apply_linear_attention, config=config))

    def plan(self, model: nn.Module) -> Plan:
        """What would be swapped, without changing anything."""
        found = find_attention(model, self.options, self.include, self.exclude)
        return Plan(change=Change(METHOD, targets=describe(found), skipped=dict(found.skipped)))

    def apply(self, pl_module: LightningModule) -> Change:
        """Swap the attention that is not swapped yet."""
        return apply_linear_attention(pl_module, self.config())
