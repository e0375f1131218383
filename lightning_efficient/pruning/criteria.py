"""What a weight is worth: scores of single entries, the lowest are pruned first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_efficient.weightspace.layout import Layout

CRITERIA = ("magnitude", "taylor", "wanda", "random")


def magnitude(weight: Tensor) -> Tensor:
    """``|w|``.

    Args:
        weight: Any shape.
    """
    return weight.detach().abs()


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """``|w · ∂L/∂w|``: how much the loss changes, to first order, if the weight is set to zero.

    Args:
        weight: Any shape, the network's weight ``Ŵ``.
        grad: The loss's gradient with respect to it, same shape.

    Source: Molchanov et al., ICLR 2017, arXiv 1611.06440, equation 6, for single weights.
    """
    return (weight.detach() * grad.detach()).abs()


def wanda(weight: Tensor, input_norm: Tensor, groups: int = 1, layout: Layout | None = None) -> Tensor:
    """``|w_oi| · ‖x_i‖``: a weight is worth as much as what it passes on.

    Args:
        weight: ``(outputs, inputs / groups, ...)``.
        input_norm: L2 norm of each input feature or channel over all samples and positions, ``(inputs,)``.
        groups: Of a grouped convolution.
        layout: How a weight is cut of which ``weight`` is what is here. None: it is whole.

    Source: Sun et al., ICLR 2024, arXiv 2306.11695; there compared within each output (scope ``"neuron"``).
    """
    layout = layout or Layout.find("weight", weight)
    outputs, inputs = layout.shape[:2]
    norm = input_norm.to(weight.dtype).view(groups, 1, inputs).expand(groups, outputs // groups, inputs)
    return weight.detach().abs() * layout.part(norm.reshape(outputs, inputs, *[1] * (weight.ndim - 2)))


def random(weight: Tensor, seed: int) -> Tensor:
    """Uniform numbers from an own generator, the control: the same ones for the same seed and size.

    Args:
        weight: Its shape and device are used.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def squared_input_norm(module: nn.Module, inputs: Tensor) -> Tensor:
    """``Σ x²`` of each input feature of a linear layer or channel of a convolution, which adds up over batches.

    Args:
        module: The layer.
        inputs: ``(..., features)`` for a linear layer, ``(batch, channels, ...)`` or without batch for a convolution.

    Returns:
        ``(features,)`` in float32 or wider.
    """
    x = inputs.detach()
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    kernel = getattr(module, "kernel_size", None)
    dim = x.ndim - 1 if kernel is None else x.ndim - 1 - len(kernel)
    return x.square().sum([d for d in range(x.ndim) if d != dim])
