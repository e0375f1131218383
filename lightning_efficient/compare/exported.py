"""Figures of the exported model, in the log of the run it comes from."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.loggers import Logger
from torch import nn

from lightning_efficient.compare.quantities import EXPORTED
from lightning_efficient.export import export
from lightning_efficient.inference import Inputs
from lightning_efficient.measure import MIN_ROUNDS, compare_models


def log_exported(
    loggers: Iterable[Logger],
    model: nn.Module,
    example_inputs: Inputs,
    batch_size: int = 1,
    rounds: int = MIN_ROUNDS,
    step: int | None = None,
) -> dict[str, float]:
    """Export a trained model, measure the copy, and log what it costs beside the metrics of the run.

    Latency is the median of ``rounds`` calls on the device the model is on. It compares with that of another run only
    if both were measured on the same idle machine.

    Args:
        loggers: Of the run, such as ``trainer.loggers``, after ``fit``.
        model: The LightningModule or the part of it that is deployed.
        example_inputs: As for :func:`~lightning_efficient.export`.
        batch_size: Latency and multiply-accumulates are those of this many samples.
        rounds: Timed calls, at least 20.
        step: Step to log at. ``None``: the logger's choice.

    Returns:
        What was logged: ``efficient/export/parameters``, ``size_mib`` (of the state dict's file), ``macs_batch_<n>``
        and ``latency_ms_batch_<n>``.

    Raises:
        ValueError: ``rounds`` below 20.
        ExportError: The model cannot be exported.
    """
    report = compare_models(model, export(model, example_inputs), example_inputs, (batch_size,), rounds)
    found = {row.quantity: row.after for row in report.rows}
    figures = {
        "parameters": found["parameters"],
        "size_mib": found["state dict file"] / 2**20,
        f"macs_batch_{batch_size}": found[f"MACs, batch {batch_size}"],
        f"latency_ms_batch_{batch_size}": found[f"latency, batch {batch_size}"],
    }
    figures = {f"{EXPORTED}{name}": float(value) for name, value in figures.items()}
    for logger in loggers:
        logger.log_metrics(figures, step)
        logger.save()
    return figures
