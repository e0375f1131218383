"""Time and memory of modules, read off the events of torch's profiler."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.profiler import record_function

from lightning_efficient.common.match import canonical_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SPAN = "lightning_efficient::"
_BACKWARD = "autograd::engine::evaluate_function: "
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b", "#9d755d")


@dataclass(frozen=True)
class ModuleTime:
    """What one module took in a step.

    Args:
        name: Dotted; empty: the module that was asked about.
        kind: Its class.
        calls: Of its forward, those repeated by activation checkpointing included.
        forward_ms: In its forward, everything in it included.
        backward_ms: Of the operations of its forward, everything in it included.
        own_ms: Forward and backward without what is in its submodules.
        memory_mib: Memory taken in its forward and not given back there: what the backward needs.
    """

    name: str
    kind: str
    calls: float
    forward_ms: float
    backward_ms: float
    own_ms: float
    memory_mib: float

    @property
    def total_ms(self) -> float:
        """Forward and backward."""
        return self.forward_ms + self.backward_ms


class Spans:
    """While open, the forward of every module is a span of its name in the profiler; outside, nothing is left.

    Code that is being compiled has none: a module from ``torch.compile`` is one span.

    Args:
        model: Whose modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._open = threading.local()
        self._hooks = ExitStack()

    def open(self) -> None:
        """Put the hooks on."""
        for name, module in self.model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                before = module.register_forward_pre_hook(self._enter(SPAN + canonical_name(name)))
                self._hooks.callback(before.remove)
                after = module.register_forward_hook(self._leave, always_call=True)
                self._hooks.callback(after.remove)

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.close()

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if torch.compiler.is_compiling():
                return
            span = record_function(name)
            span.__enter__()  # type: ignore[no-untyped-call]
            vars(self._open).setdefault("stack", []).append(span)

        return hook

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if not torch.compiler.is_compiling() and (stack := vars(self._open).get("stack")):
            stack.pop().__exit__(None, None, None)


def module_times(events: Iterable[Any], model: nn.Module) -> list[ModuleTime]:
    """What every module took, from the events of a profiled step.

    A backward operation belongs to the module in whose forward the operation of the same sequence number ran last.

    Args:
        events: ``profiler.events()``, with spans of :class:`Spans`; times of the device where it is not the CPU.
        model: The model.

    Returns:
        One row for each module that ran, in the order of ``named_modules``.
    """
    forward: dict[str, float] = {}
    memory: dict[str, float] = {}
    calls: dict[str, int] = {}
    owner: dict[tuple[int, int], str] = {}
    backward: dict[str, float] = {}
    ordered = sorted(events, key=lambda e: e.time_range.start)
    for event in ordered:
        if event.name.startswith(SPAN):
            name = event.name.removeprefix(SPAN)
            calls[name] = calls.get(name, 0) + 1
            if not any(a.name == event.name for a in _ancestors(event)):  # a module that calls itself
                forward[name] = forward.get(name, 0.0) + _time(event)
                memory[name] = memory.get(name, 0.0) + event.cpu_memory_usage + event.device_memory_usage
        elif event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            span = next((a.name for a in _ancestors(event) if a.name.startswith(SPAN)), None)
            if span is not None:
                owner[event.thread, event.sequence_nr] = span.removeprefix(SPAN)
    for event in ordered:
        if event.name.startswith(_BACKWARD):
            inside = sum(_time(c) for c in event.cpu_children if c.name.startswith(SPAN))  # a forward run again
            name = owner.get((event.fwd_thread, event.sequence_nr), owner.get((event.thread, event.sequence_nr), ""))
            backward[name] = backward.get(name, 0.0) + _time(event) - inside
    return _rows(model, calls, forward, backward, memory)


def _rows(
    model: nn.Module,
    calls: Mapping[str, int],
    forward: Mapping[str, float],
    backward: Mapping[str, float],
    memory: Mapping[str, float],
) -> list[ModuleTime]:
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    rows = []
    for name, module in modules.items():
        if name not in calls:
            continue
        below = [n for n in calls if n != name and parent(n, calls) == name]
        whole = sum(t for n, t in backward.items() if n == name or n.startswith(f"{name}.") or (not name and n))
        own = max(forward[name] - sum(forward[n] for n in below), 0.0) + backward.get(name, 0.0)
        row = ModuleTime(name, type(module).__name__, calls[name], forward[name], whole, own, memory[name] / 2**20)
        rows.append(row)
    return rows


def parent(name: str, names: Iterable[str]) -> str | None:
    """The nearest module above one that also ran; None: there is none.

    Args:
        name: Dotted.
        names: Of all that ran.
    """
    known = set(names)
    while name:
        name = name.rpartition(".")[0]
        if name in known:
            return name
    return None


def _ancestors(event: Any) -> Iterable[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def _time(event: Any) -> float:
    """Milliseconds on the device, where there is one."""
    return float(event.device_time_total or event.cpu_time_total) / 1e3


def mean_times(samples: Sequence[Sequence[ModuleTime]]) -> list[ModuleTime]:
    """The mean of several steps; modules that did not run in one count as 0 there.

    Args:
        samples: Rows of each.
    """
    found: dict[str, ModuleTime] = {}
    for rows in samples:
        for row in rows:
            old = found.get(row.name)
            numbers = {k: v / len(samples) for k, v in asdict(row).items() if not isinstance(v, str)}
            if old is not None:
                numbers = {k: v + getattr(old, k) for k, v in numbers.items()}
            found[row.name] = replace(row, **numbers)
    return list(found.values())


def times_table(rows: Sequence[ModuleTime], most: int = 20) -> Table:
    """The modules that take most by themselves, for the terminal.

    Args:
        rows: Of a step.
        most: Lines.
    """
    from rich.table import Table

    table = Table(title="ModuleTimer: a training step, by what modules take themselves")
    table.add_column("module", overflow="fold")
    table.add_column("class")
    for column in ("calls", "own ms", "forward ms", "backward ms", "memory MiB"):
        table.add_column(column, justify="right")
    for row in sorted(rows, key=lambda r: -r.own_ms)[:most]:
        numbers = (row.own_ms, row.forward_ms, row.backward_ms, row.memory_mib)
        table.add_row(row.name or "(itself)", row.kind, f"{row.calls:g}", *(f"{n:.2f}" for n in numbers))
    return table


def plot_times(rows: Sequence[ModuleTime]) -> Figure:
    """Draw an icicle: every module a bar as wide as its forward and backward take, its submodules below it.

    Args:
        rows: Of a step.
    """
    from matplotlib.figure import Figure  # half a second that a run without a picture need not wait

    names = [row.name for row in rows]
    above = {name: parent(name, names) for name in names}
    children: dict[str | None, list[ModuleTime]] = {}
    for row in rows:
        children.setdefault(above[row.name], []).append(row)
    bars: list[tuple[ModuleTime, float, int]] = []

    def place(row: ModuleTime, left: float, depth: int) -> None:
        bars.append((row, left, depth))
        for child in children.get(row.name, ()):
            place(child, left, depth + 1)
            left += child.total_ms

    edge = 0.0
    for top in children.get(None, ()):
        place(top, edge, 0)
        edge += top.total_ms
    deepest = max((depth for *_, depth in bars), default=0)
    figure = Figure(figsize=(11, 1.2 + 0.45 * (deepest + 1)), layout="constrained")
    axes = figure.add_subplot()
    for number, (row, left, depth) in enumerate(bars):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.barh(depth, row.total_ms, left=left, height=0.95, color=colour, edgecolor="white", linewidth=0.5)
        if row.total_ms > 0.03 * edge:
            label = row.name.rpartition(".")[2] or row.kind
            axes.text(left + row.total_ms / 2, depth, label, ha="center", va="center", fontsize=7, clip_on=True)
    axes.invert_yaxis()
    axes.set(xlabel="ms of a step, forward and backward", yticks=[], xlim=(0, edge or 1))
    return figure
