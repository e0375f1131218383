"""``TempScale``: attention's temperature, in training and without."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient import recipe
from lightning_efficient.attention.knobs import Knob
from lightning_efficient.attention.sites import AttentionSite
from lightning_efficient.callbacks.attach import attachment, carry
from lightning_efficient.callbacks.example import Stage, example_of, first_batch
from lightning_efficient.callbacks.weightspace import Plan, WeightSpaceCallback
from lightning_efficient.methods.temp_scale import (
    METHOD,
    Targets,
    TempScaleConfig,
    TempScaleError,
    find_targets,
    install_targets,
    make_transforms,
    remove_temp_scale,
)
from lightning_efficient.schedule import transition, transition_steps
from lightning_efficient.weightspace import Block, ScaleTransform, Temperature, Transform


class TempScale(WeightSpaceCallback):
    """Divide every attention's logits by a temperature (Zhou et al., ACL 2025, arXiv 2410.24200).

    In ``fit`` the temperature lives in the query weights (or query norms and position biases) at the optimizer
    boundary: the model stays plain, files load anywhere and hold the scaled weights. In ``validate``, ``test`` and
    ``predict`` alone it is put on a trained model for that run and taken off again, to the bit; what no weight can
    scale gets a forward adapter there. Where the temperature goes is found by running one batch, and proved in float64
    before anything changes. Logs ``efficient/temp_scale/tau_*`` where it moves.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over the names of attention modules; a glob also matches every module below a matching one.
            ``None``: all.
        exclude: Globs over names, applied after ``include``.
        tau: The temperature, or one per attention in the order of the forward. Below 1 sharpens; 1 changes nothing.
            Where it is learned, its first value.
        mode: ``"constant"``; or, to compare with, without training only: ``"log_n"`` (logits times log n / log
            ``length``) or ``"ssmax"`` (times log n), n the number of keys a query sees.
        learnable: Train the temperature, one per attention, with the learning rate of the query weight, without decay.
        per_head: One learned temperature per head.
        transition: How long the temperature takes from 1 to ``tau``, geometrically: a fraction of the run (float) or
            optimizer steps (int). 0: it is ``tau`` from the start.
        length: Number of keys at which ``mode="log_n"`` changes nothing.

    Raises:
        ValueError: A value is out of range, or two of them exclude each other.
    """

    method = METHOD

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
        self.learnable, self.transition = learnable, transition
        if per_head and not learnable:
            raise ValueError("`per_head=True` is about learned temperatures: add `learnable=True`.")
        if learnable and transition:
            raise ValueError(f"`transition`={transition!r} would overwrite what `learnable=True` learns; drop one.")
        self._targets: Targets | None = None
        self._layout: dict[str, Any] | None = None
        self._applied = False
        self._steps: int | None = None

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        tau = self.options.tau
        plain = tau if isinstance(tau, float | int) else list(tau)
        own = {"tau": plain, "learnable": self.learnable, "transition": self.transition}
        return super().config() | vars(self.options) | own

    def record(self) -> dict[str, Any]:
        """The arguments, and which weights hold which attention's temperature."""
        layout = None if self._targets is None else _as_plain(self._targets)
        return self.config() | {"layout": layout, "steps": self._steps}

    # -- in training ---------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find and prove, then put the temperatures on the optimizer boundary."""
        if self.enabled:
            if self.options.mode != "constant":
                raise ValueError(
                    f"TempScale(mode={self.options.mode!r}) depends on the length of each sample, which no weight can: "
                    "use it in `validate`, `test` and `predict`, or train with mode='constant'."
                )
            self._targets = self._targets_of_fit(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    def _targets_of_fit(self, trainer: Trainer, pl_module: LightningModule) -> Targets:
        again = self._trained() is pl_module
        if self._resumed and self._layout is not None:
            # Not looked for: that takes a batch, and making the train loader now would lose its restored position.
            return _from_plain(self._layout, self.options)
        if again and self._targets is not None:
            return self._targets
        if METHOD in attachment(pl_module).held:
            raise ValueError(
                "the module was trained with another TempScale, and its weights hold that temperature: a second one "
                "would multiply it. Go on with the same callback, or from a checkpoint (`ckpt_path`)."
            )
        return self._find(trainer, pl_module, "fit", first_batch(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule; from here on the weights hold the temperature."""
        if self.enabled:
            # A run that goes on has the steps that it had, whatever its length is now.
            if self.transition and (self._steps is None or METHOD not in attachment(pl_module).held):
                estimate = trainer.estimated_stepping_batches
                total = int(estimate) if estimate != float("inf") else None
                self._steps = transition_steps(total, length=self.transition)[1]
            attachment(pl_module).held[METHOD] = recipe.Entry(METHOD, self.state_key, self.config())

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
        if targets.adapters:
            raise TempScaleError(
                "in training a temperature must live in weights, which is not exact for "
                + "; ".join(f"{name!r} ({why})" for name, why in list(targets.adapters.items())[:4])
                + f". To train with the others: exclude={list(targets.adapters)}."
            )
        change = targets.change()
        temperatures = self._temperatures(targets)
        sites: dict[str, tuple[nn.Parameter, Callable[[], Transform]]] = {}
        for name, (parameter, transform) in make_transforms(pl_module, targets, temperatures).items():
            sites[name] = (parameter, partial(_given, transform))
        moves = self.learnable or bool(self.transition)
        _check_optimizers(trainer.optimizers, targets, {name: site[0] for name, site in sites.items()}, moves)
        return Plan(sites, change)

    def _temperatures(self, targets: Targets) -> dict[str, Temperature]:
        """One per group of attentions that share a weight, under every name of the group."""
        made: dict[str, Temperature] = {}
        for group in targets.groups():
            tau = targets.laws[group[0]].tau
            heads = targets.sites[group[0]].heads if self.options.per_head else 1
            if self.transition:
                made[group[0]] = Temperature(self._schedule(tau))
            else:
                made[group[0]] = Temperature(tau, heads or 1, self.learnable)
        return made

    def _schedule(self, tau: float) -> Callable[[int], float]:
        def at(step: int) -> float:
            if step == 0 or self._steps is None:  # on_fit_start, when the length of the run is not known yet
                return 1.0
            return math.exp(math.log(tau) * (1.0 - transition(step, None, length=self._steps)))

        return at

    def quantities(self, transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
        """The temperatures' spread, where they move."""
        if not self.learnable and not self.transition:
            return {}
        tau = torch.cat([t.temperature.tau for t in cast("list[ScaleTransform]", list(transforms.values()))])
        return {"tau_min": tau.min(), "tau_mean": tau.mean(), "tau_max": tau.max()}

    # -- without training ----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; have files say that their weights hold a temperature."""
        super().setup(trainer, pl_module, stage)
        self._layout = None
        if self.enabled:
            carry(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find this callback's entry when training resumes."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        mine = [e for e in recipe.read(checkpoint) if e.method == METHOD and e.key == self.state_key]
        self._layout = mine[0].config.get("layout") if mine else None
        if mine and trainer.state.fn == "fit":
            self._steps = mine[0].config.get("steps")

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
        held = attachment(pl_module).held.get(METHOD)
        if held is not None:
            self._say_held(held.config)
            return
        targets = self._find(trainer, pl_module, stage, batch)
        install_targets(pl_module, targets)
        self._applied = True
        rank_zero_info(targets.change().report())

    def _say_held(self, held: Mapping[str, Any]) -> None:
        now = self.config()
        if changed := [name for name in ("tau", "mode") if held.get(name) != now[name]]:
            said = "; ".join(f"`{name}`: {held.get(name)!r} then, {now[name]!r} now" for name in changed)
            rank_zero_warn(
                f"TempScale: the weights hold the temperature that they were trained with, and that is used ({said}). "
                "To evaluate at another one, call `lightning_efficient.functional.apply_temp_scale` on the module with "
                "the ratio of the two."
            )
        else:
            rank_zero_info("TempScale: the weights were trained with their temperature and hold it.")

    def _take_off(self, pl_module: LightningModule) -> None:
        if self._applied:
            self._applied = False
            remove_temp_scale(pl_module)

    # -- both ----------------------------------------------------------------------------------------------------

    def _find(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, batch: Any) -> Targets:
        example = example_of(trainer, pl_module, stage, batch)
        with torch.random.fork_rng([]):
            return find_targets(example.model, example.args, self.options, self.include, self.exclude)


def _given(transform: Transform) -> Transform:
    return transform


def _as_plain(targets: Targets) -> dict[str, Any]:
    """Which blocks of which parameters scale each attention, as plain data."""
    return {
        name: {
            "heads": site.heads,
            "knobs": [
                [knob.parameter, [[b.start, b.length, b.dim] for b in knob.blocks], knob.heads and list(knob.heads)]
                for knob in site.knobs
            ],
        }
        for name, site in targets.sites.items()
    }


def _from_plain(layout: Mapping[str, Any], options: TempScaleConfig) -> Targets:
    sites = {}
    for name, site in layout.items():
        knobs = tuple(
            Knob(parameter, tuple(Block(*block) for block in blocks), None if heads is None else tuple(heads))
            for parameter, blocks, heads in site["knobs"]
        )
        sites[name] = AttentionSite(name, "resumed", heads=site["heads"], knobs=knobs)
    return Targets(sites, options.laws(list(sites)))


def _check_optimizers(
    optimizers: Sequence[Optimizer], targets: Targets, parameters: Mapping[str, nn.Parameter], moves: bool
) -> None:
    """All weights behind one attention's logits must be scaled: each by an optimizer, one with a shared temperature.

    Raises:
        TempScaleError: Naming what is frozen, or in several optimizers.
    """
    owner = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    for group in targets.groups():
        names = list(dict.fromkeys(knob.parameter for site in group for knob in targets.sites[site].knobs))
        idle = [name for name in names if id(parameters[name]) not in owner]
        if idle:
            raise TempScaleError(
                f"{idle} scale {group[0]!r} and are in no optimizer (frozen?), so in training the temperature could "
                f"not live there. Exclude the attention (exclude=[{group[0]!r}]), or train the weights."
            )
        if moves and len({owner[id(parameters[name])] for name in names}) > 1:
            raise TempScaleError(
                f"{names} scale {group[0]!r} together and are in different optimizers, which step at different times. "
                f"Give them to one, or exclude=[{group[0]!r}]."
            )
