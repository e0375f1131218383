"""``find_groups``: which units of a model can be cut, each tried before it is offered.

Widths are found by tracing (``widths.py``) and by what heads depend on (``heads.py``). Neither is believed: half of the
units of every width are zeroed in one float64 copy of the model and cut out of it, and the two must compute the same.
Everything is done on that copy; the model is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_efficient.attention.sites import as_probe, perturbed, run_float64
from lightning_efficient.common.match import (
    REFERENCE,
    NoMatchError,
    canonical_name,
    covers,
    modules_by_name,
    near_names,
    references,
)
from lightning_efficient.common.nests import mapped, tensors_in
from lightning_efficient.common.running import float64_copy
from lightning_efficient.common.weights import check_weight
from lightning_efficient.folding.probes import Probe
from lightning_efficient.structured.groups import Groups, Slice, UnitGroup
from lightning_efficient.structured.heads import find_heads
from lightning_efficient.structured.slim import tensors_by_name
from lightning_efficient.structured.trial import Trial
from lightning_efficient.structured.widths import Role, UntraceableError, Width, Widths

METHOD = "structured pruning"


@torch.inference_mode(False)
@torch.enable_grad()
def find_groups(
    model: nn.Module,
    example: Any,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    inexact: bool = False,
) -> Groups:
    """Find the units that can be cut out of a model: channels, hidden neurons, heads.

    Layers that make an output of the model are protected. Widths with parametrized, tied, frozen, recurrent or
    quantized tensors on them are refused, and so is whatever does not stand the trial.

    Args:
        model: Any module, in any mode; not touched, nor is the random state.
        example: A tensor, a tuple of positional or a dict of keyword arguments, or a function that calls the model. Two
            samples do.
        include: Globs over names of modules: groups that are made by at least one of them. None: all.
        exclude: Globs over names of modules: groups that are made by none of them.
        inexact: Offer groups, too, whose units are not gone when they are zero: LayerNorm or GroupNorm over the width
            (the residual width of a transformer), activations with f(0) ≠ 0. They are marked, with the reason.

    Returns:
        What was found, and what was refused and why.

    Raises:
        ValueError: The model cannot be copied, run in float64 or traced; or a matched weight has no values yet.
        NoMatchError: Nothing can be cut, or the globs match none of it; says what there is.
    """
    probe = _small(as_probe(model, example))
    try:
        twin = perturbed(float64_copy(model))
    except Exception as why:
        raise ValueError(f"{METHOD}: {type(model).__name__} cannot be copied to be tried on: {why}") from why
    modules = modules_by_name(model)
    with torch.random.fork_rng(devices=_devices(model)):
        widths = _widths(model, twin, probe)
        refused = _refusals(model, widths, _ran(twin, probe))
        chosen = partial(_chosen, refused=refused, include=include, exclude=exclude, modules=modules)
        found = _tried(Trial(twin, probe), model, widths, refused, chosen)
    if not inexact:
        for group in [group for group in found if not group.exact]:
            refused[group.name] = f"zeroing its units is not removing them: {group.note} (`inexact=True` allows it)"
        found = [group for group in found if group.exact]
    refused |= _lone_heads(modules, widths, found)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise NoMatchError(f"{METHOD}: nothing of {type(model).__name__} can be cut. {reasons or 'It has no layers.'}")
    order = {name: i for i, name in enumerate(modules)}
    return Groups({g.name: g for g in sorted(found, key=lambda g: order.get(g.name, 0))}, refused)


def _tried(
    trial: Trial,
    model: nn.Module,
    widths: Iterable[Width],
    refused: dict[str, str],
    chosen: Callable[[list[UnitGroup]], list[UnitGroup]],
) -> list[UnitGroup]:
    """The groups that stand the trial; the others' reasons go to ``refused``."""
    groups = [
        group
        for width in widths
        if not (width.refused or width.root in refused)
        for group in [_group(width, trial.model, refused)]
        if group is not None
    ]
    refused |= {width.root: width.refused for width in widths if width.refused}
    found = _heads(trial, model, refused, lambda group: chosen([group]))
    held = {(part.name, part.dim) for group in found for part in group.produced}
    # Channels of heads go as heads.
    groups = [group for group in groups if not any((s.name, s.dim) in held for s in group.produced)]
    for width in widths:
        if any((tensor, dim) in held for tensor, dim, _ in width.axes):
            refused.pop(width.root, None)
    return [*found, *trial.judge(chosen(groups), refused)]


def _widths(model: nn.Module, twin: nn.Module, probe: Probe) -> list[Width]:
    """Every width of the copy."""
    try:
        return list(Widths(twin, lambda: run_float64(twin, probe)))
    except UntraceableError as why:
        raise ValueError(
            f"{METHOD}: {type(model).__name__} cannot be traced: {why}. Pass the submodule that computes, and its "
            "own input, or another `example`."
        ) from why


def _lone_heads(
    modules: Mapping[str, nn.Module], widths: Iterable[Width], found: Iterable[UnitGroup]
) -> dict[str, str]:
    """Every ``nn.MultiheadAttention`` that keeps its heads → why they cannot go alone."""
    inside = {part.name.rpartition(".")[0] for group in found for part in group.produced}
    notes = {}
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and name not in inside:
            tensors = {f"{name}.{weight}" for weight in ("in_proj_weight", "q_proj_weight", "out_proj.weight")}
            home = next((w.root for w in widths if any(t in tensors for t, _, _ in w.axes)), None)
            notes[name] = (
                "nn.MultiheadAttention splits the width of its own input into heads, so a head can only go with as "
                "many channels of that width" + (f", and {home!r} keeps them all (see there)" if home else "")
            )
    return notes


def _small(probe: Probe) -> Probe:
    """Two samples of the example, where its tensors share a first axis."""
    sizes = {t.shape[:1] for t in tensors_in((probe.args, probe.kwargs))}
    if len(sizes) != 1 or (size := next(iter(sizes))) == () or size[0] <= 2:
        return probe

    def two(value: Any) -> Any:
        return value[:2] if isinstance(value, Tensor) else value

    return Probe(probe.label, mapped(probe.args, two), mapped(probe.kwargs, two))


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _ran(model: nn.Module, probe: Probe) -> set[str]:
    """Names of the modules that run on the example."""
    ran: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: ran.add(canonical_name(name)))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            run_float64(model, probe)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def _refusals(model: nn.Module, widths: Iterable[Width], ran: set[str]) -> dict[str, str]:
    """Root of a width → why it is not even tried."""
    reasons = _bad_tensors(model)
    modules = modules_by_name(model)
    # `nn.MultiheadAttention` reads its `out_proj` without calling it.
    within = tuple(f"{name}." for name in ran if isinstance(modules.get(name), nn.MultiheadAttention))
    silent = {
        (name, size): module
        for name, module in modules.items()
        if name not in ran and not name.startswith(within)
        for parameter in module.parameters(recurse=False)
        for size in parameter.shape[:2]
    }
    refused: dict[str, str] = {}
    for width in widths:
        for tensor, _, role in width.axes:
            if _bars(tensor, role, reasons):
                refused[width.root] = f"{tensor!r} is {reasons[tensor]}"
        unread = [name for name, size in silent if size == width.size and name not in width.readers]
        if unread and width.root not in refused:
            refused[width.root] = (
                f"{unread[0]!r} did not run on the example and may read it; pass an `example` that reaches it"
            )
    return refused


def _bars(tensor: str, role: Role, bad: Mapping[str, str]) -> bool:
    """Whether a tensor keeps its width as it is; what only reads it may be frozen."""
    return tensor in bad and not (role == "consume" and bad[tensor].startswith("frozen"))


def _bad_tensors(model: nn.Module) -> dict[str, str]:
    """Tensor → what is wrong with it."""
    bad: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in tensors_by_name(model).items():
        other = names.setdefault(id(tensor), name)
        if other != name:
            bad[name], bad[other] = f"the same tensor as {other!r} (tied)", f"the same tensor as {name!r} (tied)"
    for name, module in modules_by_name(model).items():
        own = [f"{name}.{n}" if name else n for n, _ in module.named_parameters(recurse=False)]
        if parametrize.is_parametrized(module):
            parts = [n for n, _ in module.named_parameters()]
            bad |= {f"{name}.{p}" if name else p: "parametrized (torch.nn.utils.parametrize)" for p in parts}
        elif any(n.endswith(("_g", "_orig")) for n in own):
            bad |= dict.fromkeys([*own, f"{name}.weight"], "recomputed at every forward by a hook")
    for name, parameter in model.named_parameters():
        if (reason := check_weight(name, parameter, METHOD)) is not None:
            bad.setdefault(canonical_name(name), reason)
    return bad


def _group(width: Width, model: nn.Module, refused: dict[str, str]) -> UnitGroup | None:
    """The units of a width as indices; None, with a reason, if they are not alike or only one."""
    units = width.units()
    if len(units) < 2:
        refused[width.root] = "all its channels are coupled with each other, so none can go alone"
        return None
    home = {channel: unit for unit, channels in enumerate(units) for channel in channels}
    present = tensors_by_name(model)
    slices = []
    for (tensor, dim, role), pairs in width.axes.items():
        entries: list[set[int]] = [set() for _ in units]
        for entry, channel in pairs:
            entries[home[channel]].add(entry)
        if len({len(found) for found in entries}) != 1 or tensor not in present:
            refused[width.root] = f"its units do not take equal parts of {tensor!r}"
            return None
        slices.append(Slice(tensor, dim, torch.tensor([sorted(found) for found in entries]), role))
    if not any(part.role == "consume" for part in slices):
        refused[width.root] = "no layer that can be cut reads it"
        return None
    return UnitGroup(width.root, len(units), tuple(slices), width.divisor)


def _heads(
    trial: Trial, model: nn.Module, refused: dict[str, str], chosen: Callable[[UnitGroup], list[UnitGroup]]
) -> list[UnitGroup]:
    """Attention heads that stand the trial, and what they are refused for."""
    bad = _bad_tensors(model)
    versions: dict[str, tuple[UnitGroup, UnitGroup]] = {}
    for sure, more in find_heads(trial.model, lambda: run_float64(trial.model, trial.probe)):
        wrong = [f"{part.name!r} is {bad[part.name]}" for part in sure.slices if _bars(part.name, part.role, bad)]
        if wrong:
            refused[sure.name] = wrong[0]
        elif chosen(sure):
            versions[sure.name] = (sure, more)
    reasons: dict[str, str] = {}
    found = trial.judge([sure for sure, _ in versions.values()], reasons)
    again = [more for name, (sure, more) in versions.items() if name in reasons and more.counts != sure.counts]
    for group in again:
        del reasons[group.name]
    refused |= reasons
    return [*found, *trial.judge(again, refused)]


def _chosen(
    groups: list[UnitGroup],
    refused: dict[str, str],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    modules: Mapping[str, nn.Module],
) -> list[UnitGroup]:
    """The groups that the globs name, without those of reference networks."""
    for argument, globs in (("include", include), ("exclude", exclude)):
        if isinstance(globs, str):
            raise TypeError(f"{METHOD}: {argument}={globs!r} is a string; write a list: {argument}=[{globs!r}].")
        for glob in globs or ():
            if not any(covers(glob, name) for name in modules):
                near = near_names(glob, modules)
                raise NoMatchError(
                    f"{METHOD}: `{argument}` glob {glob!r} matches no module name. Close: {near or list(modules)[1:4]}."
                )
    kept, idle = [], references(modules[""])
    for group in groups:
        makers = {part.name.rpartition(".")[0] for part in group.produced}
        if makers & idle:
            refused[group.name] = REFERENCE
        elif include is not None and not any(covers(glob, name) for glob in include for name in makers):
            refused[group.name] = "not covered by `include`"
        elif out := [glob for glob in exclude or () for name in makers if covers(glob, name)]:
            refused[group.name] = f"excluded by {out[0]!r}"
        else:
            kept.append(group)
    return kept
