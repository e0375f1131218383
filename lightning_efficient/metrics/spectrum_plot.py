"""A picture of spectra: eigenvalues against their rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_spectrum(spectra: Mapping[str, Tensor | Sequence[float]], title: str = "") -> Figure:
    """Draw spectra on logarithmic axes; a power law is a straight line, a collapsed direction a cliff.

    Args:
        spectra: Name → eigenvalues or singular values, largest first; each is divided by its largest, and zeros are
            left out.
        title: Over the picture.

    Returns:
        The figure, not attached to any window.

    Raises:
        ValueError: No spectrum.
    """
    from matplotlib.figure import Figure  # half a second that a run without a picture need not wait

    if not spectra:
        raise ValueError("`spectra` is empty; expected at least one line, such as {'epoch 0': values}.")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=110)
    axes = figure.subplots()
    for name, values in spectra.items():
        line = [float(value) for value in values if value > 0]
        axes.plot(range(1, len(line) + 1), [value / line[0] for value in line], label=name, marker=".", linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="relative to the largest")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return figure
