"""Weight matrices of a model, whichever layer holds them: what methods that work on weights choose from."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.common.shards import is_cut

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def weight_layers(embeddings: bool) -> tuple[type[nn.Module], ...]:
    """The types of layer that hold weight matrices.

    Args:
        embeddings: ``nn.Embedding`` among them.
    """
    types: list[type[nn.Module]] = list(_PLAIN)
    # A model can only hold Hugging Face's transposed linear layer if the library has been imported.
    if (library := sys.modules.get("transformers.pytorch_utils")) is not None:
        types.append(library.Conv1D)
    if embeddings:
        types.append(nn.Embedding)
    return tuple(types)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer of one of those types stores its weight as (inputs, outputs), as Hugging Face's ``Conv1D``."""
    return not isinstance(layer, (*_PLAIN, nn.Embedding))


def weight_attributes(layer: nn.Module) -> Iterator[str]:
    """Names of a layer's own weight matrices: ``nn.MultiheadAttention`` has one or three, its ``out_proj`` another."""
    if isinstance(layer, nn.MultiheadAttention):
        fused = getattr(layer, "in_proj_weight", None) is not None
        yield from ("in_proj_weight",) if fused else (f"{part}_proj_weight" for part in "qkv")
    else:
        yield "weight"


def sparse_gradients(module: nn.Module) -> str | None:
    """Why the weight of a module cannot have a mask, if that is because of its gradients."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        return "its gradients are sparse (`sparse=True`), and the entries of a mask are not"
    return None


def trained_by(*optimizers: Optimizer) -> set[int]:
    """``id`` of every parameter that an optimizer moves: what trains, whatever ``requires_grad`` says."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def check_values(name: str, param: nn.Parameter) -> None:
    """Refuse a parameter of a lazy module that has not run, or of one on the meta device.

    Raises:
        ValueError: It has no values yet.
    """
    if isinstance(param, nn.parameter.UninitializedParameter) or param.is_meta:
        raise ValueError(f"{name!r} has no values yet (lazy or meta). Run one batch through the model, or exclude it.")


def check_weight(name: str, param: nn.Parameter, method: str) -> str | None:
    """A reason to leave a weight alone, or an error if touching it would be wrong.

    Args:
        name: Name of the parameter.
        param: The parameter.
        method: Who wants to work on it.

    Raises:
        ValueError: It has no values yet, or is not real, dense and floating-point.
    """
    check_values(name, param)
    known = type(param.data) in (Tensor, nn.Parameter) or is_cut(param)
    dense = known and param.layout == torch.strided and not param.is_quantized
    if param.is_complex() or not param.is_floating_point() or not dense:
        kind = "" if known else f", {type(param.data).__name__}"
        raise ValueError(
            f"{name!r} is {param.dtype}, {param.layout}{kind}; {method} works on real, dense, floating-point weights. "
            f"Exclude it: `exclude=[{name.rpartition('.')[0]!r}]`."
        )
    if not param.requires_grad:
        return "frozen (requires_grad=False)"
    if param.numel() == 0:
        return "empty"
    return None
