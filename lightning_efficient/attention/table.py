"""All attention heads of a forward pass in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_efficient.attention.probe import AttentionCall
from lightning_efficient.metrics.functional.heads import head_compute, head_update
from lightning_efficient.metrics.heatmap import heatmap

# Mean weight on key 0 above which a head is an attention sink: low in entropy, and healthy.
SINK = 0.5


@dataclass(frozen=True)
class HeadTable:
    """One row per attention call, one entry per head.

    Args:
        sites: Name of each call.
        values: Quantity (see ``head_compute``) -> one float64 CPU tensor ``(heads,)`` per call.
        threshold: A head is collapsed when its mean normalised entropy is below this.
    """

    sites: list[str]
    values: dict[str, list[Tensor]]
    threshold: float

    @classmethod
    def of(cls, calls: Sequence[AttentionCall], threshold: float = 0.05) -> HeadTable:
        """Reduce calls to one number per head and quantity, with a single transfer to the CPU.

        Calls in which no query sees two keys are left out: they have nothing to choose.

        Args:
            calls: All on one device.
            threshold: On the mean normalised entropy of a head.
        """
        if not calls:
            return cls([], {}, threshold)
        heads = [head_compute(head_update(call.rows, threshold)) for call in calls]
        names = list(heads[0])
        packed = torch.cat([torch.stack([head[name].float() for name in names]) for head in heads], dim=1)
        parts = torch.split(packed.double().cpu(), [call.rows.entropy.shape[1] for call in calls], dim=1)
        kept = [n for n, part in enumerate(parts) if part[names.index("rows")].sum() > 0]
        values = {name: [parts[n][i] for n in kept] for i, name in enumerate(names)}
        return cls([calls[n].site for n in kept], values, threshold)

    def collapsed(self) -> list[Tensor]:
        """Which heads have collapsed, sinks included."""
        return [row < self.threshold for row in self.values["normalized"]]

    def sinks(self) -> list[Tensor]:
        """Which heads put most of their weight on key 0."""
        return [row > SINK for row in self.values["first_key"]]

    def scalars(self) -> dict[str, float]:
        """What is worth an alarm, over all heads of at least one call. NaN as soon as one head's logits are."""
        entropy, normalized = torch.cat(self.values["entropy"]), torch.cat(self.values["normalized"])
        return {
            "entropy_mean": entropy.mean().item(),
            "entropy_min": entropy.min().item(),
            "entropy_normalized_min": normalized.min().item(),
            "collapsed_fraction": torch.cat(self.collapsed()).double().mean().item(),
            "sink_fraction": torch.cat(self.sinks()).double().mean().item(),
            "entropy_bound_min": torch.cat(self.values["bound"]).min().item(),
            "logit_norm_max": torch.cat(self.values["logit_norm_max"]).max().item(),
        }

    def layers(self) -> dict[str, float]:
        """Mean entropy and lowest normalised entropy of each call's heads."""
        out = {}
        for i, site in enumerate(self.sites):
            out[f"{site}/entropy_mean"] = self.values["entropy"][i].mean().item()
            out[f"{site}/entropy_normalized_min"] = self.values["normalized"][i].min().item()
        return out

    def picture(self, step: int) -> Tensor:
        """Heatmap of mean entropies, from 0 to the ceiling (log of the visible keys), ``(3, height, width)`` uint8.

        Args:
            step: For the title.
        """
        ceiling = torch.cat(self.values["ceiling"])
        finite = ceiling[ceiling.isfinite()]
        return heatmap(
            [row.tolist() for row in self.values["entropy"]],
            self.sites,
            title=f"attention entropy per head, step {step}",
            unit="nats",
            low=0.0,
            high=finite.max().item() if len(finite) else 1.0,
            frames=[row.tolist() for row in self.collapsed()],
            dots=[row.tolist() for row in self.sinks()],
            legend=f"red frame: collapsed (entropy / log keys < {self.threshold:g})   "
            f"dot: sink (weight on key 0 > {SINK:g})",
        )
