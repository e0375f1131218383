"""Methods that transform weights, in a loop: the core of their callbacks, moved by the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_efficient.attention.temperature import TempScaleConfig, check_gradients, find_targets, make_transforms
from lightning_efficient.common.change import Change
from lightning_efficient.common.match import parameters_by_name
from lightning_efficient.common.schedule import Schedule, check_spans, transition_steps
from lightning_efficient.common.weights import trained_by
from lightning_efficient.loops.parts import Part, Run, Sites
from lightning_efficient.pruning import criteria, targets
from lightning_efficient.pruning.gradual import GradualPruning
from lightning_efficient.weightspace import ScaleTransform, Temperature, sigma_reparam
from lightning_efficient.weightspace.mask import MaskTransform, forget, set_mask
from lightning_efficient.weightspace.scale import tau_at

# On a model whose weights hold a temperature; plain, so that it is copied and pickled with it.
HELD = "_lightning_efficient_temperature"


class SigmaReparamPart(Part):
    """See :class:`~lightning_efficient.SigmaReparam`."""

    method = "sigma_reparam"

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        init: Literal["preserve", "one"] = "preserve",
        qkv: Literal["fused", "split"] = "fused",
        monitor_only: bool = False,
        embeddings: bool = False,
        learnable_gain: bool = True,
        gain: Literal["linear", "log"] = "log",
        gain_lr: float = 10.0,
    ) -> None:
        super().__init__(include, exclude)
        self.options = sigma_reparam.SigmaReparamConfig(
            init, qkv, monitor_only, embeddings, learnable_gain, gain, gain_lr
        )

    def sites(self, run: Run) -> Sites:
        """Weights that multiply as matrices."""
        uses: Mapping[str, Any] | None = {}
        if loose := sigma_reparam.find_loose(run.model):
            call, saved = run.example, run.saved.get(self.method)
            if saved is not None:
                uses = {name: "matrix" if p.dim() == 2 else "stack" for name, p in loose.items() if name in saved}
            else:
                uses = None if call is None else sigma_reparam.find_uses(run.model, lambda: call.run(run.model))
        found = sigma_reparam.find_targets(run.model, self.options, self.include, self.exclude, uses)
        self.change = Change(self.method, skipped=dict(found.skipped), notes=[found.coverage])
        sites: Sites = {}
        for name, (param, blocks) in found.matched.items():
            sites[name] = param, sigma_reparam.make_transform(self.options, blocks)
            self.change.targets[name] = sigma_reparam.describe(param, blocks, found.notes.get(name))
        return sites


class TempScalePart(Part):
    """See :class:`~lightning_efficient.TempScale`."""

    method = "temp_scale"
    example_for = "attention is found while the model runs"
    lengths = (0, 1)

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        tau: float | list[float] = 1.0,
        mode: Literal["constant"] = "constant",
        learnable: bool = False,
        per_head: bool = False,
        transition: int | float = 0,
    ) -> None:
        super().__init__(include, exclude)
        if mode != "constant":
            raise ValueError(
                f"temp_scale: `mode`={mode!r} needs forward adapters, which a Trainer keeps in step; in a loop the "
                "temperature lives in weights. Use mode='constant', or TempScale in a Lightning Trainer."
            )
        if per_head and not learnable:
            raise ValueError("`per_head=True` is about learned temperatures: add `learnable=True`.")
        if learnable and transition:
            raise ValueError(f"`transition`={transition!r} would overwrite what `learnable=True` learns; drop one.")
        check_spans(transition=transition)
        self.options = TempScaleConfig(tau, mode, per_head=per_head)
        self.learnable, self.transition = learnable, transition

    def resolve(self, total: int | None) -> tuple[int, ...]:
        """How long the temperature takes."""
        names = (None, "transition")
        return (transition_steps(total, length=self.transition, names=names)[1],) if self.transition else ()

    def sites(self, run: Run) -> Sites:
        """The weights behind the logits of every attention."""
        call = run.needs_example(self)
        if HELD in vars(run.model) and self.method not in run.saved:
            raise ValueError(
                "temp_scale: the model's weights hold the temperature of an earlier run already, and a second one "
                "would multiply it. Leave temp_scale out of `methods`, which keeps it; pass `previous=` the driver of "
                "that run; or make the model anew."
            )
        trained = trained_by(run.optimizer)
        fixed = {name for name, p in parameters_by_name(run.model).items() if id(p) not in trained}
        given = call.args if not call.kwargs else dict(call.kwargs)
        with torch.random.fork_rng([]):
            found = find_targets(run.model, given, self.options, self.include, self.exclude, fixed)
        if found.adapters:
            raise ValueError(
                f"temp_scale: {list(found.adapters)[:3]} need forward adapters (no trained weight scales their "
                "logits), which a Trainer keeps in step. Exclude them, or use TempScale in a Lightning Trainer."
            )
        check_gradients(run.model, given, found)
        temperatures = {}
        for group in found.groups():
            heads = found.sites[group[0]].heads if self.options.per_head else 1
            if heads is None:
                raise ValueError(
                    f"`per_head=True`: the logits of {group[0]!r} do not say which axis holds the heads. "
                    f"exclude=[{group[0]!r}], or learn one temperature for all heads."
                )
            tau = found.laws[group[0]].tau
            temperatures[group[0]] = Temperature(self._law(tau) if self.steps else tau, heads, self.learnable)
        self.change = found.change()
        made: dict[str, tuple[nn.Parameter, ScaleTransform]] = make_transforms(run.model, found, temperatures)
        return {name: (param, transform) for name, (param, transform) in made.items()}

    def at(self, run: Run, step: int) -> None:
        """The weights hold a temperature from now on, which a driver to come has to know."""
        setattr(run.model, HELD, True)

    def _law(self, tau: float) -> Callable[[int], float]:
        return lambda step: tau_at(step, tau, self.steps[0])


class MagnitudePruningPart(Part):
    """See :class:`~lightning_efficient.MagnitudePruning`."""

    method = "magnitude_pruning"
    lengths = (4,)

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        amount: float = 0.5,
        schedule: Literal["cubic", "one_shot", "constant", "iterative"] = "cubic",
        criterion: Literal["magnitude", "taylor", "random"] = "magnitude",
        scope: Literal["global", "layer", "neuron"] = "global",
        granularity: str = "element",
        start: int | float | None = None,
        length: int | float | None = None,
        every: int | float = 0.01,
        rounds: int = 5,
        rewind: Literal["none"] = "none",
        amounts: dict[str, float] | None = None,
        embeddings: bool = False,
        seed: int = 0,
        keep_zeros: bool = False,
    ) -> None:
        super().__init__(include, exclude)
        for name, value, why in (
            ("criterion", criterion, "which forwards count, and which only repeat one for its backward"),
            ("rewind", rewind, "what else has to go back: data, schedulers, averages"),
        ):
            if value in ("wanda", "weights", "learning_rate"):
                raise ValueError(
                    f"magnitude_pruning: `{name}`={value!r} has to know {why}, which a loop does not say. Use "
                    "MagnitudePruning in a Lightning Trainer."
                )
        self.rule = GradualPruning(
            amount, Schedule(schedule, start, length, every, rounds), criterion, scope, granularity, rewind,
            amounts=amounts, seed=seed,
        )  # fmt: skip
        self.embeddings, self.keep_zeros = embeddings, keep_zeros
        self._targets: dict[str, targets.PrunableWeight] = {}
        self._groups: dict[str, tuple[float, list[str]]] = {}
        self._applied: dict[str, float] = {}
        self._begun = False

    def resolve(self, total: int | None) -> tuple[int, ...]:
        """First step, span, and steps between two changes."""
        return self.rule.resolve(total)

    def sites(self, run: Run) -> Sites:
        """Weights that are pruned."""
        known = run.saved.get(self.method, ())
        found = targets.find_targets(
            run.model, self.rule.granularity, self.rule.criterion, self.include, self.exclude, self.embeddings, known
        )
        self.change = Change(self.method, skipped=dict(found.skipped))
        for name, target in found.matched.items():
            self.change.targets[name] = "×".join(map(str, target.param.shape))
        self._targets = found.matched
        self._globs = self.rule.read_amounts(run.model, found.matched, self.method)
        return {name: (target.param, MaskTransform(target.param.shape)) for name, target in found.matched.items()}

    def at(self, run: Run, step: int) -> None:
        """Prune where the weights alone decide."""
        if not self._begun:
            self._begin(run)
        if (run.total is None or step < run.total) and self.rule.criterion != "taylor" and self._due(step):
            self._prune(run, step, {n: self.rule.score(n, run.boundary.sites[n]) for n in self._targets}, advance=True)

    def before_step(self, run: Run, step: int) -> None:
        """Prune where the gradients decide; without a finite one for every weight, at the next step."""
        if self.rule.criterion != "taylor" or not self._due(step):
            return
        grads = {name: target.param.grad for name, target in self._targets.items()}
        scores = {name: criteria.taylor(self._targets[name].param, g) for name, g in grads.items() if g is not None}
        if len(scores) == len(grads) and all(bool(score.isfinite().all()) for score in scores.values()):
            self._prune(run, step, scores, advance=False)

    def progress(self) -> dict[str, Any]:
        """Pattern of ``amounts`` → share that is pruned."""
        return dict(self._applied)

    def resume(self, run: Run, progress: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._begun, self._applied = True, dict(progress)

    def finish(self, run: Run, step: int, batches: Iterable[Any] | None, forward: Any) -> str:
        """Zeros stay zeros."""
        end = self.rule.schedule.end(self.steps)
        due = self._due(end if run.total is None else min(end, run.total - 1))
        return (
            f"magnitude_pruning ends at step {step}, before it has pruned all that was asked for: {due}" if due else ""
        )

    def _begin(self, run: Run) -> None:
        self._begun = True
        for name in self._targets if self.keep_zeros else ():
            site, transform = run.boundary.sites[name], self.transforms[name]
            assert isinstance(transform, MaskTransform)
            set_mask(site, transform, site.param.detach() != 0)

    def _due(self, step: int) -> dict[str, float]:
        mine = {name: target for name, target in self._targets.items() if name in self.transforms}
        self._targets, self._groups = mine, self._groups or self.rule.groups(self._globs, mine)
        return self.rule.due(step, self.steps, self._groups, self._applied)

    def _prune(self, run: Run, step: int, scores: Mapping[str, Tensor], advance: bool) -> None:
        due, transforms = self._due(step), {n: t for n, t in self.transforms.items() if isinstance(t, MaskTransform)}
        kept = {name: transform.mask for name, transform in transforms.items()}
        chosen = self.rule.masks(due, self._groups, self._targets, scores, kept)
        changed = {name: mask for name, mask in chosen.items() if not torch.equal(mask, kept[name])}
        pruned = {self._targets[name].param: ~mask | transforms[name].dropped for name, mask in changed.items()}
        for name, mask in changed.items():
            set_mask(run.boundary.sites[name], transforms[name], mask, advance=advance)
        forget([run.optimizer], pruned)
        self._applied |= due
