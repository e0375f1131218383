"""What a run writes once for TensorBoard: its hyper-parameters, and which of its scalars belong in one chart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_efficient.common.registry import METHODS
from lightning_efficient.trainer.showing import show_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_hparams(logger: TensorBoardLogger, hparams: Mapping[str, Any]) -> None:
    """Write the record of the HParams tab, a trial named ``<variant>/<seed>`` as the run's folder is.

    ``TensorBoardLogger.log_hyperparams`` would also write an experiment, which makes ``hp_metric`` the only metric of
    the table and the keys of the first run its only columns. Without one TensorBoard takes the keys of all runs, and
    every scalar with its last value.

    Args:
        logger: On the process that writes.
        hparams: Nested as the user has them; what is no bool, number or text is written as text.
    """
    # tensorboard.plugins.hparams.api is the same behind an import of TensorFlow
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # type: ignore[import-untyped]

    logger.log_hyperparams(dict(hparams), {})  # for hparams.yaml; without metrics nothing goes to the event file
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    trial = f"{logger.name}/{version}" if logger.name else version
    logger.experiment.file_writer.add_summary(hparams_pb(dict(_flat(hparams)), trial_id=trial))


def _flat(hparams: Mapping[Any, Any], parent: str = "") -> Iterable[tuple[str, bool | int | float | str]]:
    for key, value in hparams.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{parent}{key}/")
        else:
            yield f"{parent}{key}", value if isinstance(value, bool | int | float | str) else str(value)


def write_layout(logger: TensorBoardLogger, methods: Iterable[str]) -> None:
    """Write the layout of the Custom Scalars tab; TensorBoard merges those of all runs.

    Args:
        logger: On the process that writes.
        methods: Names of the methods that are on.
    """
    layout = {
        method: {title: ["Multiline", [f"^{pattern}$"]] for title, pattern in METHODS[method].charts.items()}
        for method in dict.fromkeys(methods)
        if METHODS[method].charts
    }
    if layout:
        logger.experiment.add_custom_scalars(layout)


COLOURS = {"dense": "#444444", "regularise": "#1f77b4", "compress": "#2ca02c", "collapse": "#d62728"}


def plot_sap_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
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
        loggers: Those of the Trainer; those that show pictures are used.
        history: As for :func:`plot_sap_curve`; nothing is drawn for fewer than two rows.
        step: Step to log it at.
    """
    if len(history) > 1:
        show_picture(loggers, "efficient/sap_pruning/curve", partial(plot_sap_curve, history), step)
