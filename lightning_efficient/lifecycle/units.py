"""What the callbacks that prune units share: groups, masks on the optimizer boundary, averaged copies, reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast
from weakref import ref

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import parameters_by_name
from lightning_efficient.common.schema import OrNone, Schema
from lightning_efficient.common.weights import check_values
from lightning_efficient.lifecycle.asking import asked
from lightning_efficient.lifecycle.cuts import mark_zeroed
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.lifecycle.state import attachment, set_zeroed
from lightning_efficient.lifecycle.strategies import is_sharded
from lightning_efficient.lifecycle.weights import Plan, WeightSpaceCallback, no_model
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
from lightning_efficient.structured.marks import dropped_units, entries_of, parameters_of, without_idle
from lightning_efficient.structured.slim import zero_units
from lightning_efficient.trainer.averages import prune_copies
from lightning_efficient.trainer.example import all_steps_of, example_of, first_batch
from lightning_efficient.weightspace import Boundary, Site, Transform
from lightning_efficient.weightspace.layout import Layout
from lightning_efficient.weightspace.mask import forget
from lightning_efficient.weightspace.sums import run
from lightning_efficient.weightspace.unit_mask import UnitMask, drop_entries

# Of what a resumed run does not look for again.
FOUND: dict[str, Schema] = {"groups": GROUPS, "cost": OrNone(COST)}


class UnitPruningCallback(WeightSpaceCallback):
    """Base of the callbacks that prune units: channels, hidden neurons, heads.

    During ``fit`` the network keeps its size and pruned units are exact zeros, in the model, in the optimizer's memory
    and in averaged copies; cutting them out is ``export``'s. The groups are found once, when training begins, by
    running the network on two samples of the first batch; resumed runs read them from the checkpoint.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names: groups made by one of them. ``None``: all.
        exclude: Globs over module names: groups made by none of them.
        inexact: Also prune groups whose zeros are not gone (LayerNorm over the residual width, ...).
        round_to: Every tensor of a group that loses units keeps a multiple of so many channels.
    """

    transform = UnitMask

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        inexact: bool = False,
        round_to: int = 1,
    ) -> None:
        super().__init__(enabled, include, exclude)
        self.inexact, self.round_to = inexact, check_rounding(round_to)
        self.groups = Groups()
        self._cost_data: dict[str, Any] | None = None
        self._params: dict[str, nn.Parameter] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._found_in: Callable[[], object] = no_model

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return super().config() | {"inexact": self.inexact, "round_to": self.round_to}

    @property
    def keep(self) -> dict[str, list[int]]:
        """Group → indices of the units that stay, of groups that have lost any; what physical removal takes."""
        raise NotImplementedError

    # -- groups ----------------------------------------------------------------------------------------------------

    def wants_macs(self) -> bool:
        """Whether multiply-accumulates have to be counted."""
        return False

    @property
    def needs_whole(self) -> bool:
        """To find the groups."""
        return True

    def _check_groups(self, pl_module: LightningModule) -> None:
        """The groups of a file are about this model."""
        try:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors_by_name(pl_module).items()}
            check_groups(self.groups, shapes, self.round_to)
        except ValueError as error:
            raise RecipeError(f"the checkpoint's state of {self.state_key}, field ['groups']: {error}") from error

    def _choose(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, tuple[nn.Parameter, Transform]]:
        """Find the groups, or take those of the run that is resumed; the units that are gone the masks drop."""
        shapes = _shapes(pl_module)
        if self.standing.resumed:
            self._check_groups(pl_module)
        elif self._found_in() is not pl_module or self._shapes != shapes:
            find = partial(self._find, trainer)
            self.groups, self._cost_data = asked(type(self).__name__, trainer, pl_module, first_batch(trainer), find)
        self._shapes, self._found_in = shapes, ref(pl_module)
        chosen = super()._choose(trainer, pl_module)
        if self.standing.resumed:
            masks, keep, promised = self._saved(pl_module), self.keep, self.gone(pl_module)
            for name, group in self.groups.found.items():
                stay = torch.zeros(group.units, dtype=torch.bool)
                stay[keep.get(name, list(range(group.units)))] = True
                dropped = dropped_units(group, {n: masks[n] for n in chosen if n in masks}, self._params)
                if bool((dropped == stay).any()) or bool((promised[name] & stay).any()):
                    raise RecipeError(
                        f"the checkpoint's state of {self.state_key} should keep {(~dropped).nonzero().tolist()[:4]} "
                        f"... of {name!r}, which the masks in its recipe do, and what slim says is zero should be "
                        f"gone; it keeps {stay.nonzero().tolist()[:4]} ..."
                    )
        return chosen

    def gone(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Group → bool, ``(units,)``: units that are zero in a model for good; the model knows them."""
        return zero_units(self.groups, attachment(pl_module).zeroed)

    def _find(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> tuple[Groups, dict[str, Any] | None]:
        find = partial(
            find_groups, include=self.include, exclude=self.exclude, inexact=self.inexact, round_to=self.round_to
        )
        steps = all_steps_of(trainer, pl_module, batch)
        try:
            groups = find(steps.model, steps.args)
        except ValueError as error:
            # A step that takes gradients or steps an optimizer itself cannot be followed. The calls that it makes of
            # the networks can: what one of them returns then counts as an output, and keeps its width.
            try:
                example = example_of(trainer, pl_module, "fit", batch)
                groups = find(example.model, example.args)
            except ValueError:
                raise error from None
            rank_zero_info(
                f"{type(self).__name__}: the steps of {type(pl_module).__name__} cannot be followed as a whole, so "
                "widths between its networks are left alone."
            )
        if steps.note:
            groups = replace(groups, notes=(*groups.notes, steps.note))
        if is_sharded(trainer):
            groups = replace(groups, calls={})  # which only a model that can be cut here has a use for
        if not self.wants_macs():
            return groups, None
        try:
            example = example_of(trainer, pl_module, "fit", batch)
        except ValueError:  # it calls no network of its own, or runs in training mode only
            example = steps
        cost = Cost.macs(example.model, groups.found, lambda: example.model(*example.args))
        return groups, {"amounts": cost.amounts, "fixed": cost.fixed}

    def _macs(self) -> Cost:
        """What the widths cost in multiply-accumulates."""
        assert self._cost_data is not None
        shapes = {name: tuple(shape) for name, shape in self._shapes.items()}
        return Cost(self._cost_data["amounts"], shapes, self.groups.found, self._cost_data["fixed"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse shards, with the order that works; then as every callback."""
        if self.enabled and stage == "fit" and is_sharded(trainer) and not self.sharded:
            name, strategy = type(self).__name__, type(trainer.strategy).__name__
            raise ValueError(
                f"{name} does not support {strategy}: it needs whole parameters on every process "
                "to find what goes together. Prune first, on one device or with 'ddp', and shard the smaller network "
                f"that `export` makes, or `cut` leaves; or switch it off with {name}(enabled=False)."
            )
        super().setup(trainer, pl_module, stage)

    def plan(self, pl_module: LightningModule) -> Plan:
        """Choose and check the parameters, without changing anything."""
        if not self.groups.found:  # asked before any training: `lightning-efficient targets`
            example = getattr(pl_module, "example_input_array", None)
            if example is None:
                raise ValueError(
                    "units are found while the model runs, and this one has no `example_input_array` to run on."
                )
            return Plan(change=_change(self.method, find_groups(pl_module, example, self.include, self.exclude)))
        self.groups = without_idle(self.groups, pl_module, pl_module.trainer.optimizers)
        self._params = parameters_of(self.groups, pl_module)
        sites = {name: (param, UnitMask) for name, param in self._params.items()}
        return Plan(dict(sites), _change(self.method, self.groups))

    # -- masks -----------------------------------------------------------------------------------------------------

    def _sites(self) -> dict[str, Site]:
        assert self._boundary is not None
        return self._boundary.sites

    def _entries(self, units: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Parameter → axis → entries of the marked units."""
        return entries_of(self.groups, units, self._params)

    def _entries_here(self, units: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Likewise; of a parameter that is cut, those that are here, counted from the beginning of its part."""
        entries = self._entries(units)
        layouts = {name: Layout.find(name, self._params[name]) for name in entries}
        return {
            n: {dim: layouts[n].positions(dim, where) for dim, where in axes.items()} for n, axes in entries.items()
        }

    def _drop(self, trainer: Trainer, pl_module: LightningModule, units: Mapping[str, Tensor]) -> None:
        """Prune units for good: weights, memory of the optimizers and averaged copies alike."""
        entries = self._entries(units)
        for name, axes in entries.items():
            drop_entries(self._sites()[name], cast(UnitMask, self._transforms[name]), axes)
        masks = {name: cast(UnitMask, transform) for name, transform in self._transforms.items()}
        dropped = {name: mask.dropped(self._sites()[name].weight) for name, mask in masks.items()}
        forget(trainer.optimizers, {self._params[name]: dropped[name] for name in entries})
        prune_copies(trainer, pl_module, dropped)
        mark_zeroed(pl_module, self.keep, self.groups)

    def _begin(self, pl_module: LightningModule, boundary: Boundary) -> None:
        super()._begin(pl_module, boundary)
        for name, transform in self._transforms.items():
            if not run([transform.fits(self._sites()[name].weight, 0.0)])[0]:  # weights from elsewhere
                drop_entries(self._sites()[name], cast(UnitMask, transform), {})
        # Units that the model has lost, perhaps to another callback of this kind: from now on this one holds them.
        for name, axes in self._entries(self.gone(pl_module)).items():
            drop_entries(self._sites()[name], cast(UnitMask, self._transforms[name]), axes)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """The arguments, and the units that stay."""
        return self.config() | {"keep": self.keep}

    def progress(self) -> dict[str, Any]:
        """The groups, which a resumed run does not look for again."""
        return {"groups": groups_as_plain(self.groups), "cost": self._cost_data}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Take over the groups of the run that is resumed."""
        self.groups, self._cost_data = groups_from_plain(progress["groups"]), progress["cost"]

    def rewound(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the model says is zero is what was then."""
        super().rewound(trainer, pl_module)
        if self.keep:
            mark_zeroed(pl_module, self.keep, self.groups)
        else:
            set_zeroed(pl_module, None)

    def check_progress(self, state: Mapping[str, Any], step: int) -> None:
        """What compute is counted by is there."""
        super().check_progress(state, step)
        if (state["cost"] is not None) != self.wants_macs():
            self.refuse("['cost']", "there, as compute is counted" if self.wants_macs() else "null", state["cost"])

    def _report(self) -> None:
        """Every model has widths that cannot be cut, its outputs first of all: a report, not a warning."""
        if self.change is not None:
            rank_zero_info(self.change.report(examples=8))

    def _say_widths(self, removed: float, unit: str) -> None:
        kept = self.keep
        left = {name: len(kept.get(name, range(group.units))) for name, group in self.groups.found.items()}
        widths = [f"{name} {group.units} -> {left[name]}" for name, group in self.groups.found.items()]
        shown = ", ".join(widths[:8]) + (f", ... {len(widths) - 8} more" if len(widths) > 8 else "")
        whole = "units" if unit == "groups" else unit
        rank_zero_info(
            f"{type(self).__name__}: {removed:.1%} of the {whole} pruned; units left: {shown}. The network is as large "
            "as before until `lightning_efficient.export` cuts them out."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit, so that ``ddp_spawn`` can send the callback to its processes."""
        return super().__getstate__() | {"_params": {}, "_found_in": no_model}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    parameters = parameters_by_name(model)
    for name, param in parameters.items():
        check_values(name, param)
    return {name: param.shape for name, param in parameters.items()}


def _change(method: str, groups: Groups) -> Change:
    targets = {name: f"{group.units} units in {len(group.slices)} tensors" for name, group in groups.found.items()}
    return Change(method, targets=targets, skipped=dict(groups.refused))
