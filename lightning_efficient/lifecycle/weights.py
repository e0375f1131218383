"""When a weight-space method acts inside a Trainer; what it does stands in :mod:`lightning_efficient.weightspace`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import ref

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import REFERENCE
from lightning_efficient.common.registry import METHODS
from lightning_efficient.common.shards import gather_anew
from lightning_efficient.common.weights import trained_by
from lightning_efficient.lifecycle.base import EfficientCallback, peers
from lightning_efficient.lifecycle.hooks import hook_files
from lightning_efficient.lifecycle.recipe import Entry, RecipeError
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.lifecycle.strategies import finders, is_sharded, misplaced_states
from lightning_efficient.lifecycle.structural import rebind_all
from lightning_efficient.surgery.optimizer import add_parameters
from lightning_efficient.surgery.schedulers import adopt_untrained_groups, take_added_groups
from lightning_efficient.weightspace import Boundary, Site, Transform


@dataclass
class Plan:
    """What a method would do: parameter name → (parameter, how to make its transform), and the report."""

    sites: dict[str, tuple[nn.Parameter, Callable[[], Transform]]] = field(default_factory=dict)
    change: Change | None = None


class WeightSpaceCallback(EfficientCallback):
    """Base of the callbacks whose method is a :class:`~lightning_efficient.Transform`.

    All of them share the boundary of the first one in the Trainer, so that they chain on a common weight. The model is
    plain whenever a forward can run, which is why evaluation, EMA copies and stock checkpoints need nothing from us.
    Between two fits the state of the transforms stays with the model, as an entry of its recipe.
    """

    # Its `state_schema` is what a file's states of single weights are checked against.
    transform: ClassVar[type[Transform]] = Transform  # type: ignore[type-abstract]
    resume_may_change = frozenset({"enabled"})

    def __init__(
        self, enabled: bool = True, include: list[str] | None = None, exclude: list[str] | None = None
    ) -> None:
        super().__init__(enabled, include, exclude)
        self.change: Change | None = None
        self._boundary: Boundary | None = None
        self._chosen: dict[str, tuple[nn.Parameter, Transform]] = {}
        self._transforms: dict[str, Transform] = {}
        self._trained: Callable[[], object] = no_model
        # The checkpoint of a fit that resumes, until its optimizers' states are restored.
        self._file: dict[str, Any] | None = None

    @abstractmethod
    def plan(self, pl_module: LightningModule) -> Plan:
        """Choose and check the weights, without changing anything."""

    def quantities(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """Scalars worth logging, called on logging steps only."""
        return {}

    def record(self) -> dict[str, Any]:
        """What the recipe keeps beside tensors: the arguments, and what else a resumed run must not look for again."""
        return self.config()

    def entry(self, pl_module: LightningModule) -> Entry | None:
        """The transforms' state; None: no fit holds them, and the model carries what the last one left."""
        if self._boundary is None:
            return None
        return Entry(self.method, self.state_key, self.record(), self._live_tensors())

    def carried(self, pl_module: LightningModule) -> Entry | None:
        """What this callback, or another of the same method and targets, has left in the weights of a model."""
        return attachment(pl_module).entry(self.method, self.state_key)

    # -- life cycle ----------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Forget what a fit that failed has left."""
        self._file = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and begin anew."""
        super().setup(trainer, pl_module, stage)
        if self.enabled:
            hook_files(pl_module)
        searches = any(isinstance(finder, LearningRateFinder) for finder in finders(trainer))
        if self.enabled and stage == "fit" and searches and _members(trainer)[0] is self:
            rank_zero_warn(
                f"LearningRateFinder runs before {type(self).__name__} starts, so it finds a rate for the model "
                "without it. Set the learning rate from short runs instead."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the transforms on, after weights are loaded and before the optimizer's state is."""
        super().on_fit_start(trainer, pl_module)
        if not self.enabled:
            return
        rebind_all(trainer, pl_module)  # callbacks that replace modules may be listed after this one
        if is_sharded(trainer):  # whose files are read later than this
            return
        self._chosen = self._choose(trainer, pl_module)
        members = _members(trainer)
        if members[-1] is self:
            _start(trainer, pl_module, members)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the optimizers' steps are ours: to read a sharded file, Lightning has them take one."""
        members = _members(trainer)
        if self.enabled and members[0] is self:
            if is_sharded(trainer):
                gather_anew(pl_module)  # or what evaluation has gathered stands in place of the parameters
                for member in members:
                    member._chosen = member._choose(trainer, pl_module)
                _start(trainer, pl_module, members)
            if self._boundary is not None:  # a tuner's loop runs before anything has started
                self._boundary.attach(trainer.optimizers)
        super().on_train_start(trainer, pl_module)

    def _choose(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, tuple[nn.Parameter, Transform]]:
        """The weights of this run and their transforms; nothing of the model has changed yet."""
        plan = self.plan(pl_module)
        sites = _only_optimized(plan, trainer.optimizers, type(self).__name__)
        skipped = {} if plan.change is None else plan.change.skipped
        saved = self._saved(pl_module)
        if self.standing.resumed and saved:
            if missing := [name for name in saved if name not in sites]:
                reasons = [f"{name} ({skipped.get(name, 'not in the model')})" for name in missing]
                raise RecipeError(
                    f"{type(self).__name__}: the checkpoint has a state for {len(saved)} weights, of which "
                    f"{len(missing)} are no targets now: {'; '.join(reasons[:5])}."
                )
            # Zero or frozen when the run began, so without a place in the optimizer's saved state.
            for name in [name for name in sites if name not in saved]:
                del sites[name]
                skipped[name] = "left alone when the checkpoint was written"
        self.change = plan.change
        # An optimizer that outlives the fit (LightningCLI makes those) may hold the transforms' parameters already.
        known = self._transforms if self._trained() is pl_module else {}
        return {name: (param, known.get(name) or make()) for name, (param, make) in sites.items()}

    def _saved(self, pl_module: LightningModule) -> dict[str, dict[str, Tensor]]:
        """Parameter → state from which its transform goes on."""
        entry = self.carried(pl_module)
        return {} if entry is None else entry.tensors

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are complete and unscaled, and not yet clipped."""
        if self._boundary is not None and _members(trainer)[0] is self:
            attachment(pl_module).unsharded = None  # whoever needs it has looked at it
            self._boundary.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log this method's scalars on the Trainer's logging steps."""
        if self._boundary is not None and _members(trainer)[0] is self:
            self._boundary.leave()  # of a step that was skipped
        if self._boundary is not None and self.logs_now(trainer, pl_module):
            for name, value in self.quantities(self._transforms).items():
                pl_module.log(f"{self.prefix}/{name}", value, on_step=True, on_epoch=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the network's weights in the model, whatever happened inside the step."""
        super().on_exception(trainer, pl_module, exception)
        if self._boundary is not None:
            self._boundary.restore()
            if is_sharded(trainer):  # the state would have to be gathered, and other processes may not come
                self._boundary.detach()
                self._boundary = None
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers; the model keeps the state for a further ``fit`` and for files written later."""
        super().teardown(trainer, pl_module, stage)
        self._release(pl_module)

    def _begin(self, pl_module: LightningModule, boundary: Boundary) -> None:
        self._boundary, self._trained = boundary, ref(pl_module)
        self._transforms = {name: transform for name, (_, transform) in self._chosen.items()}
        self._file = None
        # The transforms own the state now: the copy in the model would be old, and double the memory.
        mine = attachment(pl_module)
        mine.entries = [e for e in mine.entries if (e.method, e.key) != (self.method, self.state_key)]

    def _release(self, pl_module: LightningModule) -> None:
        if (entry := self.entry(pl_module)) is not None and self._boundary is not None:
            attachment(pl_module).leave(entry)
            self._boundary.detach()
        self._boundary, self._chosen, self._file = None, {}, None

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def check_checkpoint(
        self, pl_module: LightningModule, checkpoint: dict[str, Any], entries: Sequence[Entry]
    ) -> None:
        """Refuse to resume from another configuration; evaluation needs nothing."""
        trainer = pl_module.trainer
        if self.enabled and trainer.state.fn == "fit" and METHODS[self.method].prunes:
            here = {cb.method for cb in peers(trainer)}
            if lost := [e.key for e in entries if METHODS[e.method].prunes and e.method not in here]:
                raise RecipeError(
                    f"the checkpoint holds what {lost} pruned; this run has {self.state_key}, which would let it grow "
                    "again. Resume with the same callback, or start a new run from the weights alone "
                    f"({type(pl_module).__name__}.load_from_checkpoint(path))."
                )
        super().check_checkpoint(pl_module, checkpoint, entries)
        if trainer.state.fn != "fit":
            return
        known = {entry.key: entry for entry in entries if entry.method == self.method}
        mine = known.get(self.state_key)
        present = [cb.state_key for cb in _members(trainer) if cb.method == self.method]
        if (self.enabled and mine is None and known) or not known.keys() <= set(present):
            raise RecipeError(
                f"the checkpoint was trained with {list(known)}; this run has {present or self.state_key}. Resume "
                "with the same `include` and `exclude`."
            )
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if self.enabled and mine is None and state is not None and state["standing"]["begun"]:
            raise RecipeError(
                f"the checkpoint's recipe should have an entry of {self.state_key}, as that has a state in it; it has "
                f"{[entry.key for entry in entries] or 'none'}."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take this callback's state into a fit that runs (a tuner restores it), else leave it to the model."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if not self.enabled or trainer.state.fn != "fit":
            return
        mine = self.carried(pl_module)
        if self._boundary is not None:
            for name, state in ({} if mine is None else mine.tensors).items():
                self._boundary.sites[name].load(self._transforms[name], state)
            return
        if is_sharded(trainer) and misplaced_states(pl_module, trainer.optimizers, checkpoint):
            raise RecipeError(
                "the checkpoint is of an unsharded run, whose optimizer has its parameters in another order than "
                f"{type(pl_module).__name__}.parameters(); Lightning goes by that, and would exchange their states. "
                "Give the optimizer one group, or parameters in that order; or start anew from the weights alone."
            )
        self._file = checkpoint
        if not self._was_there(pl_module):
            rank_zero_info(
                f"{type(self).__name__}: the checkpoint was trained without it; its weights are taken as they are."
            )

    def _was_there(self, pl_module: LightningModule) -> bool:
        """Whether the file of the fit that resumes was written with this callback."""
        states = {} if self._file is None else self._file.get("callbacks", {})
        return self.carried(pl_module) is not None or self.state_key in states

    def _live_tensors(self) -> dict[str, dict[str, Tensor]]:
        assert self._boundary is not None
        return self._boundary.saved(self._transforms)

    def _report(self) -> None:
        if self.change is None:
            return
        rank_zero_info(self.change.report())
        asked_for = ("excluded", "not covered", REFERENCE)
        surprises = {n: why for n, why in self.change.skipped.items() if not why.startswith(asked_for)}
        if surprises:
            listed = "; ".join(f"{n} ({why})" for n, why in list(surprises.items())[:6])
            more = f"; and {len(surprises) - 6} more" if len(surprises) > 6 else ""
            rank_zero_warn(f"{type(self).__name__} leaves {len(surprises)} weight(s) alone: {listed}{more}.")

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit, so that ``ddp_spawn`` can send the callback to its processes."""
        return self.__dict__ | {
            "_boundary": None, "_chosen": {}, "_transforms": {}, "_trained": no_model, "_file": None,
        }  # fmt: skip


def no_model() -> None:
    """A reference to nothing (module level, so that callbacks can be pickled)."""


def sites_of(trainer: Trainer) -> dict[str, Site]:
    """Parameter → the transforms on it, of all methods of a fit that runs; empty where there are none."""
    return next((cb._boundary.sites for cb in _members(trainer) if cb._boundary is not None), {})


def _members(trainer: Trainer) -> list[WeightSpaceCallback]:
    return [cb for cb in peers(trainer) if isinstance(cb, WeightSpaceCallback)]


def _only_optimized(
    plan: Plan, optimizers: list[Optimizer], who: str
) -> dict[str, tuple[nn.Parameter, Callable[[], Transform]]]:
    """Drop the weights that no optimizer moves: they are as good as frozen."""
    trained = trained_by(*optimizers)
    kept = {name: site for name, site in plan.sites.items() if id(site[0]) in trained}
    if plan.sites and not kept:
        raise ValueError(
            f"{who}: none of the {len(plan.sites)} matched weights is in an optimizer ({list(plan.sites)[:3]} ...). "
            "Does `configure_optimizers` use other parameters, or does the optimizer step inside backward?"
        )
    if plan.change is not None:
        for name in [name for name in plan.sites if name not in kept]:
            plan.change.targets.pop(name, None)
            plan.change.skipped[name] = "in no optimizer"
    return kept


def _start(trainer: Trainer, pl_module: LightningModule, members: list[WeightSpaceCallback]) -> None:
    """Every callback has chosen its weights: check the rest, give the optimizers their parameters, put them on."""
    boundary, saved = Boundary(), {member: member._saved(pl_module) for member in members}
    for member in members:
        for name, (param, transform) in member._chosen.items():
            state = saved[member].get(name)
            try:
                boundary.add(name, param, transform, state)
            except ValueError as error:
                raise (ValueError if state is None else RecipeError)(f"{type(member).__name__}: {error}") from error
    boundary.check(trainer.optimizers)
    _fill_optimizers(trainer, pl_module, members, boundary)
    strangers = boundary.start()
    gather_anew(pl_module)
    for member in members:
        member._begin(pl_module, boundary)
    if strangers:
        rank_zero_warn(
            f"{len(strangers)} weight(s) changed since the state of {[type(m).__name__ for m in members]} was saved "
            f"({strangers[:3]} ...; an averaged model?). Training goes on from these weights, the function unchanged."
        )
    for member in members:
        member._report()


def _fill_optimizers(
    trainer: Trainer, pl_module: LightningModule, members: list[WeightSpaceCallback], boundary: Boundary
) -> None:
    """Give the optimizers the parameters that stay with them, and see to the states that are about to be restored."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    transforms = [transform for member in members for _, transform in member._chosen.values()]
    residents = {id(transform.theta) for transform in transforms if transform.resident}
    if residents and any(isinstance(cb, BaseFinetuning) for cb in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            f"{type(members[0]).__name__} trains parameters that are not the module's, and Lightning's BaseFinetuning "
            "looks up every parameter of the optimizer by its name in the module. Freeze and unfreeze in hooks of the "
            "LightningModule instead, or leave the parameters constant."
        )
    file = members[0]._file
    foreign = file is not None and not any(member._was_there(pl_module) for member in members)
    for index, optimizer in enumerate(trainer.optimizers):
        known = trained_by(optimizer)
        thetas = boundary.thetas(optimizer)
        new = [(theta, weight) for theta, weight in thetas if id(theta) in residents and id(theta) not in known]
        if file is not None and "optimizer_states" in file and not residents and thetas:
            boundary.memory |= take_added_groups(file, index, optimizer, thetas, schedulers)
        add_parameters(optimizer, new, schedulers)
        if new and file is not None and foreign:
            adopt_untrained_groups(file, index, optimizer, new, schedulers)
