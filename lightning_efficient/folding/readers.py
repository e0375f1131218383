"""The torch calls that contract a channel axis with a weight, and that an affine can be folded into.

One function per call: it reads the call's arguments and says which axis of which tensor meets which rows of which
weight. What is not listed here (``einsum``, ``matmul`` with a view of a weight, transposed convolutions, recurrent
layers, quantised kernels) is not known to fold, and blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.folding.tags import Function

How = Literal["linear", "conv", "conv1d_hf", "mha_in_proj"]


@dataclass(frozen=True)
class Block:
    """Rows of a weight that read one tensor.

    Args:
        source: The tensor.
        axis: Its axis that is contracted.
        rows: First and last (exclusive) output row of the weight.
        bias_start: Where these rows' entries begin in the bias.
    """

    source: Tensor
    axis: int
    rows: tuple[int, int]
    bias_start: int = 0


@dataclass(frozen=True)
class Contraction:
    """One weight's part in one call.

    Args:
        how: The kind of call.
        weight: ``(out, in)``, or ``(out, in / groups, ...)``; ``(in, out)`` if ``transposed``.
        bias: Added to the product, or None.
        blocks: Which rows read what.
        groups: Of a convolution.
        padded: The call surrounds its input with zeros.
        out_axis: The result's axis that runs over the weight's rows; None where the result is something else.
        bias_name: Attribute of the weight's module where the bias belongs.
        bias_size: Its number of entries.
    """

    how: How
    weight: Tensor
    bias: Tensor | None
    blocks: tuple[Block, ...]
    groups: int = 1
    padded: bool = False
    out_axis: int | None = None
    bias_name: str = "bias"
    bias_size: int = 0

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored ``(in, out)``."""
        return self.how == "conv1d_hf"


def contractions(function: Function, args: Any, kwargs: Mapping[str, Any]) -> list[Contraction]:
    """What a torch call contracts with which weights; empty if it is not one that can be folded into.

    Args:
        function: The function torch was asked for.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    read = _READ.get(function)
    return read(*args, **kwargs) if read is not None else []


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Contraction]:
    if weight.dim() != 2:
        return []
    rows = len(weight)
    block = Block(input, -1, (0, rows))
    return [Contraction("linear", weight, bias, (block,), out_axis=-1, bias_size=rows)]


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> list[Contraction]:
    axis = 1 if input.dim() == weight.dim() else 0
    if isinstance(padding, str):
        padded = padding != "valid" and any(size > 1 for size in weight.shape[2:])
    else:
        padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    rows = len(weight)
    block = Block(input, axis, (0, rows))
    return [Contraction("conv", weight, bias, (block,), groups, padded, out_axis=axis, bias_size=rows)]


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> list[Contraction]:
    """Hugging Face's ``Conv1D``: ``addmm(bias, x.view(-1, in), weight)``, weight ``(in, out)``."""
    if (beta, alpha) != (1, 1) or input.dim() != 1:
        return []
    rows = mat2.shape[1]
    block = Block(mat1, -1, (0, rows))
    return [Contraction("conv1d_hf", mat2, input, (block,), out_axis=-1, bias_size=rows)]


_ATTENTION = inspect.signature(F.multi_head_attention_forward)


def _attention(*args: Any, **kwargs: Any) -> list[Contraction]:
    """``nn.MultiheadAttention``: one packed weight for queries, keys and values, or three; one packed bias."""
    bound = _ATTENTION.bind(*args, **kwargs)
    bound.apply_defaults()
    call = SimpleNamespace(**bound.arguments)
    width: int = call.embed_dim_to_check
    sources = (call.query, call.key, call.value)
    if call.use_separate_proj_weight:
        groups: list[tuple[Tensor, tuple[Block, ...]]] = [
            (weight, (Block(source, -1, (0, width), index * width),))
            for index, (weight, source) in enumerate(
                zip((call.q_proj_weight, call.k_proj_weight, call.v_proj_weight), sources, strict=True)
            )
        ]
    else:
        starts = (0, width, 2 * width)
        blocks = (Block(s, -1, (i, i + width), i) for s, i in zip(sources, starts, strict=True))
        groups = [(call.in_proj_weight, tuple(blocks))]
    return [
        Contraction(
            "mha_in_proj", weight, call.in_proj_bias, blocks, bias_name="in_proj_bias", bias_size=3 * width
        )
        for weight, blocks in groups
    ]  # fmt: skip


_READ: dict[Function, Any] = {
    F.linear: _linear,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    F.multi_head_attention_forward: _attention,
}
