"""What cutting bought: sizes, multiply-accumulates, latency, and the width of every layer before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from lightning_efficient.inference import Inputs
from lightning_efficient.measure import MIN_ROUNDS, ExportReport, compare_models
from lightning_efficient.surgery.match import canonical_name
from lightning_efficient.surgery.weights import is_transposed, weight_layers


@dataclass(frozen=True)
class SlimReport:
    """Two versions of a model compared.

    Args:
        measured: Parameters, file size, MACs, latency, difference of the outputs.
        widths: Layer → output channels before and after, of every layer with a weight matrix.
    """

    measured: ExportReport
    widths: dict[str, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data."""
        return self.measured.to_dict() | {"widths": {name: list(pair) for name, pair in self.widths.items()}}

    def table(self) -> Group:
        """Both tables, for ``rich.print``; the second holds the layers that became narrower."""
        narrower = {name: pair for name, pair in self.widths.items() if pair[0] != pair[1]}
        table = Table(title=f"{len(narrower)} of {len(self.widths)} layers are narrower")
        table.add_column("layer")
        for heading in ("before", "after", "kept"):
            table.add_column(heading, justify="right")
        for name, (before, after) in narrower.items():
            table.add_row(name, str(before), str(after), f"{after / before:.0%}")
        return Group(self.measured.table("dense", "slim"), table)

    def draw(self, path: str | Path) -> Path:
        """A picture of the widths, one bar a layer.

        Args:
            path: Where to, such as ``"widths.png"``.

        Returns:
            The path.
        """
        from matplotlib.figure import Figure

        names, pairs = list(self.widths), list(self.widths.values())
        figure = Figure(figsize=(7, 0.6 + 0.22 * len(names)), layout="constrained")
        axes = figure.subplots()
        rows = range(len(names))
        axes.barh(rows, [before for before, _ in pairs], color="0.85", label="before")
        axes.barh(rows, [after for _, after in pairs], height=0.5, color="tab:blue", label="after")
        axes.set(yticks=list(rows), yticklabels=names, xlabel="output channels", ylim=(len(names) - 0.4, -0.6))
        axes.tick_params(axis="y", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
        figure.savefig(path, dpi=150)
        return Path(path)


def slim_report(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Inputs,
    batch_sizes: Sequence[int] | None = (1, 64),
    rounds: int = MIN_ROUNDS,
    compiled: bool = False,
) -> SlimReport:
    """Measure a model against the version of it that units were cut out of; neither is changed.

    Args:
        before: The dense model.
        after: The slim one, with the same layers.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        batch_sizes: Latency is measured at each. ``None``: the example as it is.
        rounds: Timed runs of each at each batch size, interleaved; at least 20.
        compiled: Measure latency under ``torch.compile``, too.

    Raises:
        ValueError: See :func:`~lightning_efficient.measure.compare_models`.
    """
    measured = compare_models(before, after, example_inputs, batch_sizes, rounds)
    if compiled:
        both = [torch.compile(model) for model in (before, after)]
        again = compare_models(both[0], both[1], example_inputs, batch_sizes, rounds)  # type: ignore[arg-type]
        rows = [replace(r, quantity=f"{r.quantity}, compiled") for r in again.rows if r.unit == "ms"]
        measured = replace(measured, rows=[*measured.rows, *rows])
    widths, narrower = layer_widths(before), layer_widths(after)
    return SlimReport(measured, {name: (width, narrower.get(name, 0)) for name, width in widths.items()})


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Layer → output channels, of every linear layer and convolution.

    Args:
        model: Any module.
    """
    widths = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, weight_layers(embeddings=False)) and isinstance(weight, Tensor):
            transposed = is_transposed(module) or getattr(module, "transposed", False)
            widths[canonical_name(name)] = weight.shape[1 if transposed else 0]
    return widths
