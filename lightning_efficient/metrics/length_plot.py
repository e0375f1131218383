"""A quantity against text length, one line per temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_efficient.common.escaping import picture_text
from lightning_efficient.metrics.functional.lengths import EDGES, bin_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def plot_by_length(
    curves: Mapping[float | str, Tensor | Sequence[float]],
    edges: Sequence[int] = EDGES,
    ylabel: str = "mean cosine between texts",
    title: str = "",
    counts: Sequence[int] | None = None,
) -> Figure:
    """Draw what ``CosineByLength`` or ``FilterRate`` computed at several temperatures.

    Args:
        curves: τ, or a name, → ``(len(edges) + 1,)`` values, one per bin; NaN is left out.
        edges: Upper ends of all bins but the last.
        ylabel: What the values are.
        title: Over the picture.
        counts: Number of samples per bin, written under its name.

    Returns:
        The figure, not attached to any window.

    Raises:
        ValueError: No curve, or one of another length than there are bins.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    labels = bin_labels(edges)
    if not curves:
        raise ValueError("`curves` is empty; expected at least one line, such as {1.0: metric.compute()}.")
    for name, values in curves.items():
        if len(values) != len(labels):
            raise ValueError(f"`curves`[{name!r}] has {len(values)} values; expected one per bin, {labels}.")
    if counts is not None:
        labels = [f"{label}\n({count})" for label, count in zip(labels, counts, strict=True)]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for i, (name, values) in enumerate(curves.items()):
        # τ = 1 is black, and the rest run over viridis without its yellow end, which is too light on white.
        plain = name == 1.0
        axes.plot(
            [float(value) for value in values],
            label=picture_text(name) if isinstance(name, str) else f"τ = {name:g}" + " (unchanged)" * plain,
            color="black" if plain else colormaps["viridis"](0.85 * i / max(1, len(curves) - 1)),
            marker=_MARKERS[i % len(_MARKERS)],
            linewidth=2.2 if plain else 1.4,
            markersize=5,
            zorder=3 if plain else 2,
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("tokens" if counts is None else "tokens (number of texts)")
    axes.set_ylabel(picture_text(ylabel))
    axes.set_title(picture_text(title), fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2 if len(curves) > 5 else 1)
    return figure
