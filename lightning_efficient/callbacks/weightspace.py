"""When a weight-space method acts inside a Trainer; what it does stands in :mod:`lightning_efficient.weightspace`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient import recipe
from lightning_efficient.callbacks.base import EfficientCallback, peers
from lightning_efficient.recipe import Entry, RecipeError
from lightning_efficient.surgery.change import Change
from lightning_efficient.surgery.optimizer import add_parameters
from lightning_efficient.surgery.resume import adopt_untrained_groups
from lightning_efficient.weightspace import Boundary, Transform


@dataclass
class Plan:
    """What a method would do: parameter name → (parameter, how to make its transform), and the report."""

    sites: dict[str, tuple[nn.Parameter, Callable[[], Transform]]] = field(default_factory=dict)
    change: Change | None = None


class WeightSpaceCallback(EfficientCallback):
    """Base of the callbacks whose method is a :class:`~lightning_efficient.weightspace.Transform`.

    All of them share the boundary of the first one in the Trainer, so that they chain on a common weight. The model is
    plain whenever a forward can run, which is why evaluation, EMA copies and stock checkpoints need nothing from us.
    """

    resume_may_change: frozenset[str] = frozenset({"enabled"})

    def __init__(
        self, enabled: bool = True, include: list[str] | None = None, exclude: list[str] | None = None
    ) -> None:
        super().__init__(enabled, include, exclude)
        self.change: Change | None = None
        self._boundary: Boundary | None = None
        self._transforms: dict[str, Transform] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._trained: Callable[[], object] = lambda_none
        self._loaded: dict[str, Any] | None = None
        self._logged_step = -1

    @abstractmethod
    def plan(self, pl_module: LightningModule) -> Plan:
        """Choose and check the weights, without changing anything."""

    def quantities(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """Scalars worth logging, called on logging steps only."""
        return {}

    # -- life cycle ----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the transforms on, after weights are loaded and before the optimizer's state is."""
        super().on_fit_start(trainer, pl_module)
        if not self.enabled:
            return
        members = _members(trainer)
        boundary = Boundary() if members[0] is self else members[0]._boundary
        assert boundary is not None  # the first member ran first
        plan = self.plan(pl_module)
        kept = _only_optimized(plan, trainer.optimizers, type(self).__name__)
        if self._trained() is not pl_module:
            self._tensors = {} if self._loaded is None else self._tensors
        self._check_names(kept)
        self._transforms = {}
        self._boundary = boundary
        for name, (param, make) in kept.items():
            transform = make()
            if (saved := self._tensors.get(name)) is None:
                boundary.add(name, param, transform)
            else:
                state = dict(saved)
                boundary.adopt(name, param, transform, state, state.pop("raw", None))
            self._transforms[name] = transform
        self._trained = ref(pl_module)
        if members[-1] is self:
            _finish(trainer, boundary, members)
        self._report(plan.change)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are complete and unscaled, and not yet clipped."""
        if self._boundary is not None and _members(trainer)[0] is self:
            self._boundary.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log this method's scalars on the Trainer's logging steps."""
        if self._boundary is None or trainer.barebones or not _logs_now(trainer):
            return
        if trainer.global_step != self._logged_step:
            self._logged_step = trainer.global_step
            for name, value in self.quantities(self._transforms).items():
                pl_module.log(f"efficient/{self.method}/{name}", value, on_step=True, on_epoch=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the network's weights in the model, whatever happened inside the step."""
        if self._boundary is not None:
            self._boundary.restore()
            self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers; keep the state for a further ``fit`` and for checkpoints written later."""
        self._release()

    def _release(self) -> None:
        if self._boundary is not None:
            self._tensors = self._live_tensors()
            self._boundary.detach()
        self._boundary, self._transforms, self._loaded = None, {}, None

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add this callback's entry to the recipe; the file's ``state_dict`` is plain as it is."""
        if self.enabled and (self._boundary is not None or self._trained() is pl_module):
            tensors = self._live_tensors() if self._boundary is not None else self._tensors
            recipe.write(checkpoint, Entry(self.method, self.state_key, self.config(), tensors))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find this callback's entry when training resumes; evaluation needs nothing."""
        if trainer.state.fn != "fit":
            return
        entries = [entry for entry in recipe.read(checkpoint) if entry.method == self.method]
        mine = next((entry for entry in entries if entry.key == self.state_key), None)
        if not self.enabled:
            if mine is not None:
                raise RecipeError(
                    f"the checkpoint was trained with {self.state_key}, which this run switches off (enabled=False): "
                    "its optimizer state does not fit. Switch it on to resume, or start a new run from the weights alone "
                    f"({type(pl_module).__name__}.load_from_checkpoint(path))."
                )
            return
        if mine is None and entries:
            raise RecipeError(
                f"the checkpoint was trained with {[e.key for e in entries]}; this run has {self.state_key}. Resume "
                "with the same `include` and `exclude`."
            )
        if mine is None:
            rank_zero_info(
                f"{type(self).__name__}: the checkpoint was trained without it; its weights are taken as they are."
            )
            self._tensors = {}
        else:
            self._check_config(mine)
            self._tensors = mine.tensors
        self._loaded = checkpoint
        if self._boundary is not None:  # restored in the middle of a fit, as Tuner.lr_find does
            for name, tensors in self._tensors.items():
                state = dict(tensors)
                raw = state.pop("raw", None)
                transform, site = self._transforms[name], self._boundary.sites[name]
                transform.load_state_dict({k: v.to(site.param.device) for k, v in state.items()})
                if raw is not None:
                    site.raw = raw.to(site.param.device, copy=True)

    def _check_config(self, entry: Entry) -> None:
        now = self.config()
        changed = [
            f"`{name}`: {entry.config.get(name)!r} then, {value!r} now"
            for name, value in now.items()
            if name not in self.resume_may_change and entry.config.get(name) != value
        ]
        if changed:
            raise RecipeError(
                f"{type(self).__name__} was configured differently when the checkpoint was written: "
                f"{'; '.join(changed)}. Resume with the saved values."
            )

    def _check_names(self, kept: Mapping[str, object]) -> None:
        if self._tensors and set(self._tensors) != set(kept):
            missing = sorted(set(self._tensors) - set(kept))
            extra = sorted(set(kept) - set(self._tensors))
            raise RecipeError(
                f"{type(self).__name__}: the saved state names {len(self._tensors)} weights, the model has {len(kept)} "
                f"targets. Saved but not in the model: {missing[:5]}; in the model but not saved: {extra[:5]}."
            )

    def _live_tensors(self) -> dict[str, dict[str, Tensor]]:
        assert self._boundary is not None
        out = {}
        for name, transform in self._transforms.items():
            out[name] = transform.state_dict()
            if (raw := self._boundary.sites[name].raw) is not None:
                out[name]["raw"] = raw.clone()
        return out

    def _report(self, change: Change | None) -> None:
        self.change = change
        if change is None:
            return
        rank_zero_info(change.report())
        surprises = {n: why for n, why in change.skipped.items() if not why.startswith("excluded")}
        if surprises:
            listed = "; ".join(f"{n} ({why})" for n, why in list(surprises.items())[:6])
            more = f"; and {len(surprises) - 6} more" if len(surprises) > 6 else ""
            rank_zero_warn(f"{type(self).__name__} leaves {len(surprises)} weight(s) alone: {listed}{more}.")

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit, so that ``ddp_spawn`` can send the callback to its processes."""
        return self.__dict__ | {
            "_boundary": None, "_transforms": {}, "_trained": lambda_none, "_loaded": None,
        }  # fmt: skip


def lambda_none() -> None:
    """A reference to nothing (module level, so that callbacks can be pickled)."""


def _members(trainer: Trainer) -> list[WeightSpaceCallback]:
    return [cb for cb in peers(trainer) if isinstance(cb, WeightSpaceCallback)]


def _logs_now(trainer: Trainer) -> bool:
    loop = trainer.fit_loop
    stepped = trainer.global_step if len(trainer.optimizers) == 1 else loop.total_batch_idx + 1
    return stepped % trainer.log_every_n_steps == 0  # type: ignore[attr-defined, no-any-return]


def _only_optimized(
    plan: Plan, optimizers: list[Optimizer], who: str
) -> dict[str, tuple[nn.Parameter, Callable[[], Transform]]]:
    """Drop the weights that no optimizer moves: they are as good as frozen."""
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    kept = {name: site for name, site in plan.sites.items() if id(site[0]) in held}
    if not kept:
        raise ValueError(
            f"{who}: none of the {len(plan.sites)} matched weights is in an optimizer ({list(plan.sites)[:3]} ...). "
            "Does `configure_optimizers` use other parameters, or does the optimizer step inside backward?"
        )
    if plan.change is not None:
        for name in plan.sites.keys() - kept.keys():
            plan.change.targets.pop(name, None)
            plan.change.skipped[name] = "in no optimizer"
    return kept


@torch.no_grad()
def _finish(trainer: Trainer, boundary: Boundary, members: list[WeightSpaceCallback]) -> None:
    """All chains are complete: check restored states, hook the optimizers, give them the new parameters."""
    strangers = [name for name, site in boundary.sites.items() if not site.fits()]
    for name in strangers:
        boundary.sites[name].rebase()
    if strangers:
        rank_zero_warn(
            f"{len(strangers)} weight(s) changed since the state of {[type(m).__name__ for m in members]} was saved "
            f"({strangers[:3]} ...; an averaged model?). Training goes on from these weights, the function unchanged."
        )
    boundary.attach(trainer.optimizers)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for index, optimizer in enumerate(trainer.optimizers):
        thetas = list(boundary.thetas(optimizer))
        add_parameters(optimizer, thetas, schedulers)
        checkpoint = members[0]._loaded
        if thetas and checkpoint is not None and not any(member._tensors for member in members):
            adopt_untrained_groups(checkpoint, index, optimizer, schedulers)
