"""The algebra of a per-channel affine next to a weight, and edits of a model that can be undone.

``y = a * x + b`` before a Linear or convolution is ``W' = W * a``, ``b' = W @ b + b0``; after one it is
``W' = a * W``, ``b' = a * b0 + b``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_efficient.common.match import modules_by_name
from lightning_efficient.folding.consumers import Consumers, Part, Producer, Reader, Weight
from lightning_efficient.folding.tags import Axis

Affine = tuple[Tensor, Tensor, Axis]


class ChannelAffine(nn.Module):
    """``a * x + b`` along one axis: one fused multiply-add, for where an affine cannot disappear.

    Its parameters have the names of a norm's, because models ask norms for them (Mamba for ``norm.weight.dtype``).

    Args:
        a: Scale, ``(C,)``.
        b: Shift, ``(C,)``.
        axis: The channel axis of the input, ``"last"`` or 1.
    """

    def __init__(self, a: Tensor, b: Tensor, axis: Axis = "last") -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        shape = (-1, *[1] * (x.dim() - 2)) if self.axis == 1 else (-1,)
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))


def fold_forwards(
    weight: Tensor, bias: Tensor | None, parts: tuple[Part, ...], a: Tensor, b: Tensor, groups: int = 1
) -> tuple[Tensor, Tensor | None]:
    """A weight and bias that do to ``x`` what these do to ``a * x + b``.

    Args:
        weight: ``(out, in / groups, ...)``.
        bias: ``(out,)`` or longer, or None.
        parts: Which rows read which channels.
        a: Scale, ``(C,)``.
        b: Shift, ``(C,)``.
        groups: Of a convolution.

    Returns:
        The new weight and bias; the bias stays None if there was none, which is right only where ``b`` is 0.
    """
    weight, bias = weight.clone(), None if bias is None else bias.clone()
    for part in parts:
        channels = torch.tensor(part.channels, device=a.device)
        scale, shift = (_spread(channels, *pair).to(weight).view(groups, 1, -1, 1) for pair in ((a, 1.0), (b, 0.0)))
        rows = weight[slice(*part.rows)]
        matrix = rows.reshape(groups, len(rows) // groups, rows.shape[1], -1)
        if bias is not None:
            bias[part.bias_start : part.bias_start + len(rows)] += (matrix * shift).sum((2, 3)).flatten()
        rows.copy_((matrix * scale).reshape(rows.shape))
    return weight, bias


def fold_backwards(
    weight: Tensor, bias: Tensor | None, channels: tuple[int, ...], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A weight and bias whose product is ``a * y + b`` where theirs is ``y``; the bias is scaled, too.

    Args:
        weight: ``(out, ...)``.
        bias: ``(out,)`` or None.
        channels: The affine's channel of every row; -1 for rows to leave alone.
        a: Scale, ``(C,)``.
        b: Shift, ``(C,)``.

    Returns:
        The new weight and bias; the bias stays None if there was none, which is right only where ``b`` is 0.
    """
    index = torch.tensor(channels, device=a.device)
    scale, shift = (_spread(index, *pair).to(weight) for pair in ((a, 1.0), (b, 0.0)))
    new = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return new, None if bias is None else bias * scale + shift


def _spread(index: Tensor, values: Tensor, other: float) -> Tensor:
    """``values[index]``, and ``other`` where the index is -1."""
    return torch.where(index >= 0, values[index.clamp(min=0)], other)


@dataclass(frozen=True)
class FoldPlan:
    """How one norm is to disappear: into its readers, or into its producer."""

    name: str
    moves: tuple[Reader, ...] | Producer

    @property
    def backwards(self) -> bool:
        """Into the producer."""
        return isinstance(self.moves, Producer)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The weights that change."""
        return (self.moves.weight,) if isinstance(self.moves, Producer) else tuple(r.weight for r in self.moves)


def plan(name: str, found: Consumers, shifts: bool) -> FoldPlan | str:
    """Forwards where every reader can take it, else backwards, else why not.

    Args:
        name: Of the norm.
        found: Who reads it.
        shifts: Whether the affine's ``b`` is not zero.
    """
    why = found.blocked
    for reader in found.readers if shifts and why is None else ():
        if reader.padded:
            why = f"{reader.weight.module!r} pads its input with zeros, which a shift would have to reach"
        elif reader.weight.bias is None:
            why = f"{reader.weight.module!r} has no bias to take the shift"
    if why is None:
        return FoldPlan(name, found.readers)
    if found.producer is not None and not (shifts and found.producer.weight.bias is None):
        return FoldPlan(name, found.producer)
    return why


@dataclass
class Edit:
    """Values of a model's parameters by name, before they are changed; None where there was no parameter."""

    model: nn.Module
    before: dict[str, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules = modules_by_name(self.model)

    def read(self, name: str) -> Tensor | None:
        """Value of a parameter, None if its place is empty."""
        owner, attribute = self._place(name)
        value = getattr(owner, attribute)
        return None if value is None else value.detach()

    def write(self, name: str, value: Tensor) -> None:
        """Change a parameter in place, or put one where there was none."""
        old = self.read(name)
        self.before.setdefault(name, None if old is None else old.clone())
        self._set(name, value)

    def undo(self) -> None:
        """Put everything back."""
        for name, value in self.before.items():
            self._set(name, value)
        self.before.clear()

    def apply(self, plan: FoldPlan, affine: Affine) -> None:
        """Fold one affine into the weights of its plan."""
        a, b, _ = affine
        for index, weight in enumerate(plan.weights):
            if bool(b.any()) and not weight.has_bias and weight.bias is not None:
                self._make_bias(weight)
            matrix, bias = self.read(weight.name), None if weight.bias is None else self.read(weight.bias)
            assert matrix is not None  # it was called with
            matrix = matrix.t() if weight.how == "conv1d_hf" else matrix
            if isinstance(plan.moves, Producer):
                new, shifted = fold_backwards(matrix, bias, plan.moves.channels, a, b)
            else:
                new, shifted = fold_forwards(matrix, bias, plan.moves[index].parts, a, b, weight.groups)
            self.write(weight.name, new.t() if weight.how == "conv1d_hf" else new)
            if weight.bias is not None and shifted is not None:
                self.write(weight.bias, shifted)

    def _make_bias(self, weight: Weight) -> None:
        like = self.read(weight.name)
        assert like is not None
        if weight.bias is not None and self.read(weight.bias) is None:
            self.write(weight.bias, like.new_zeros(weight.bias_size))
        owner = self._modules[weight.module]
        output = f"{weight.module}.out_proj.bias".lstrip(".")
        # The fast path of nn.MultiheadAttention wants both biases or none.
        if isinstance(owner, nn.MultiheadAttention) and self.read(output) is None:
            self.write(output, like.new_zeros(owner.embed_dim))

    def dtype(self, name: str) -> torch.dtype:
        """That of a parameter; where there is none, that of its module."""
        owner, attribute = self._place(name)
        value = getattr(owner, attribute)
        return (next(owner.parameters(recurse=False)) if value is None else value).dtype

    def _place(self, name: str) -> tuple[nn.Module, str]:
        module, _, attribute = name.rpartition(".")
        return self._modules[module], attribute

    def _set(self, name: str, value: Tensor | None) -> None:
        owner, attribute = self._place(name)
        old = getattr(owner, attribute)
        if value is None:
            setattr(owner, attribute, None)
        elif old is None:
            weight = next(owner.parameters(recurse=False))
            setattr(owner, attribute, nn.Parameter(value.to(weight), requires_grad=weight.requires_grad))
        else:
            with torch.no_grad():
                old.copy_(value)
