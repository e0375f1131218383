"""The picture of a SAP run: PQ index and validation metric against the weights left, phases in colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"dense": "#444444", "regularise": "#1f77b4", "compress": "#2ca02c", "collapse": "#d62728"}


def plot_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the history of a SAP run.

    Args:
        history: ``SAPPruning.history``: rows with ``left``, ``pqi``, ``score`` and ``phase``.

    Returns:
        A figure, one panel, or two with a validation metric; the axis of the weights left runs from dense to sparse.
    """
    from matplotlib.figure import Figure  # half a second that a run without a picture need not wait
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels = [("pqi", "PQ index")]
    if any(row["score"] is not None for row in history):
        panels.append(("score", "validation"))
    figure = Figure(figsize=(5.5 * len(panels), 3.6), layout="constrained")
    for position, (key, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), position + 1)
        rows = [row for row in history if row[key] is not None]
        axes.plot([row["left"] for row in rows], [row[key] for row in rows], color="#bbbbbb", zorder=1)
        for name, colour in COLOURS.items():
            points = [(row["left"], row[key]) for row in rows if row["phase"] == name]
            if points:
                axes.scatter(*zip(*points, strict=True), color=colour, label=name, zorder=2)
        axes.set(xlabel="share of weights left", ylabel=label, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.invert_xaxis()
        axes.legend()
    return figure


def log_curve(loggers: Iterable[Logger], history: Sequence[Mapping[str, Any]], step: int) -> None:
    """Put the picture where a logger shows pictures.

    Args:
        loggers: Those of the Trainer; TensorBoard's are used.
        history: As for :func:`plot_curve`; nothing is drawn for fewer than two rows.
        step: Step to log it at.
    """
    if len(history) > 1:
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("efficient/pruning/curve", plot_curve(history), step)
