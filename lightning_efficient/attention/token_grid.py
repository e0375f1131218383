"""Which attention sees a square grid of tokens and nothing else, and how large it is: read off the model."""

from __future__ import annotations

import inspect

from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from lightning_efficient.attention.owners import head_count


def token_grids(model: nn.Module, grid: int | None = None) -> dict[nn.Module, int | str]:
    """Side of the token grid of every timm attention, or why there is none.

    Args:
        model: Any module.
        grid: Side that the user gives. It has to agree with what the model says, where the model says something.

    Returns:
        Attention -> side in tokens, or a reason to leave it alone.
    """
    # Outer models come first, so the innermost VisionTransformer around an attention stays.
    owners = {
        inner: outer for outer in model.modules() if isinstance(outer, VisionTransformer) for inner in outer.modules()
    }
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    return {module: _refusal(module) or _side(owners.get(module), grid) for module in attentions}


def _refusal(attention: Attention) -> str | None:
    if getattr(attention.forward, "__func__", None) is not Attention.forward:
        return f"{type(attention).__name__} has a forward of its own, which may do more than timm's Attention"
    if any(parameter.is_meta for parameter in attention.parameters()):
        return "its weights are on the meta device and have no values yet: materialise the model first"
    return None


def _side(owner: VisionTransformer | None, grid: int | None) -> int | str:
    if owner is None:
        unknown = "its token grid is not known, as there is no timm VisionTransformer around it: pass `grid`"
        return unknown if grid is None else grid
    if owner.num_prefix_tokens:
        return (
            f"{owner.num_prefix_tokens} class, register or distillation tokens stand before the grid; build the model "
            "with `class_token=False, reg_tokens=0, global_pool='avg'`"
        )
    if not isinstance(owner.patch_drop, nn.Identity):
        return "patch dropout leaves holes in the grid; build the model with `patch_drop_rate=0`"
    size = getattr(owner.patch_embed, "grid_size", None)
    if size is None or owner.dynamic_img_size:
        vary = "its number of tokens varies with the image (`dynamic_img_size=True`, or no `img_size`): pass `grid`"
        return vary if grid is None else grid
    height, width = size
    if height != width:
        return f"its grid of {height}×{width} tokens is not square"
    if grid not in (None, height):
        return f"its grid has {height}×{width} tokens, but `grid` is {grid}; leave `grid` out, or use `include`"
    return int(height)


def why_not(module: nn.Module) -> str | None:
    """Why attention other than timm's plain one is left alone; None for what does not look like attention.

    Only ever used to word a report: a module counts as attention if it has a number of heads and projections.

    Args:
        module: Any module.
    """
    projects = any(isinstance(child, nn.Linear) for child in module.children())
    if isinstance(module, Attention) or not (head_count(module) and projects):
        return None
    try:
        takes = set(inspect.signature(module.forward).parameters)
    except ValueError:  # compiled code does not tell
        takes = set()
    holds = [*dict(module.named_parameters()), *dict(module.named_buffers()), *dict(module.named_children())]
    words = " ".join([*takes, *holds])
    if takes & {"rope", "position_embeddings"}:
        reason = "its rotary position embeddings mean nothing to a ReLU kernel"
    elif any(word in words for word in ("relative_position", "rel_pos", "attention_biases")):
        reason = "its relative position bias needs a score for every pair of tokens"
    elif takes & {"key", "context", "memory", "encoder_hidden_states"} or "latent" in holds:
        reason = "its queries and keys may come from different sequences (cross-attention)"
    else:
        reason = "it is not timm.layers.Attention, whose weights can be reused"
    return f"{type(module).__module__}.{type(module).__qualname__}: {reason}"
