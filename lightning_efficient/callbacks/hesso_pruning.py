"""``HESSOPruning``: train once, and units that turn out redundant shrink to nothing on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.common.schema import MapOf, OrNone, Record, TensorOf, Text, check
from lightning_efficient.common.weights import trained_by
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.lifecycle.units import FOUND, UnitPruningCallback
from lightning_efficient.lifecycle.weights import Plan as WeightPlan
from lightning_efficient.structured.choice import chosen, scores_of
from lightning_efficient.structured.cost import Cost
from lightning_efficient.structured.cric import CricPlan
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
from lightning_efficient.structured.saliency import all_sums, over_processes
from lightning_efficient.trainer.cycles import CYCLES, Cycles, cycles_schema
from lightning_efficient.weightspace import Boundary, Transform
from lightning_efficient.weightspace.unit_mask import scale_entries


class HESSOPruning(UnitPruningCallback):
    """Structured pruning inside one training run (HESSO, Chen et al. 2024, arXiv 2409.09085), around any optimizer.

    After a warm-up the run has ``periods``: at the start of each, the units (channels, hidden neurons, heads) with the
    lowest saliency are chosen, from the weights and the gradients of that step; over its steps they shrink along a
    straight line to exactly zero, while everything, they included, goes on learning. What is left then trains to the
    end of the run. The network keeps its size during ``fit``; ``export`` gives the smaller one. Logs
    ``efficient/hesso/removed`` (the share that is gone, of ``unit``) and ``efficient/hesso/shrinking`` (units on their
    way).

    The saliency is that of the network's weights and of the gradient of the step (complete over accumulated batches
    and processes, before clipping), not of the direction that the optimizer makes of it: Taylor scores are about the
    loss, and not every optimizer has a momentum.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names: groups made by one of them. ``None``: all.
        exclude: Globs over module names: groups made by none of them.
        target: Share that is gone in the end, in (0, 1).
        unit: Of what: ``"groups"`` (units, all the same), ``"params"`` or ``"macs"`` of the whole network.
        start: When the first units are chosen: steps (int) or fraction of the run (float).
        duration: How long it takes until the last are gone, likewise.
        periods: In how many portions; ``None``: 10, or as many as ``duration`` has steps.
        group_divisible: As many units as a multiple of this stay in every group that loses any.
        cric: Find out what is redundant in cycles that are tried and undone (Corrective Redundancy Identification):
            ``periods`` are then the most cycles there are, all within ``duration``, and what was chosen goes at once
            after the last. Costs a copy of the training state, the steps that are undone, and three forwards a group.
        saliency: Criterion → weight, of ``magnitude``, ``avg_magnitude``, ``cosine``, ``taylor1`` and ``taylor2``;
            ``None``: 0.2 each.
        inexact: Also prune groups whose zeros are not gone (LayerNorm over the residual width, ...).
        round_to: Every tensor of a group that loses units keeps a multiple of so many channels, such as 8.
        uniform: Groups of as many units (heads, or others) lose as many, so that widths that are equal stay equal, as
            the ``config`` of a model of Hugging Face's must have it.
        published: Choose and shrink as the published code does, to reproduce it; the docs say what differs.

    Raises:
        ValueError: An argument is out of range, the schedule does not fit into the run, nothing can be pruned, or the
            target cannot be reached.
    """

    method = "hesso_pruning"
    sharded = True
    progress_schema = Record(
        {**FOUND, "hesso": HESSO_STATE, "sums": MapOf(Text(), MapOf(Text(), TensorOf())), "cycles": OrNone(CYCLES)}
    )

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        target: float = 0.5,
        unit: Literal["groups", "params", "macs"] = "groups",
        start: int | float = 0.1,
        duration: int | float = 0.2,
        periods: int | None = None,
        group_divisible: int = 1,
        cric: bool = False,
        saliency: dict[str, float] | None = None,
        inexact: bool = False,
        round_to: int = 1,
        uniform: bool = False,
        published: bool = False,
    ) -> None:
        super().__init__(enabled, include, exclude, inexact, round_to)
        if cric and published:
            raise ValueError("`published=True` is about HESSO without CRIC; leave out `cric` or `published`.")
        own = (target, unit, start, duration, periods, group_divisible, saliency, uniform, published)
        self.options, self.cric = HessoConfig(*own), cric
        self.hesso = HessoState()
        self._cycles: Cycles | None = None
        self._plan: Plan | None = None
        self._pruner: Pruner | None = None
        # Parameter → sums over its units: of the last backward, and of parameters whose optimizer has come to its step.
        self._latest: dict[str, dict[str, Tensor]] = {}
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._active: dict[str, dict[int, Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        weights = self.options.saliency
        own = {"saliency": None if weights is None else dict(weights), "cric": self.cric}
        return super().config() | vars(self.options) | own

    def wants_macs(self) -> bool:
        """Whether multiply-accumulates have to be counted."""
        return self.options.unit == "macs"

    @property
    def keep(self) -> dict[str, list[int]]:
        """Group → indices of the units that stay, of groups that have lost any."""
        gone = self.hesso.marked(PRUNED)
        return {name: (~where).nonzero().flatten().tolist() for name, where in gone.items() if bool(where.any())}

    # -- life cycle ------------------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """Where the schedule is."""
        cycles = None if self._cycles is None else self._cycles.as_plain()
        return super().progress() | {"hesso": self.hesso.as_plain(), "sums": self._sums, "cycles": cycles}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on where the run that is resumed was."""
        super().resume(progress)
        self.hesso = HessoState.from_plain(progress["hesso"])
        self._sums = {name: dict(sums) for name, sums in progress["sums"].items()}
        if progress["cycles"] is not None and self.standing.schedule is not None:
            self._cycles = Cycles.from_plain(CricPlan(*self.standing.schedule), progress["cycles"])

    def rewound(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shrink what was shrinking then."""
        super().rewound(trainer, pl_module)
        self._latest = {}
        self._follow()

    def check_progress(self, state: Mapping[str, Any], step: int) -> None:
        """What is known of units is of the groups' units, and no further than the steps that are done."""
        super().check_progress(state, step)
        hesso, cycles, schedule = state["hesso"], state["cycles"], state["standing"]["schedule"]
        found = state["groups"]["found"]
        where = f"the checkpoint's state of {self.state_key}, field"
        units = {name: TensorOf(torch.int8, shape=(group["units"],)) for name, group in found.items()}
        check(hesso["status"], Record(units), f"{where} ['hesso']['status']", RecipeError)
        made = {part["name"] for group in found.values() for part in group["slices"]}
        if strangers := [name for name in state["sums"] if name not in made]:
            self.refuse("['sums']", "of parameters of the groups", strangers[0])
        periods = schedule[2] if schedule else 0
        if hesso["chosen"] > periods:
            self.refuse("['hesso']['chosen']", f"up to {periods} periods", hesso["chosen"])
        if hesso["shrunk"] > step:
            self.refuse("['hesso']['shrunk']", f"up to step {step}", hesso["shrunk"])
        if (cycles is not None) != (self.cric and schedule is not None):
            self.refuse("['cycles']", "there" if self.cric else "null", cycles)
        if cycles is not None:
            sizes = {name: group["units"] for name, group in found.items()}
            check(cycles, cycles_schema(CricPlan(*schedule), sizes, step), f"{where} ['cycles']", RecipeError)

    def restart(self) -> None:
        """Begin the schedule anew; units that the model has lost stay gone."""
        super().restart()
        self._plan, self._sums, self._cycles, self.hesso = None, {}, None, HessoState()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything has changed."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.enabled and self.cric and not pl_module.automatic_optimization:
            raise ValueError(
                "cric=True compares losses that `training_step` returns, and under manual optimization it steps "
                "instead. Use cric=False."
            )

    def check_sharded(self, pl_module: LightningModule) -> None:
        """Refuse cycles: each process would probe them on samples of its own."""
        if self.cric:
            raise ValueError(
                "HESSOPruning(cric=True) does not support ModelParallelStrategy: its cycles compare losses of a batch, "
                "of which every process has another part. Use cric=False, or train on one device or with 'ddp'."
            )

    def plan(self, pl_module: LightningModule) -> WeightPlan:
        """Choose and check the parameters, without changing anything."""
        plan = super().plan(pl_module)
        if self.groups.found:
            cost = self._cost(pl_module)
            self._pruner = Pruner(
                self.groups, self.options.unit, self.options.group_divisible, cost, self.options.uniform
            )
            self._pruner.check(self.options.target)
            if not self.standing.resumed:
                self.hesso = HessoState.of(self.groups, self.gone(pl_module))
            else:
                self._check_status()
        return plan

    def _check_status(self) -> None:
        """As many units are gone or going as the periods until now ask for."""
        assert self._pruner is not None
        chosen, periods = self.hesso.chosen, self.standing.schedule[2] if self.standing.schedule else 1
        moving = any(bool(where.any()) for where in self.hesso.marked(SHRINKING).values())
        share, lost = self.options.target * chosen / periods, self.hesso.lost()
        if self.options.published:  # whose rounding leaves units over
            right = sum(lost.values()) <= math.ceil(share * self._pruner.total)
        else:
            right = self._pruner.fewest(lost, share) if moving else self._pruner.reached(lost, share)
        if not right:
            expected = f"of {share:.1%} of the {self.options.unit} that are gone or going, after {chosen} period(s)"
            self.refuse("['hesso']['status']", expected, lost)

    def _cost(self, pl_module: LightningModule) -> Cost | None:
        if self.options.unit == "groups":
            return None
        return self._macs() if self.wants_macs() else Cost.parameters(pl_module, self.groups.found)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule."""
        super().on_train_start(trainer, pl_module)
        if not self.enabled:
            return
        if self._cycles is not None and self._boundary is not None:  # of a run that is resumed
            where = f"the checkpoint's state of {self.state_key}, field"
            self._cycles.check(trainer, pl_module, self._sites(), where, RecipeError)
        first, span, periods = self.standing.fix(trainer, type(self).__name__, self._resolve, lambda s: s[0] + s[1])
        self._plan = Plan(first, span, periods, self.options.published)
        if self.cric:
            self._cycles = self._cycles or Cycles(CricPlan(self._plan.first, self._plan.span, self._plan.periods))
            self._follow()

    def _resolve(self, total: int | None) -> tuple[int, ...]:
        plan = self.options.plan(total)
        return plan.first, plan.span, plan.periods

    def _follow(self) -> None:
        """Find the entries of the units that shrink now; of parameters that are cut, of what is here."""
        cycles = self._cycles
        trying = cycles is not None and cycles.decided is None
        self._active = self._entries_here(cycles.state.active if trying and cycles else self.hesso.marked(SHRINKING))

    def _begin(self, pl_module: LightningModule, boundary: Boundary) -> None:
        super()._begin(pl_module, boundary)
        self._follow()
        # After the boundary's own hooks: parameters hold the network's weights again.
        after = partial(self._shrink, pl_module.trainer, pl_module)
        self._handles = [optimizer.register_step_post_hook(after) for optimizer in pl_module.trainer.optimizers]

    def _release(self, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._latest, self._active = [], {}, {}
        super()._release(pl_module)

    # -- pruning ---------------------------------------------------------------------------------------------------

    def _due(self, step: int) -> int | None:
        """The period whose units are to be judged at this step, if any."""
        if self._boundary is None or self._plan is None:
            return None
        if self._cycles is not None:
            return 0 if self._cycles.looking(step) else None
        return self._plan.due(step, self.hesso.chosen)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gradients of the network's weights, before anything is done to them; those of the last micro-batch stay."""
        if self._due(self.step(trainer)) is not None:
            grads = {name: self._sites()[name].gradient for name in self._params}
            self._latest = all_sums(self.groups.found.values(), self._params, grads)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Choose units at the start of a period, then on with the step."""
        period = self._due(self.step(trainer))
        if period is not None and self._latest:
            # Of several optimizers each has cleared the gradients of its own parameters only.
            mine = trained_by(optimizer)
            here = {name: sums for name, sums in self._latest.items() if id(self._params[name]) in mine}
            self._sums |= over_processes(here, self._params)
            if self._sums.keys() == self._latest.keys():
                self._judge(trainer, period)
        self._latest = {}
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def _judge(self, trainer: Trainer, period: int) -> None:
        scores = scores_of(self.groups, self._sums, self._shapes, self.options, self.hesso)
        self._sums = {}
        if scores is not None:  # else the next step is tried
            if self._cycles is not None:
                self._cycles.state.observe(scores, self._wanted(scores))
            else:
                self._pick(trainer, scores, period)

    def _wanted(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The units to go beside those gone, so that the target is reached."""
        assert self._pruner is not None
        return self._pruner.choose(scores, self.hesso.marked(SHRINKING, PRUNED), self.options.target)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """CRIC: begin a cycle, or decide."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        step, cycles = self.step(trainer), self._cycles
        if self._boundary is None or self._plan is None or cycles is None or not cycles.due(step):
            return
        if cycles.snapshot is None:
            cycles.keep(trainer, pl_module, self._sites())
            cycles.probe(trainer, pl_module, batch, self.groups, self._params)
        else:
            cycles.go_back(trainer, pl_module, self._sites(), step)
        cycles.state.trial = trainer.strategy.broadcast(cycles.state.trial)  # as for single choices: one decides
        if cycles.state.over(self._plan.periods):
            self._pick(trainer, cycles.decide(step), self._plan.periods - 1)
            cycles.say(self._plan.periods)
        else:
            cycles.state.begin()
            self.hesso.shrunk = step
            self._follow()

    def _pick(self, trainer: Trainer, scores: Mapping[str, Tensor], period: int) -> None:
        assert self._plan is not None
        assert self._pruner is not None
        units = chosen(self._pruner, self.options, self._plan, self.hesso, scores, period)
        # Weights are equal on all processes, and scores almost surely: one of them decides.
        units = trainer.strategy.broadcast(units)
        self.hesso.choose(units, period, self.step(trainer))
        self._follow()

    @torch.no_grad()
    def _shrink(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """After an optimizer's step: redundant units are multiplied by their factor, and those at zero are pruned."""
        if not self._active or self._plan is None:
            return
        begin, end = self._interval(self._plan)
        factor = shrink_factor(begin, end, self.hesso.shrunk, done := self.step(trainer) + 1)
        if factor == 1.0:
            return
        scale_entries([(self._sites()[name], axes) for name, axes in self._active.items()], factor)
        self.hesso.shrunk = done
        if factor == 0.0:
            self._active = {}
            if self._cycles is None or self._cycles.decided is not None:
                units = self.hesso.marked(SHRINKING)
                self.hesso.commit()
                self._drop(trainer, pl_module, units)

    def _interval(self, plan: Plan) -> tuple[int, int]:
        """Steps done when the present shrinking begins and ends."""
        if self._cycles is not None:
            return self._cycles.interval()
        return plan.begin(self.hesso.chosen - 1), plan.end(self.hesso.chosen - 1)

    def quantities(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """The share that is gone, and how many units are on their way."""
        assert self._pruner is not None
        gone = {name: int(where.sum()) for name, where in self.hesso.marked(PRUNED).items()}
        shrinking = sum(int(where.sum()) for where in self.hesso.marked(SHRINKING).values())
        return {"removed": torch.tensor(self._pruner.removed(gone)), "shrinking": torch.tensor(float(shrinking))}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was pruned, and if the schedule was not finished."""
        if self._boundary is None or self._pruner is None or self._plan is None:
            return
        removed = self._pruner.removed({name: int(where.sum()) for name, where in self.hesso.marked(PRUNED).items()})
        self._say_widths(removed, self.options.unit)
        super().on_train_end(trainer, pl_module)

    def unfinished(self) -> str:
        """For the report of a schedule that the run did not finish."""
        assert self._plan is not None
        return (
            f"it is in period {self.hesso.chosen} of {self._plan.periods}, and units that were shrinking stay, as "
            "small as they are."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit."""
        return super().__getstate__() | {"_handles": [], "_latest": {}, "_active": {}}
