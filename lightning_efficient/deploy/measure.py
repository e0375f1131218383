"""Size, multiply-accumulates, latency and outputs of two models, side by side in one run."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_efficient.common.comparing import Difference, difference
from lightning_efficient.common.escaping import cannot_write, rich_text
from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.names import EXPORTED
from lightning_efficient.common.running import Call, Inputs, as_call, device_of, evaluating
from lightning_efficient.common.weights import is_transposed, weight_layers
from lightning_efficient.deploy.export import export

MIN_ROUNDS = 20
_WARM_UP = 3


@dataclass(frozen=True)
class MeasuredRow:
    """One measured quantity.

    Args:
        quantity: What, such as ``"latency, batch 64"``.
        unit: Of both values; empty for counts.
        before: Value of the first model.
        after: Value of the second.
        ratio: ``after / before``; for latencies the median of the ratios within each round. ``None``: before
            is 0.
        quartiles: Of a latency's ratios, the first and the third.
    """

    quantity: str
    unit: str
    before: float
    after: float
    ratio: float | None
    quartiles: tuple[float, float] | None = None


@dataclass(frozen=True)
class ExportReport:
    """Two models compared.

    Args:
        rows: Parameters, buffers, file size, MACs, latencies.
        difference: Between their outputs on the example.
        device: Where both ran, with the number of CPU threads.
        rounds: Timed runs of each model at each batch size.
    """

    rows: list[MeasuredRow]
    difference: Difference
    device: str
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data."""
        return {
            "rows": [vars(row) for row in self.rows],
            "max_abs_difference": self.difference.absolute,
            "relative_difference": self.difference.relative,
            "device": self.device,
            "rounds": self.rounds,
        }

    def table(self, before: str = "before", after: str = "after") -> Table:
        """The rows as a rich table.

        Args:
            before: Heading of the first model's column.
            after: Heading of the second model's.
        """
        title = f"{self.device}; latency: median of {self.rounds} interleaved runs"
        table = Table(title=title, caption=str(self.difference))
        table.add_column("quantity")
        for heading in (before, after, f"{after} ÷ {before}"):
            table.add_column(rich_text(heading), justify="right")
        for row in self.rows:
            values = [_shown(value, row.unit) for value in (row.before, row.after)]
            table.add_row(row.quantity, *values, "–" if row.ratio is None else f"{row.ratio:.3f}")
        return table


def _shown(value: float, unit: str) -> str:
    return f"{value:,.3f} {unit}" if unit == "ms" else f"{value:,.0f} {unit}".rstrip()


def compare_models(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Inputs,
    batch_sizes: Sequence[int] | None = (1, 64),
    rounds: int = MIN_ROUNDS,
) -> ExportReport:
    """Measure two models on the same inputs, in evaluation mode; neither is changed.

    Args:
        before: The reference.
        after: The model compared with it.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments. For other batch sizes
            rows are repeated along the first axis.
        batch_sizes: Latency is measured at each; MACs at the first. ``None``: the example as it is.
        rounds: Timed runs per model and batch size, at least 20, both models in every round in alternating
            order.

    Returns:
        The rows, and the difference of the outputs on the example.

    Raises:
        ValueError: ``rounds`` below 20, an empty or non-positive batch size, inputs without a common first
            axis.
        ExportError: The outputs differ in structure.
    """
    _check_rounds(rounds)
    if batch_sizes is not None and (not batch_sizes or min(batch_sizes) < 1):
        raise ValueError(f"`batch_sizes` is {tuple(batch_sizes)}; expected positive integers, or None.")
    call = as_call(example_inputs)
    calls = {"as given": call} if batch_sizes is None else {str(n): call.resized(n) for n in batch_sizes}
    sizes = [_sizes(model) for model in (before, after)]
    rows = [_row(quantity, unit, sizes[0][quantity], sizes[1][quantity]) for quantity, unit in _SIZES.items()]
    with evaluating(before, after):
        apart = difference(call.run(before), call.run(after))
        label, first = next(iter(calls.items()))
        macs = [count_macs(model, first) for model in (before, after)]
        rows.append(_row(f"MACs, batch {label}", "", *macs))
        for label, sized in calls.items():
            rows.append(_latency(label, before, after, sized, rounds))
    return ExportReport(rows, apart, _describe(device_of(before)), rounds)


_SIZES = {"parameters": "", "buffer elements": "", "state dict file": "bytes"}


def _sizes(model: nn.Module) -> dict[str, int]:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "buffer elements": sum(b.numel() for b in model.buffers()),
        "state dict file": file.getbuffer().nbytes,
    }


def _check_rounds(rounds: int) -> None:
    if rounds < MIN_ROUNDS:
        raise ValueError(
            f"`rounds` is {rounds}; a median needs at least {MIN_ROUNDS}. Time fewer `batch_sizes` instead."
        )


def _row(quantity: str, unit: str, before: float, after: float) -> MeasuredRow:
    return MeasuredRow(quantity, unit, before, after, after / before if before else None)


def count_macs(model: nn.Module, call: Call) -> int:
    """Multiply-accumulates of one call: matrix products, convolutions and attention, as torch counts them.

    Args:
        model: The model, in the mode it should be counted in.
        call: Its arguments.
    """
    with _countable(), FlopCounterMode(display=False) as counter:
        call.run(model)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _countable() -> Iterator[None]:
    """Keep fused kernels out: torch counts nothing in the encoder fast path or CPU flash attention."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _latency(label: str, before: nn.Module, after: nn.Module, call: Call, rounds: int) -> MeasuredRow:
    times = _times([before, after], call, rounds)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    medians = [statistics.median(values) for values in times]
    return MeasuredRow(f"latency, batch {label}", "ms", medians[0], medians[1], ratio, (low, high))


def _times(models: Sequence[nn.Module], call: Call, rounds: int) -> list[list[float]]:
    """Milliseconds of each model's calls, all of them in every round, in alternating order."""
    arguments = [call.on(model) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for step in range(-_WARM_UP, rounds):
        for which in range(len(models)) if step % 2 else reversed(range(len(models))):
            args, kwargs = arguments[which]
            elapsed = _timed(models[which], args, kwargs)
            if step >= 0:
                times[which].append(1e3 * elapsed)
    return times


def _timed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    device = device_of(model)
    _synchronize(device)
    start = time.perf_counter()
    model(*args, **kwargs)
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads != 1 else ''}"


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
            table.add_column(rich_text(heading), justify="right")
        for name, (before, after) in narrower.items():
            table.add_row(name, str(before), str(after), f"{after / before:.0%}")
        return Group(self.measured.table("dense", "slim"), table)

    def draw(self, path: str | Path) -> Path:
        """A picture of the widths, one bar a layer.

        Args:
            path: Where to, such as ``"widths.png"``.

        Returns:
            The path.

        Raises:
            OSError: In one sentence, with the file and the reason.
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
        with cannot_write(path):
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
        ValueError: ``rounds`` below 20, an empty or non-positive batch size, inputs without a common first axis.
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


def log_exported(
    loggers: Iterable[Logger],
    model: nn.Module,
    example_inputs: Inputs,
    batch_size: int = 1,
    rounds: int = MIN_ROUNDS,
    step: int | None = None,
    latency: bool = True,
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
        latency: Also time it; False where other work shares the machine.

    Returns:
        What was logged: ``efficient/export/parameters``, ``size_mib`` (of the state dict's file), ``macs_batch_<n>``
        and ``latency_ms_batch_<n>``.

    Raises:
        ValueError: ``rounds`` below 20.
        ExportError: The model cannot be exported.
    """
    _check_rounds(rounds)
    plain = export(model, example_inputs)
    sizes, call = _sizes(plain), as_call(example_inputs).resized(batch_size)
    with evaluating(plain):
        macs = count_macs(plain, call)
        times = _times([plain], call, rounds)[0] if latency else []
    figures = {
        "parameters": sizes["parameters"],
        "size_mib": sizes["state dict file"] / 2**20,
        f"macs_batch_{batch_size}": macs,
    }
    if latency:
        figures[f"latency_ms_batch_{batch_size}"] = statistics.median(times)
    figures = {f"{EXPORTED}{name}": float(value) for name, value in figures.items()}
    for logger in loggers:
        logger.log_metrics(figures, step)
        logger.save()
    return figures
