"""``TempScale``: attention's temperature, in training and without."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_efficient.attention.adapter import install, installed, remove
from lightning_efficient.attention.layouts import check_optimizers, layout_of, targets_of
from lightning_efficient.attention.temper import Law
from lightning_efficient.attention.temperature import (
    METHOD,
    Targets,
    TempScaleConfig,
    TempScaleError,
    carriers,
    check_gradients,
    find_targets,
    install_targets,
    keep_saving_honest,
    make_transforms,
    remove_temp_scale,
)
from lightning_efficient.attention.verify import module_at
from lightning_efficient.common.match import parameters_by_name
from lightning_efficient.common.schedule import check_spans, transition_steps
from lightning_efficient.common.weights import trained_by
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.asking import asked
from lightning_efficient.lifecycle.base import peers
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.lifecycle.strategies import is_sharded
from lightning_efficient.lifecycle.structural import spawned
from lightning_efficient.lifecycle.weights import Plan, WeightSpaceCallback
from lightning_efficient.trainer.example import Example, example_of, first_batch
from lightning_efficient.trainer.replay import Stage
from lightning_efficient.weightspace import Boundary, ScaleTransform, Temperature, Transform
from lightning_efficient.weightspace.scale import tau_at


class TempScale(WeightSpaceCallback):
    """Divide every attention's logits by a temperature (Zhou et al., ACL 2025, arXiv 2410.24200).

    In ``fit`` the temperature lives in the query weights (or query norms and position biases) at the optimizer
    boundary: the model stays plain, files load anywhere and hold the scaled weights. What no weight can scale, or no
    optimizer moves, gets a forward adapter, which stays on the trained module; files then hold the temperature under a
    key of its own, which this callback and :func:`~lightning_efficient.load_from_checkpoint` read, and others refuse.
    In ``validate``, ``test`` and ``predict`` alone it is put on a trained model for that run and taken off again, to
    the bit. Where the temperature goes is found by running one batch, and proved in float64 before anything changes.
    Logs ``efficient/temp_scale/tau_*`` where it moves.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over the names of attention modules; a glob also matches every module below a matching one.
            ``None``: all.
        exclude: Globs over names, applied after ``include``.
        tau: The temperature, or one per attention in the order of the forward. Below 1 sharpens; 1 changes nothing.
            Where it is learned, its first value.
        mode: ``"constant"``; or, by forward adapters, ``"log_n"`` (logits times log n / log ``length``) or ``"ssmax"``
            (times log n), n the number of keys a query sees.
        learnable: Train the temperature, one per attention, with the learning rate of the query weight (the nearest
            trained weight, where that one is frozen), without decay.
        per_head: One learned temperature per head.
        transition: How long the temperature takes from 1 to ``tau``, geometrically: a fraction of the run (float) or
            optimizer steps (int). 0: it is ``tau`` from the start.
        length: Number of keys at which ``mode="log_n"`` changes nothing.

    Raises:
        ValueError: A value is out of range, or two of them exclude each other.
    """

    method = METHOD
    sharded = True
    transform = ScaleTransform
    only_with = (("mode", ("log_n",), ("length",)),)

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        tau: float | list[float] = 1.0,
        mode: Literal["constant", "log_n", "ssmax"] = "constant",
        learnable: bool = False,
        per_head: bool = False,
        transition: int | float = 0,
        length: float = 512.0,
    ) -> None:
        super().__init__(enabled, include, exclude)
        self.options = TempScaleConfig(tau, mode, length, per_head)
        check_spans(transition=transition)
        self.learnable, self.transition = learnable, transition
        if per_head and not learnable:
            raise ValueError("`per_head=True` is about learned temperatures: add `learnable=True`.")
        if learnable and transition:
            raise ValueError(f"`transition`={transition!r} would overwrite what `learnable=True` learns; drop one.")
        self._targets: Targets | None = None
        self._carriers: dict[str, str] = {}  # attention whose adapter moves -> the parameter it steps with
        self._applied = False
        self._steps: int | None = None

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        tau = self.options.tau
        plain = tau if isinstance(tau, float | int) else list(tau)
        own = {"tau": plain, "learnable": self.learnable, "transition": self.transition}
        return super().config() | vars(self.options) | own

    def without_effect(self) -> str:
        """A temperature of 1 is none."""
        taus = self.options.tau if isinstance(self.options.tau, list | tuple) else [self.options.tau]
        still = self.options.mode == "constant" and not self.learnable and all(tau == 1 for tau in taus)
        return f"tau={self.options.tau} is the temperature that attention has" if still else ""

    def record(self) -> dict[str, Any]:
        """The arguments, and which weights hold which attention's temperature."""
        layout = None if self._targets is None else layout_of(self._targets)
        return self.config() | {"layout": layout, "steps": self._steps}

    # -- in training ---------------------------------------------------------------------------------------------

    @property
    def needs_whole(self) -> bool:
        """To find what scales the logits, and to prove it."""
        return True

    def check_sharded(self, pl_module: LightningModule) -> None:
        """Refuse what no weight can hold."""
        if self.options.mode != "constant":
            raise ValueError(
                f"TempScale(mode={self.options.mode!r}) works by forward adapters, which sharded models cannot have. "
                "Use mode='constant', or train unsharded."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find and prove, then put the temperatures on the optimizer boundary."""
        if self.enabled and not is_sharded(trainer):  # whose files are read later than this
            self._targets = self._targets_of_fit(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    def _choose(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, tuple[nn.Parameter, Transform]]:
        if self._targets is None:
            self._targets = self._targets_of_fit(trainer, pl_module)
        if is_sharded(trainer) and (sites := list(self._targets.adapters)):
            what = f"no weight that an optimizer moves scales the logits of {sites[:3]}, and forward adapters"
            raise TempScaleError(f"{what} are not for sharded models: exclude={sites[:3]}, or train unsharded.")
        return super()._choose(trainer, pl_module)

    def _targets_of_fit(self, trainer: Trainer, pl_module: LightningModule) -> Targets:
        held = attachment(pl_module).entry(METHOD)
        if held is not None:  # the weights hold a temperature: its layout is known, and a second one would multiply
            if held.key != self.state_key or not self._is_same(held):
                raise ValueError(
                    "the module was trained with another TempScale, and its weights hold that temperature: a second "
                    f"one would multiply it ({self._differences(held)}). Go on with the same arguments, or from "
                    "weights without a temperature."
                )
            if held.config["layout"] is None:
                raise ValueError(
                    "the module was cut since it was trained with TempScale, and its weights hold that temperature: "
                    "train on without TempScale (enabled=False), or export the module."
                )
            self._steps = held.config["steps"]
            return targets_of(held.config["layout"], self.options)
        trained = trained_by(*trainer.optimizers)
        fixed = {name for name, p in parameters_by_name(pl_module).items() if id(p) not in trained}

        def find(module: LightningModule, batch: Any) -> Targets:
            example = example_of(trainer, module, "fit", batch)
            targets = self._find(example, fixed)
            if not self.without_effect():  # what is misspelt or missing is an error at 1 as well
                check_gradients(example.model, example.args, targets)
            return targets

        return asked(type(self).__name__, trainer, pl_module, first_batch(trainer), find)

    def _is_same(self, held: recipe.Entry) -> bool:
        return all(held.config.get(name) == value for name, value in self.config().items() if name != "enabled")

    def _differences(self, held: recipe.Entry) -> str:
        now = self.config()
        said = [f"`{n}`: {held.config.get(n)!r} then, {v!r} now" for n, v in now.items() if held.config.get(n) != v]
        return "; ".join(said) or f"{held.key} then, {self.state_key} now"

    def restart(self) -> None:
        """Forget the targets of the last fit; a temperature that the weights hold is the model's."""
        super().restart()
        self._targets, self._steps = None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule."""
        super().on_train_start(trainer, pl_module)
        # A tuner's loop runs before `on_fit_start` reaches us; a run that goes on has the steps that it had.
        if self.enabled and self._boundary is not None and self.transition and self._steps is None:
            (self._steps,) = self.standing.fix(trainer, type(self).__name__, self._resolve, sum)

    def _resolve(self, total: int | None) -> tuple[int]:
        return (transition_steps(total, length=self.transition, names=(None, "transition"))[1],)

    def plan(self, pl_module: LightningModule) -> Plan:
        """Choose and check the weights, without changing anything."""
        targets = self._targets
        if targets is None:  # asked before any training: `lightning-efficient targets`
            example = getattr(pl_module, "example_input_array", None)
            if example is None:
                raise ValueError(
                    "attention is found while the model runs, and this one has no `example_input_array` to run on."
                )
            targets = find_targets(pl_module, example, self.options, self.include, self.exclude)
            return Plan(change=targets.change())
        trainer = pl_module.trainer
        if targets.adapters and spawned(trainer):
            raise TempScaleError(
                f"{list(targets.adapters)[:3]} need forward adapters, and the process that spawned this one would take "
                "over the weights alone. Use Trainer(strategy='ddp'), or exclude them."
            )
        temperatures = self._temperatures(targets)
        made = make_transforms(pl_module, targets, temperatures)
        moving = self.learnable or bool(self.transition)
        parameters = parameters_by_name(pl_module)
        if moving:
            check_optimizers(trainer.optimizers, targets, {name: parameter for name, (parameter, _) in made.items()})
        trained = trained_by(*trainer.optimizers)
        names = [name for name, p in parameters.items() if id(p) in trained]
        self._carriers = carriers(targets, list(targets.adapters) if moving else [], names, made)
        for site, name in self._carriers.items():
            made[name] = (parameters[name], ScaleTransform(temperatures[site], ()))
        plan = Plan(change=targets.change())
        plan.sites.update(
            {name: (parameter, partial(_given, transform)) for name, (parameter, transform) in made.items()}
        )
        return plan

    def _temperatures(self, targets: Targets) -> dict[str, Temperature]:
        """One for each adapter and each group of attentions that share a weight, under the first name of the group."""
        made: dict[str, Temperature] = {}
        for site in [*(group[0] for group in targets.groups()), *targets.adapters]:
            tau, heads = targets.laws[site].tau, targets.sites[site].heads if self.options.per_head else 1
            if heads is None:
                raise TempScaleError(
                    f"`per_head=True`: the logits of {site!r} do not say which axis holds the heads. Exclude it "
                    f"(exclude=[{site!r}]), or learn one temperature for all heads."
                )
            made[site] = Temperature(self._schedule(tau) if self.transition else tau, heads, self.learnable)
        return made

    def _begin(self, pl_module: LightningModule, boundary: Boundary) -> None:
        super()._begin(pl_module, boundary)
        keep_saving_honest(pl_module, [name for name in self._transforms if name not in self._carriers.values()])
        self._adapt(pl_module)

    def _adapt(self, pl_module: LightningModule) -> None:
        """Put the adapters on, or on again, with the temperatures that the optimizers hold."""
        targets = cast(Targets, self._targets)
        for site in targets.adapters:
            module, law = module_at(pl_module, site), targets.laws[site]
            if site in self._carriers:
                transform = cast(ScaleTransform, self._transforms[self._carriers[site]])
                law = replace(law, tau=1.0, log_tau=transform.temperature.log_tau)
            if installed(module) is not None:
                remove(pl_module, module)
            if law != Law() or law.log_tau is not None:
                install(pl_module, module, law, saved=True)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the gradients of the adapters' temperatures over the processes, as DDP does the model's.

        After every backward: the mean of what is a mean already and of what a further micro-batch adds to it is right.
        """
        if self._boundary is None or trainer.world_size == 1 or not self.learnable:
            return
        thetas = [cast(nn.Parameter, self._transforms[name].theta) for name in self._carriers.values()]
        if thetas:
            parts = [torch.zeros_like(theta) if theta.grad is None else theta.grad for theta in thetas]
            mean = cast(Tensor, trainer.strategy.reduce(torch.cat(parts), reduce_op="mean"))
            for theta, grad in zip(thetas, torch.split(mean, [len(theta) for theta in thetas]), strict=True):
                theta.grad = grad.clone()

    def _schedule(self, tau: float) -> Callable[[int], float]:
        return lambda step: tau_at(step, tau, self._steps)

    def quantities(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """The temperatures' spread, where they move."""
        if not self.learnable and not self.transition:
            return {}
        tau = torch.cat([t.temperature.tau for t in cast("list[ScaleTransform]", list(transforms.values()))])
        return {"tau_min": tau.min(), "tau_mean": tau.mean(), "tau_max": tau.max()}

    # -- without training ----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        super().setup(trainer, pl_module, stage)
        if self.enabled and sum(isinstance(callback, TempScale) for callback in peers(trainer)) > 1:
            raise ValueError(
                "more than one TempScale is enabled, and two temperatures would multiply. One takes a temperature "
                "for each attention: `tau=[...]`, in the order of the forward."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find this callback's entry when training resumes."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._boundary is not None:  # a tuner's, in the middle of a fit
            self._adapt(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put the temperature on for ``validate``."""
        if trainer.state.fn == "validate":
            self._put_on(trainer, pl_module, "validate", batch, batch_idx + dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put the temperature on for ``test``."""
        self._put_on(trainer, pl_module, "test", batch, batch_idx + dataloader_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put the temperature on for ``predict``."""
        self._put_on(trainer, pl_module, "predict", batch, batch_idx + dataloader_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the weights back as they were."""
        super().on_exception(trainer, pl_module, exception)
        self._take_off(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the weights back as they were."""
        super().teardown(trainer, pl_module, stage)
        self._take_off(pl_module)

    @torch.inference_mode(False)
    def _put_on(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, batch: Any, index: int) -> None:
        if not self.enabled or index > 0:
            return
        held = attachment(pl_module).entry(METHOD)
        if held is not None:
            self._say_held(held.config)
            return
        if is_sharded(trainer):
            raise ValueError(
                f"TempScale puts no temperature on a sharded model in trainer.{stage}(): load its file into one "
                "process (`lightning_efficient.load_from_checkpoint`), and evaluate that."
            )
        targets = self._find(example_of(trainer, pl_module, stage, batch))
        install_targets(pl_module, targets)
        self._applied = True
        rank_zero_info(targets.change().report())

    def _say_held(self, held: Mapping[str, Any]) -> None:
        now = self.config()
        if changed := [name for name in ("tau", "mode") if held.get(name) != now[name]]:
            said = "; ".join(f"`{name}`: {held.get(name)!r} then, {now[name]!r} now" for name in changed)
            rank_zero_warn(
                f"TempScale: the module holds the temperature that it was trained with, and that is used ({said}). "
                "To evaluate at another one, where no forward adapter holds it, call "
                "`lightning_efficient.functional.apply_temp_scale` on the module with the ratio of the two."
            )
        else:
            rank_zero_info("TempScale: the module was trained with its temperature and holds it.")

    def _take_off(self, pl_module: LightningModule) -> None:
        if self._applied:
            self._applied = False
            remove_temp_scale(pl_module)

    # -- both ----------------------------------------------------------------------------------------------------

    def _find(self, example: Example, fixed: Collection[str] = ()) -> Targets:
        with torch.random.fork_rng([]):
            return find_targets(example.model, example.args, self.options, self.include, self.exclude, fixed)


def _given(transform: Transform) -> Transform:
    return transform
