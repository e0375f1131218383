"""Units that shrink to nothing, in a loop: the core of HESSOPruning, moved by the driver."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import parameters_by_name
from lightning_efficient.common.running import evaluating
from lightning_efficient.common.schema import OrNone, Record, TensorOf, check
from lightning_efficient.folding.probes import Probe
from lightning_efficient.loops.parts import Part, Run, Sites
from lightning_efficient.loops.processes import several
from lightning_efficient.structured.choice import chosen, scores_of
from lightning_efficient.structured.cost import COST, Cost
from lightning_efficient.structured.cuts import tensors_by_name
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import (
    GROUPS,
    Groups,
    check_groups,
    check_rounding,
    groups_as_plain,
    groups_from_plain,
)
from lightning_efficient.structured.hesso import (
    HESSO_STATE,
    PRUNED,
    SHRINKING,
    HessoConfig,
    HessoState,
    Plan,
    Pruner,
    shrink_factor,
)
from lightning_efficient.structured.marks import dropped_units, entries_of, parameters_of, without_idle
from lightning_efficient.structured.pretrained import calls_of
from lightning_efficient.structured.saliency import all_sums, over_processes
from lightning_efficient.structured.slim import apply_slim
from lightning_efficient.surgery.cuts import cut_states
from lightning_efficient.weightspace.mask import forget
from lightning_efficient.weightspace.unit_mask import UnitMask, drop_entries, scale_entries

_LOG = logging.getLogger(__name__)


class HessoPart(Part):
    """See :class:`~lightning_efficient.HESSOPruning`; without its cycles, which are undone."""

    method = "hesso_pruning"
    example_for = "what goes together is found while the model runs"
    lengths = (3,)
    progress_schema = Record({"groups": GROUPS, "cost": OrNone(COST), "hesso": HESSO_STATE})
    complains = False

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        target: float = 0.5,
        unit: Literal["groups", "params", "macs"] = "groups",
        start: int | float = 0.1,
        duration: int | float = 0.2,
        periods: int | None = None,
        group_divisible: int = 1,
        cric: Literal[False] = False,
        saliency: dict[str, float] | None = None,
        inexact: bool = False,
        round_to: int = 1,
        uniform: bool = False,
        published: bool = False,
    ) -> None:
        super().__init__(include, exclude)
        if cric:
            raise ValueError(
                "hesso_pruning: `cric=True` tries cycles and undoes them, and a loop does not say what else has to go "
                "back with them. Use HESSOPruning in a Lightning Trainer, or cric=False."
            )
        own = (target, unit, start, duration, periods, group_divisible, saliency, uniform, published)
        self.options = HessoConfig(*own)
        self.inexact, self.round_to = inexact, check_rounding(round_to)
        self.groups, self.state = Groups(), HessoState()
        self._cost: dict[str, Any] | None = None
        self._params: dict[str, nn.Parameter] = {}
        self._pruner: Pruner | None = None

    @property
    def plan(self) -> Plan:
        """The schedule."""
        first, span, periods = self.steps
        return Plan(first, span, periods, self.options.published)

    def resolve(self, total: int | None) -> tuple[int, ...]:
        """First step, span and periods."""
        plan = self.options.plan(total)
        return plan.first, plan.span, plan.periods

    def sites(self, run: Run) -> Sites:
        """The weights that make units."""
        saved = run.progress.get(self.method)
        groups, cost = self._find(run) if saved is None else (groups_from_plain(saved["groups"]), saved["cost"])
        self._take(run, without_idle(groups, run.model, [run.optimizer]), cost)
        self.state = HessoState.of(self.groups)
        found = self.groups.found.items()
        widths = {name: f"{group.units} units in {len(group.slices)} tensors" for name, group in found}
        self.change = Change(self.method, targets=widths, skipped=dict(self.groups.refused))
        return {name: (param, UnitMask()) for name, param in self._params.items()}

    def _find(self, run: Run) -> tuple[Groups, dict[str, Any] | None]:
        call = run.needs_example(self)
        given = call.args if not call.kwargs else dict(call.kwargs)
        groups = find_groups(run.model, given, self.include, self.exclude, inexact=self.inexact, round_to=self.round_to)
        if self.options.unit != "macs":
            return groups, None
        counted = Cost.macs(run.model, groups.found, lambda: call.run(run.model))
        return groups, {"amounts": counted.amounts, "fixed": counted.fixed}

    def _take(self, run: Run, groups: Groups, data: dict[str, Any] | None) -> None:
        """Work with these groups, and what compute is counted by."""
        self.groups, self._cost, self._params = groups, data, parameters_of(groups, run.model)
        cost = None
        if self.options.unit == "params":
            cost = Cost.parameters(run.model, groups.found)
        elif data is not None:
            shapes = {name: tuple(p.shape) for name, p in parameters_by_name(run.model).items()}
            cost = Cost(data["amounts"], shapes, groups.found, data["fixed"])
        self._pruner = Pruner(groups, self.options.unit, self.options.group_divisible, cost, self.options.uniform)
        self._pruner.check(self.options.target)

    def before_step(self, run: Run, step: int) -> None:
        """Choose units at the start of a period, by the weights and gradients of this step."""
        period = self.plan.due(step, self.state.chosen)
        if period is None:
            return
        grads = {name: param.grad for name, param in self._params.items()}
        sums = over_processes(all_sums(self.groups.found.values(), self._params, grads), self._params)
        shapes = {name: param.shape for name, param in self._params.items()}
        scores = scores_of(self.groups, sums, shapes, self.options, self.state)
        if scores is not None:  # else the next step is tried
            assert self._pruner is not None
            units = chosen(self._pruner, self.options, self.plan, self.state, scores, period)
            self.state.choose(_agreed(units, next(iter(self._params.values())).device), period, step)

    @torch.no_grad()
    def after_step(self, run: Run, step: int) -> None:
        """Units on their way are multiplied by their factor, and those at zero are pruned."""
        units = self.state.marked(SHRINKING)
        if not any(bool(where.any()) for where in units.values()):
            return
        period = self.state.chosen - 1
        factor = shrink_factor(self.plan.begin(period), self.plan.end(period), self.state.shrunk, step)
        if factor == 1.0:
            return
        entries = entries_of(self.groups, units, self._params)
        scale_entries([(run.boundary.sites[name], axes) for name, axes in entries.items()], factor)
        self.state.shrunk = step
        if factor == 0.0:
            self.state.commit()
            for name, axes in entries.items():
                drop_entries(run.boundary.sites[name], self._mask(name), axes)
            gone = {param: self._mask(n).dropped(param.detach()) for n, param in self._params.items() if n in entries}
            forget([run.optimizer], gone)

    def _mask(self, name: str) -> UnitMask:
        return cast(UnitMask, self.transforms[name])

    def progress(self) -> dict[str, Any]:
        """The groups, which a resumed run does not look for again, and where the schedule is."""
        return {"groups": groups_as_plain(self.groups), "cost": self._cost, "hesso": self.state.as_plain()}

    def check(self, run: Run, saved: Mapping[str, Any], step: int) -> None:
        """What is known of units is of this model's, what masks drop is what is gone, and nothing is ahead of time."""
        progress, where = saved["progress"], f"the driver's progress of {self.method}"
        groups, hesso = groups_from_plain(progress["groups"]), progress["hesso"]
        check_groups(groups, {n: tuple(t.shape) for n, t in tensors_by_name(run.model).items()}, self.round_to)
        units = {name: TensorOf(torch.int8, shape=(group.units,)) for name, group in groups.found.items()}
        check(hesso["status"], Record(units), f"{where} ['hesso']['status']")
        if (progress["cost"] is not None) != (self.options.unit == "macs"):
            raise ValueError(f"{where} ['cost'] goes with unit='macs' and no other.")
        if hesso["chosen"] > saved["schedule"][2] or hesso["shrunk"] > step:
            raise ValueError(f"{where} ['hesso'] is further than step {step} of its schedule {saved['schedule']}.")
        params = parameters_of(groups, run.model)
        for name, group in groups.found.items():
            if not torch.equal(dropped_units(group, saved["weights"], params), hesso["status"][name] == PRUNED):
                raise ValueError(f"{where} ['hesso'] says that other units of {name!r} are gone than its masks drop.")

    def resume(self, run: Run, progress: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._take(run, groups_from_plain(progress["groups"]), progress["cost"])
        self.state = HessoState.from_plain(progress["hesso"])

    def finish(self, run: Run, step: int, batches: Iterable[Any] | None, forward: Any) -> str:
        """Cut out what is gone: the model is smaller from now on, and what the optimizer remembers."""
        gone = self.state.marked(PRUNED)
        keep = {name: (~where).nonzero().flatten().tolist() for name, where in gone.items() if bool(where.any())}
        if keep:
            groups = replace(self.groups, calls=self.groups.calls or _calls(run))
            change = apply_slim(run.model, keep, groups)
            cut_states([run.optimizer], change.cuts)
            _LOG.info(change.report())
        shrinking = any(bool(where.any()) for where in self.state.marked(SHRINKING).values())
        if not shrinking and self.state.chosen == self.plan.periods:
            return ""
        return (
            f"hesso_pruning ends at step {step}, in period {self.state.chosen} of {self.plan.periods}, and units that "
            "were shrinking stay, as small as they are"
        )


def _calls(run: Run) -> Mapping[str, Probe]:
    """How models of Hugging Face's are called, which no file says: by it the config of the smaller one is tried."""
    if (call := run.example) is None:
        return {}
    with evaluating(run.model):
        return calls_of(run.model, lambda: call.run(run.model))


def _agreed(units: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """The choice of the first process: weights are equal on all of them, and scores almost surely."""
    if not several():
        return units
    flat = torch.cat([where.to(torch.uint8) for where in units.values()]).to(device)
    torch.distributed.broadcast(flat, 0)
    parts = torch.split(flat.bool().cpu(), [len(where) for where in units.values()])
    return dict(zip(units, parts, strict=True))
