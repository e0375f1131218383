"""What an epoch's padding costs, what to do about it in words, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_efficient.companions.lengths import padding_of, sequence_cost
from lightning_efficient.companions.samplers import LengthGroupedBatchSampler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Keeps = Literal["nonzero", "zero"]


@dataclass(frozen=True)
class TokenMask:
    """Which tensor of a batch says which tokens count.

    Args:
        name: Where it is in the batch: keys and positions, joined by dots.
        keeps: What it says of tokens that count. ``"lengths"``: it holds the length of each sample.
        pad_id: It is the tokens themselves, and this one is padding; None: it is a mask.
    """

    name: str
    keeps: Keeps | Literal["lengths"] = "nonzero"
    pad_id: int | None = None

    def lengths(self, tensor: Tensor) -> tuple[Tensor, int]:
        """Tokens of each sample that count, ``(samples,)``, and the length to which they are padded.

        Args:
            tensor: The one of that name; on its device, nothing waits for it unless it holds lengths.
        """
        if self.keeps == "lengths":
            return tensor, max(int(tensor.max()), 1)
        rows = tensor.reshape(tensor.shape[0], -1)
        if self.pad_id is not None:
            return (rows != self.pad_id).sum(1), rows.shape[1]
        return (rows == 0 if self.keeps == "zero" else rows != 0).sum(1), rows.shape[1]


@dataclass(frozen=True)
class EpochPadding:
    """The padding of an epoch.

    Args:
        lengths: Of the samples of each batch, float64 on CPU.
        padded: Length to which each batch was padded.
        d_model: Width of the model; None: unknown, and attention is left out of the cost.
        flops: Floating-point operations of a token of such a model, attention left out; None: unknown.
    """

    lengths: Sequence[Tensor]
    padded: Sequence[int]
    d_model: float | None = None
    flops: float | None = None

    @property
    def width(self) -> float:
        """For the cost of a sample; infinite where attention is left out."""
        return float("inf") if self.d_model is None else self.d_model

    @property
    def pairs(self) -> list[tuple[Tensor, int]]:
        """Lengths and padded length of each batch."""
        return list(zip(self.lengths, self.padded, strict=True))

    @property
    def fills(self) -> Tensor:
        """Share of the tokens of each batch that are no padding."""
        return torch.stack([padding_of(some, length, self.width).fill for some, length in self.pairs])

    @property
    def tokens(self) -> tuple[float, float]:
        """Tokens that count, and with padding."""
        real = sum(float(some.sum()) for some in self.lengths)
        return real, float(sum(len(some) * length for some, length in self.pairs))

    @property
    def costs(self) -> tuple[float, float]:
        """Cost of the tokens that count, and with padding, in tokens without attention."""
        real = sum(float(sequence_cost(some, self.width).sum()) for some, _ in self.pairs)
        full = sum(len(some) * float(sequence_cost(torch.tensor(float(n)), self.width)) for some, n in self.pairs)
        return real, full

    def grouped(self) -> float:
        """Fill of the same samples in a ``LengthGroupedBatchSampler`` with batches of the usual size."""
        sizes = torch.tensor([len(some) for some in self.lengths])
        everyone = torch.cat(list(self.lengths))
        sampler = LengthGroupedBatchSampler(everyone, int(sizes.median()), num_replicas=1, rank=0)
        batches = [everyone[batch] for batch in sampler]
        return float(everyone.sum()) / float(sum(len(some) * some.max() for some in batches))

    def advice(self) -> str:
        """What the padding costs, and what to do about it, in words."""
        (real, full), (cost, whole) = self.tokens, self.costs
        fill, wasted = real / full, 1 - cost / whole
        work = f", {self.flops * (whole - cost):.2g} floating-point operations," if self.flops is not None else ""
        said = (
            f"{1 - fill:.0%} of the tokens of an epoch are padding (fill {fill:.2f} over {len(self.padded)} batches), "
            f"which take {wasted:.0%} of the compute{work} by the cost model"
            f"{' without attention' if self.d_model is None else f' at d_model {self.d_model:g}'}."
        )
        if fill > 0.9:
            return f"{said} There is little to gain."
        longest = float(sum(len(some) * float(some.max()) for some in self.lengths))
        if longest < 0.95 * full:
            said += (
                f" Batches are wider than their longest sample: padding each to its own would make the fill "
                f"{real / longest:.2f} (in the collate function; a tokenizer's padding='longest')."
            )
        if (better := self.grouped()) > real / longest + 0.05:
            said += f" The same samples in a LengthGroupedBatchSampler would have a fill of {better:.2f}."
        return said


def plot_padding(epoch: EpochPadding) -> Figure:
    """Draw how full the batches of an epoch were, and how long its samples are.

    Args:
        epoch: With at least one batch.
    """
    from matplotlib.figure import Figure  # half a second that a run without a picture need not wait

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    real, full = epoch.tokens
    left.hist(epoch.fills.tolist(), bins=25, range=(0, 1), color="#1f77b4")
    left.axvline(real / full, color="#d62728", label=f"of all tokens: {real / full:.2f}")
    left.set(xlabel="share of tokens that are no padding", ylabel="batches")
    left.legend()
    right.hist(torch.cat(list(epoch.lengths)).tolist(), bins=40, color="#777777")
    right.set(xlabel="tokens of a sample", ylabel="samples")
    return figure
