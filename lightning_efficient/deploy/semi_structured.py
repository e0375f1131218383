"""2:4 pruned linear layers in PyTorch's semi-structured format: half the weights stored, and sparse tensor cores used.

The one kind of mask here that a dense kernel's successor exists for. PyTorch compresses and multiplies
(``torch.sparse.to_sparse_semi_structured``, a prototype of theirs); here is what stands around it: the pattern is
checked first, so that nothing that was not pruned is thrown away, and the outputs are compared afterwards. Whether it
is faster depends on the shapes: measure it (``lightning_efficient.deploy.measure``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from lightning_efficient.common.comparing import ExportError, difference
from lightning_efficient.common.running import Inputs, as_call, device_of, evaluating, first_line
from lightning_efficient.deploy.diverged import check_weights
from lightning_efficient.deploy.plain import plain_copy

_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# Not float32: there the layout holds one of two, and drops half of what 2:4 keeps without a word.
DTYPES = (torch.float16, torch.bfloat16)
# Rounding alone, over a few dozen layers; what a wrong compression does is of the order of 1.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class SemiStructured:
    """Which linear layers are compressed, and why others are not.

    Args:
        compressed: Names of layers.
        dense: Name of a layer → the reason.
    """

    compressed: list[str] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(self.dense.items())[:8])
        return f"{len(self.compressed)} linear layers compressed 2:4, {len(self.dense)} dense" + (
            f" ({reasons})" if reasons else ""
        )


def to_semi_structured(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    tolerance: float | None = None,
    compress: Callable[[Tensor], Tensor] = to_sparse_semi_structured,
) -> nn.Module:
    """A copy of ``model`` in evaluation mode whose 2:4 pruned linear layers are compressed; ``model`` stays as it is.

    Args:
        model: On a CUDA device of compute capability 8.0 or newer, in one of ``DTYPES``; what
            :func:`lightning_efficient.export` returned, or any plain module. Layers whose weight holds no 2:4 pattern,
            such as one that was excluded from pruning, stay dense.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of ``forward``.
        tolerance: Largest accepted difference of the outputs, relative to their scale ``max |y|``. ``None``: 0.01 for
            float16, 0.05 for bfloat16.
        compress: From a dense weight to the tensor that is put in its place.

    Returns:
        The copy, for inference only. Its state dict holds compressed tensors: save the dense model, compress again
        after loading.

    Raises:
        ValueError: ``tolerance`` is not a number ≥ 0.
        ExportError: The weights are not finite, the device or the type has no such kernels, no layer holds the pattern
            or can be compressed, or the outputs differ by more than ``tolerance``.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"`tolerance` is {tolerance!r}; expected a number >= 0, relative to the output's scale.")
    check_weights(model)
    found = find_semi_structured(model)
    _check_device(device_of(model), found)
    if not found.compressed:
        raise ExportError(
            f"no linear layer holds the 2:4 pattern in a type that can be compressed ({found}). Prune with "
            "MagnitudePruning(amount=0.5, granularity='2:4'), and convert with `model.half()` or `.bfloat16()`."
        )
    call = as_call(example_inputs)
    with evaluating(model):
        expected = call.run(model)
    copy = plain_copy(model).eval()
    dtype = _compress(copy, found, compress)
    try:
        with evaluating(copy):
            outputs = call.run(copy)
    except Exception as error:
        raise ExportError(f"the compressed copy fails where the model does not: {first_line(error)}") from error
    apart = difference(expected, outputs)
    apart.check(_TOLERANCE[dtype] if tolerance is None else tolerance, "the compressed copy")
    rank_zero_info(f"semi-structured: {found}; {apart}")
    return copy


def _compress(copy: nn.Module, found: SemiStructured, compress: Callable[[Tensor], Tensor]) -> torch.dtype:
    """Compress what was found, in place; the type of the first that could be."""
    modules, types = dict(copy.named_modules()), {}
    for name in list(found.compressed):
        layer = modules[name]
        assert isinstance(layer, nn.Linear)
        types[name] = layer.weight.dtype
        try:
            layer.weight = nn.Parameter(compress(layer.weight.detach().contiguous()), requires_grad=False)
        except RuntimeError as error:  # its shape, which depends on the type and on which library is there
            found.compressed.remove(name)
            found.dense[name] = first_line(error)
    if not found.compressed:
        raise ExportError(f"PyTorch can compress none of the layers that hold the 2:4 pattern ({found}).")
    return types[found.compressed[0]]


def find_semi_structured(model: nn.Module) -> SemiStructured:
    """Which linear layers could be compressed; looks at weights only, on any device.

    Args:
        model: Stays as it is.
    """
    found = SemiStructured()
    within = {
        id(m): type(parent).__name__
        for parent in model.modules()
        if isinstance(parent, _READERS)
        for m in parent.modules()
    }
    uses: dict[int, int] = {}
    for _, param in model.named_parameters(remove_duplicate=False):
        uses[id(param)] = uses.get(id(param), 0) + 1
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            found.dense[name] = "its weight is computed, not a parameter"
        elif weight.dtype not in DTYPES:
            found.dense[name] = f"{weight.dtype} has no such kernel"
        elif id(module) in within:
            found.dense[name] = f"inside nn.{within[id(module)]}, whose fused kernels read the weight themselves"
        elif uses[id(weight)] > 1:
            found.dense[name] = "its weight is tied"
        elif not holds_pattern(weight):
            found.dense[name] = "no 2:4 pattern"
        else:
            found.compressed.append(name)
    return found


def _check_device(device: torch.device, found: SemiStructured) -> None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is not None and capability >= (8, 0) and torch.version.hip is None:
        return
    here = str(device) if capability is None else f"{device}, compute capability {capability[0]}.{capability[1]}"
    raise ExportError(
        "semi-structured 2:4 tensors need an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, since PyTorch has "
        f"kernels for nothing else; the model is on {here}. Move it there: `model.cuda().half()`. Of this "
        f"model: {found}."
    )


def holds_pattern(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether of every ``m`` consecutive inputs of every output at most ``n`` are nonzero.

    Args:
        weight: ``(outputs, inputs)``.
        n: Entries that may be kept.
        m: Length of a run; false if it does not divide the inputs.
    """
    if weight.ndim != 2 or weight.shape[1] % m or not weight.numel():
        return False
    return int((weight.detach() != 0).view(weight.shape[0], -1, m).sum(2).max()) <= n
