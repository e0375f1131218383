"""Padding masks, from the keyword by which a model passes them, to the swapped norms inside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.norms.blend import BlendNorm, blend_norms


def capture_padding(model: nn.Module) -> list[RemovableHandle]:
    """Hooks that hand padding masks, given to any module by keyword, to the swapped norms inside it.

    Args:
        model: The model.

    Returns:
        Handles that remove the hooks.
    """

    def before(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if (mask := valid_rows(module, kwargs)) is not None:
            for norm in blend_norms(module).values():
                norm.mask = mask

    def after(module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        if valid_rows(module, kwargs) is not None:
            for norm in blend_norms(module).values():
                norm.mask = None

    handles = []
    for module in model.modules():
        if not isinstance(module, BlendNorm) and blend_norms(module):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
    return handles


def valid_rows(module: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """True where a token counts, in the layout of the module's tokens; None if it is not told by keyword.

    Hugging Face masks (``attention_mask``, batch × tokens) keep what is 1. torch's (``src_key_padding_mask``,
    ``tgt_key_padding_mask``) drop what is True, and are batch × tokens also where tokens come first.

    Args:
        module: Whose forward is called.
        kwargs: Its keyword arguments.
    """
    keep = kwargs.get("attention_mask")
    if isinstance(keep, Tensor) and keep.dim() == 2 and not keep.is_floating_point():
        return keep != 0
    if isinstance(module, nn.Transformer):
        return None  # its encoder and its decoder have one each
    drop = kwargs.get("tgt_key_padding_mask" if isinstance(module, _DECODERS) else "src_key_padding_mask")
    if not isinstance(drop, Tensor) or drop.dim() != 2:
        return None
    keep = ~drop if drop.dtype == torch.bool else drop == 0  # torch also takes what is added to the logits
    attention = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None)
    tokens_first = isinstance(module, _ENCODERS + _DECODERS) and attention is not None and not attention.batch_first
    return keep.t() if tokens_first else keep


_ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
_DECODERS = (nn.TransformerDecoder, nn.TransformerDecoderLayer)
