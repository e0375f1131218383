"""What counts as a norm that can be swapped: decided by what a module computes, never by what its class is called.

Every library has LayerNorm and RMSNorm classes of its own (timm, one private RMS class for each Hugging Face model,
Gemma's with ``1 + weight``). What they have in common is their function, so a copy of a module that might be one is run
on random numbers and compared with the formulas.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_efficient.common.comparing import gap

# Hugging Face's classes compute in float32 whatever they are given, so a float64 probe agrees to about 3e-7.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Source:
    """What a normalization layer computes: ``y = (offset + weight) · normalize(x) + bias`` over one axis.

    Args:
        kind: ``"layer"``: ``(x - mean) / sqrt(variance + eps)``; ``"rms"``: ``x / sqrt(mean(x²) + eps)``.
        channels: Size of the axis that is normalized.
        axis: -1 (the last), or 1 (channels first, as in images ``(batch, channels, height, width)``).
        eps: Added under the root. None: machine epsilon of the input's dtype (``nn.RMSNorm``'s default).
        weight: Name of the scale parameter, if there is one.
        bias: Name of the shift parameter, if there is one.
        offset: 0, or 1 where the scale is stored as its difference to one.
    """

    kind: Literal["layer", "rms"]
    channels: int
    axis: Literal[-1, 1] = -1
    eps: float | None = 1e-5
    weight: str | None = None
    bias: str | None = None
    offset: float = 0.0

    def scale(self, module: nn.Module) -> Tensor | None:
        """The factor that ``module`` applies, shape (channels,); None without one."""
        return None if self.weight is None else self.offset + module.get_parameter(self.weight).detach()

    def shift(self, module: nn.Module) -> Tensor | None:
        """The summand that ``module`` applies, shape (channels,); None without one."""
        return None if self.bias is None else module.get_parameter(self.bias).detach()


def recognise(module: nn.Module) -> Source | str | None:
    """Say whether a module is a layer norm or an RMS norm over one axis.

    ``nn.LayerNorm`` and ``nn.RMSNorm`` themselves are read. Any other module without submodules that owns one or two
    vectors, or says ``normalized_shape``, is probed: a copy with random parameters, in float64, without hooks. The
    module, its parameters and the random state of torch stay as they are.

    Args:
        module: Any module.

    Returns:
        What it computes; why it cannot be swapped although it is a norm; or None for anything else.
    """
    known = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    if next(module.children(), None) is not None:
        return "its parameters are computed by a parametrization" if known else None
    shape = getattr(module, "normalized_shape", None)
    if known and shape is not None and len(shape) != 1:
        return f"it normalizes over {len(shape)} axes at once"
    channels = _channels(module, shape)
    if channels is None:
        return None
    if channels < 2:
        return "it has a single channel" if known else None
    if type(module) is nn.LayerNorm or type(module) is nn.RMSNorm:
        weight, bias = (name if module._parameters.get(name) is not None else None for name in ("weight", "bias"))
        kind: Literal["layer", "rms"] = "layer" if isinstance(module, nn.LayerNorm) else "rms"
        return Source(kind, channels, eps=module.eps, weight=weight, bias=bias)
    found = _probe(module, channels)
    if found is None:
        return "it does not compute what its base class does" if known else None
    if _arguments(module) > 1:
        return "its forward takes more than the input"
    return found


def _channels(module: nn.Module, shape: object) -> int | None:
    """Length of the module's vectors, if that is all it owns; else of ``normalized_shape``."""
    parameters = list(module.parameters(recurse=False))
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in parameters):
        return None
    sizes = {tuple(p.shape) for p in parameters if p.is_floating_point()}
    if 1 <= len(parameters) <= 2 and len(sizes) == 1:
        (size,) = sizes
        return size[0] if len(size) == 1 else None
    if not parameters and isinstance(shape, (tuple, list, torch.Size)) and len(shape) == 1:
        return int(shape[0])
    return None


def _arguments(module: nn.Module) -> int:
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return sum(kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for kind in kinds)


def _probe(module: nn.Module, channels: int) -> Source | None:
    generator = torch.Generator().manual_seed(0)
    axes: tuple[tuple[Literal[-1, 1], tuple[int, ...]], ...] = ((-1, (2, 3, channels)), (1, (2, channels, 3, 5)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            clone = _twin(module, generator)
        except Exception:  # it cannot be copied or converted: none of ours
            return None
        found = [_identify(clone, torch.randn(shape, generator=generator).double(), axis) for axis, shape in axes]
    known = [source for source in found if source is not None]
    # Channels last for sequences *and* first for images: no single axis is right.
    return known[0] if len(known) == 1 else None


def _twin(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with random parameters on the CPU, in float64, without the user's hooks."""
    memo: dict[int, object] = {id(value): OrderedDict() for name, value in vars(module).items() if "_hooks" in name}
    for parameter in module.parameters():
        values = 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        memo[id(parameter)] = nn.Parameter(values)
    return copy.deepcopy(module, memo).to("cpu", torch.float64).eval()


def _run(clone: nn.Module, x: Tensor) -> Tensor | None:
    # Not called through `__call__`, where hooks registered for all modules would fire.
    try:
        y = clone.forward(x)
    except Exception:  # whatever a foreign module makes of our input
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape else None


def _identify(clone: nn.Module, noise: Tensor, axis: Literal[-1, 1]) -> Source | None:
    # Large inputs first, so that the unknown eps does not matter; off center, so that the two kinds differ.
    x = 1e3 * (1 + noise)
    y = _run(clone, x)
    if y is None:
        return None
    channels = x.shape[axis]
    for kind, (weight, bias), offset in _candidates(clone):
        guess = Source(kind, channels, axis, 0.0, weight, bias, offset)
        if _close(y, _formula(guess, clone, x)):
            eps = _measure_eps(guess, clone, x)
            if eps is None:
                return None
            default = math.isclose(eps, torch.finfo(x.dtype).eps, rel_tol=1e-2)
            return replace(guess, eps=None if default else eps)
    return None


def _candidates(clone: nn.Module) -> Iterator[tuple[Literal["layer", "rms"], tuple[str | None, str | None], float]]:
    names = [name for name, _ in clone.named_parameters()]
    roles: list[tuple[str | None, str | None]] = [(None, None)]
    if len(names) == 1:
        roles = [(names[0], None)]
    elif names:
        roles = [(weight, bias) for weight, bias in permutations(names)]
    kinds: tuple[Literal["layer", "rms"], ...] = ("layer", "rms")
    yield from product(kinds, roles, (0.0, 1.0) if names else (0.0,))


def _formula(source: Source, clone: nn.Module, x: Tensor) -> Tensor:
    rows = x.movedim(source.axis, -1)
    if source.kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    y = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + (source.eps or 0.0))
    scale, shift = source.scale(clone), source.shift(clone)
    y = y if scale is None else y * scale
    y = y if shift is None else y + shift
    return y.movedim(-1, source.axis)


def _close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    return gap(expected, got) <= tolerance


def _measure_eps(source: Source, clone: nn.Module, x: Tensor) -> float | None:
    """The eps that explains how tiny inputs are scaled; None if none does."""
    tiny = x * 1e-9  # a variance of about 1e-12: even an eps of that size shows to five digits
    if source.bias is not None:
        clone.get_parameter(source.bias).zero_()
    y = _run(clone, tiny)
    if y is None:
        return None
    plain = _formula(source, clone, tiny).movedim(source.axis, -1)  # with eps = 0
    rows = tiny.movedim(source.axis, -1)
    power = rows.var(-1, correction=0) if source.kind == "layer" else rows.square().mean(-1)
    ratio = plain.square().sum(-1) / y.movedim(source.axis, -1).square().sum(-1)  # (power + eps) / power
    eps = max(float((power * (ratio - 1)).median()), 0.0)
    written = (v for v in vars(clone).values() if isinstance(v, float) and math.isclose(v, eps, rel_tol=1e-3))
    eps = next(written, eps)
    return eps if _close(y, _formula(replace(source, eps=eps), clone, tiny), 1e-5) else None
