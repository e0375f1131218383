"""``find_groups``: which units of a model can be cut, each tried before it is offered.

Widths are found by following labels of channels through a forward (``trace.py``, ``widths.py``), in evaluation and in
training mode. None is believed: several subsets of the units of every width are zeroed in one float64 copy of the model
and cut out of it, and the two must compute the same (``trial.py``). Everything is done on that copy; the model is never
touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_efficient.common.match import (
    REFERENCE,
    Choice,
    NoMatchError,
    canonical_name,
    modules_by_name,
    references,
)
from lightning_efficient.common.weights import check_weight, sparse_gradients
from lightning_efficient.structured.cost import Cost
from lightning_efficient.structured.groups import Groups, UnitGroup, check_rounding, rounded
from lightning_efficient.structured.labels import INSIDE
from lightning_efficient.structured.pretrained import calls_of
from lightning_efficient.structured.trial import Trial
from lightning_efficient.structured.twin import METHOD, Run, Twin, all_ways
from lightning_efficient.structured.widths import Role, Width, find_widths


@torch.inference_mode(False)
@torch.enable_grad()
def find_groups(
    model: nn.Module,
    example: Any,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    inexact: bool = False,
    round_to: int = 1,
) -> Groups:
    """Find the units that can be cut out of a model: channels, hidden neurons, heads.

    Layers that make an output of the model are protected. Widths with parametrized, tied, frozen or quantized tensors
    on them are refused, and so is whatever does not stand the trial.

    Args:
        model: Any module, in any mode; not touched, nor is the random state.
        example: A tensor, a tuple of positional or a dict of keyword arguments, or a function that calls the model, in
            all the ways that matter: ``lambda: [model(x, task) for task in tasks]``. Two samples do.
        include: Globs over names of modules: groups that are made by at least one of them. None: all.
        exclude: Globs over names of modules: groups that are made by none of them.
        inexact: Offer groups, too, whose units are not gone when they are zero: LayerNorm or GroupNorm over the width
            (the residual width of a transformer), activations with f(0) ≠ 0. They are marked, with the reason.
        round_to: What stays of a group is a multiple of so many channels in every tensor, such as 8, 16 or 32 for
            kernels that like it; a group may also stay whole.

    Returns:
        What was found, and what was refused and why.

    Raises:
        ValueError: The model cannot be copied or run; a parameter has no values yet; or ``round_to`` is below 1.
        NoMatchError: Nothing can be cut, or the globs match none of it; says what there is.
    """
    check_rounding(round_to)
    choice, modules = Choice.of(model, include, exclude, METHOD), modules_by_name(model)
    bad, idle = _bad_tensors(model), references(model)
    twin = Twin.of(model, all_ways(model, example))
    notes: list[str] = []
    with torch.random.fork_rng(devices=_devices(model)):
        tracer = _Tracer(twin)
        outer = tracer.widths()
        if tracer.failed:
            notes.append(
                f"it does not run in training mode on the example ({tracer.failed}): what runs only then was not seen"
            )
        training = None if tracer.failed else tracer.training
        trial = Trial(twin.model, twin.run(twin.small), twin.tolerance, training, inexact)
        refused: dict[str, str] = {}
        found = trial.judge(_admitted(outer, bad, idle, refused, choice), refused)
        doubtful = {width.group.name for width in outer if width.doubtful or width.refused == INSIDE}
        if doubtful - {group.name for group in found if group.exact}:
            # Another way to read what was refused: of axes that were split, the inner part goes.
            more = [w for w in tracer.widths(inner=True) if not _overlaps(w.group, found) and not _known(w, outer)]
            again = trial.judge(_admitted(more, bad, idle, {}, choice), {})
            for group in again:
                refused.pop(group.name, None)
            found += again
        if not inexact:
            for group in [group for group in found if not group.exact]:
                why = f"zeroing its units is not removing them: {group.note} (`inexact=True` may allow it)"
                refused[group.name] = why
            found = [group for group in found if group.exact]
        calls = calls_of(twin.model, twin.run(twin.two))
        # A kernel of another precision than float64 may want a multiple of a few channels.
        found = Trial(twin.model, twin.lowered(model)).aligned(found, refused)
    refused |= _lone_heads(modules, outer, found)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise NoMatchError(f"{METHOD}: nothing of {type(model).__name__} can be cut. {reasons or 'It has no layers.'}")
    order = {name: i for i, name in enumerate(modules)}
    found.sort(key=lambda g: order.get(g.name.partition("#")[0], 0))
    found = [rounded(group, round_to) for group in found]
    share, held = _shares(model, found, [w for w in outer if w.group.name in refused])
    return Groups({g.name: g for g in found}, refused, tuple(notes), share, held, calls)


def _training(twin: nn.Module, run: Run) -> Run:
    """A run in training mode; buffers come back."""

    def training() -> Any:
        buffers = [(b, b.clone()) for b in twin.buffers()]
        try:
            twin.train()
            with torch.random.fork_rng(devices=_devices(twin)):
                return run()
        finally:
            twin.eval()
            for buffer, value in buffers:
                buffer.copy_(value)

    return training


class _Tracer:
    """Finds the widths of a copy, in one run in evaluation mode and one in training mode where that is possible."""

    def __init__(self, twin: Twin) -> None:
        self.twin, self.run = twin.model, twin.run
        # A batch norm of one number fails in training where one of two does not.
        self.probes = [twin.small] if twin.two is twin.small else [twin.small, twin.two]
        self.training = _training(self.twin, self.run(twin.small))
        self.failed = ""
        self.unread: dict[str, set[str]] | None = None

    def widths(self, inner: bool = False) -> list[Width]:
        """Every width; a second look for what layers that did not run may read."""
        if self.unread is None:
            ran: set[str] = set()
            handles = [
                m.register_forward_pre_hook(lambda _, __, name=name: ran.add(name))
                for name, m in modules_by_name(self.twin).items()
                if not isinstance(m, torch.jit.ScriptModule)  # its parts are known by the parameters that are read
            ]
            try:
                widths, read = find_widths(self.twin, self._both(), inner=inner)
            finally:
                for handle in handles:
                    handle.remove()
            self.unread = _unread(self.twin, ran, read)
            if not self.unread:
                return widths
        return find_widths(self.twin, self._both(), self.unread, inner)[0]

    def _both(self) -> list[tuple[Run, Any]]:
        inputs = [(probe.args, probe.kwargs) for probe in self.probes]
        evaluation = self.run(self.probes[0]), inputs[0]
        if self.failed:
            return [evaluation]

        def lenient() -> Any:
            for probe in self.probes:
                self.training = _training(self.twin, self.run(probe))
                try:
                    result = self.training()
                except Exception as why:  # a training forward may want targets
                    self.failed = str(why.__cause__ or why).strip().partition("\n")[0] or type(why).__name__
                else:
                    self.failed = ""
                    return result
            return None

        return [evaluation, (lenient, inputs)]


def _unread(twin: nn.Module, ran: set[str], read: set[str]) -> dict[str, set[str]]:
    """Module that ran → modules that it may have run, and did not."""
    unread: dict[str, set[str]] = {}
    for name, module in modules_by_name(twin).items():
        own = [f"{name}.{n}" if name else n for n, p in module.named_parameters(recurse=False) if p.numel() > 1]
        if own and name not in ran and not any(canonical_name(n) in read for n in own):
            caller = name
            while caller and caller not in ran:
                caller = caller.rpartition(".")[0]
            unread.setdefault(caller, set()).add(name)
    return unread


def _admitted(
    widths: Iterable[Width],
    bad: Mapping[str, str],
    idle: set[str],
    refused: dict[str, str],
    choice: Choice,
) -> list[Width]:
    """The widths that are to be tried; the others' reasons go to ``refused``. ``idle``: in reference networks."""
    ready = []
    for width in widths:
        group = width.group
        barred = [f"{part.name!r} is {bad[part.name]}" for part in group.slices if _bars(part.name, part.role, bad)]
        makers = _made_in(group)
        unwanted = REFERENCE if makers & idle else choice.why_not(*makers)
        if reason := width.refused or next(iter(barred), "") or unwanted:
            refused[group.name] = reason
        else:
            ready.append(width)
    return ready


def _made_in(group: UnitGroup) -> set[str]:
    """The modules that make its units."""
    return {part.name.rpartition(".")[0] for part in group.produced}


def _overlaps(group: UnitGroup, found: Iterable[UnitGroup]) -> bool:
    """Whether it takes entries that belong to a group already."""
    mine = {(s.name, s.dim, e) for s in group.produced for e in s.index.flatten().tolist()}
    return any(
        (s.name, s.dim, e) in mine for other in found for s in other.produced for e in s.index.flatten().tolist()
    )


def _known(width: Width, before: Iterable[Width]) -> bool:
    """Whether it is the same as a width that was read the other way."""
    mine = {(s.name, s.dim, s.role): s.index for s in width.group.slices}
    for other in before:
        theirs = {(s.name, s.dim, s.role): s.index for s in other.group.slices}
        if mine.keys() == theirs.keys() and all(torch.equal(index, theirs[key]) for key, index in mine.items()):
            return True
    return False


def _shares(model: nn.Module, found: list[UnitGroup], refused: list[Width]) -> tuple[float, dict[str, float]]:
    """Which share of the parameters can go, and what holds tensors of which nothing can."""
    cost = Cost.parameters(model, {group.name: group for group in found})
    total = cost() or 1.0
    left = cost({group.name: max(group.units - group.divisor, 0) for group in found})
    touched = {part.name for group in found for part in group.slices}
    held: dict[str, float] = {}
    for width in refused:
        names = {part.name for part in width.group.slices} - touched
        if size := sum(cost.amounts.get(name, 0.0) for name in names):
            held[width.group.name] = size / total
    return 1 - left / total, held


def _lone_heads(
    modules: Mapping[str, nn.Module], widths: Iterable[Width], found: Iterable[UnitGroup]
) -> dict[str, str]:
    """Every ``nn.MultiheadAttention`` that keeps its heads → why they cannot go alone."""
    inside = {part.name.rpartition(".")[0] for group in found for part in group.produced}
    notes = {}
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and name not in inside:
            tensors = {f"{name}.{weight}" for weight in ("in_proj_weight", "q_proj_weight", "out_proj.weight")}
            home = next((w.group.name for w in widths if any(s.name in tensors for s in w.group.slices)), None)
            notes[name] = (
                "nn.MultiheadAttention splits the width of its own input into heads, so a head can only go with as "
                "many channels of that width" + (f", and {home!r} keeps them all (see there)" if home else "")
            )
    return notes


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _bars(tensor: str, role: Role, bad: Mapping[str, str]) -> bool:
    """Whether a tensor keeps its width as it is; what only reads it may be frozen."""
    return tensor in bad and not (role == "consume" and bad[tensor].startswith("frozen"))


def _bad_tensors(model: nn.Module) -> dict[str, str]:
    """Tensor → what is wrong with it."""
    bad: dict[str, str] = {}
    names: dict[int, str] = {}
    for path, module in model.named_modules():  # each once: a second name for a module ties nothing
        for attribute, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            name = canonical_name(f"{path}.{attribute}" if path else attribute)
            other = names.setdefault(id(tensor), name)
            if other != name:
                bad[name], bad[other] = f"the same tensor as {other!r} (tied)", f"the same tensor as {name!r} (tied)"
    for name, module in modules_by_name(model).items():
        own = [f"{name}.{n}" if name else n for n, _ in module.named_parameters(recurse=False)]
        if (why := sparse_gradients(module)) is not None:
            bad |= dict.fromkeys(own, why)
        if isinstance(module, torch.jit.ScriptModule):  # its backward keeps the sizes that it saw first
            bad |= dict.fromkeys(own, "inside a scripted module (torch.jit)")
        if parametrize.is_parametrized(module):
            parts = [n for n, _ in module.named_parameters() if n.startswith("parametrizations.")]
            why = "parametrized (`torch.nn.utils.parametrize.remove_parametrizations` makes it plain)"
            bad |= {f"{name}.{p}" if name else p: why for p in parts}
        elif any(n.endswith(("_g", "_orig")) for n in own):
            parts = [n for n in own if n.endswith(("_g", "_v", "_orig"))]
            why = "recomputed at every forward by a hook (such as `torch.nn.utils.remove_weight_norm` makes it plain)"
            bad |= dict.fromkeys([*parts, f"{name}.weight"], why)
    for name, parameter in model.named_parameters():
        if (reason := _weight(name, parameter)) is not None:
            bad.setdefault(canonical_name(name), reason)
    return bad


def _weight(name: str, parameter: nn.Parameter) -> str | None:
    """What is wrong with one parameter; only one without values ends the search."""
    try:
        return check_weight(name, parameter, METHOD)
    except ValueError:
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
            raise
        return f"{parameter.dtype}, {parameter.layout}: only real, dense, floating-point tensors can be cut"
