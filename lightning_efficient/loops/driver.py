"""One driver for every loop: schedules, saving, resuming and the end of the methods, without a Trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_efficient.common.match import REFERENCE
from lightning_efficient.common.running import Inputs, as_call
from lightning_efficient.common.weights import trained_by
from lightning_efficient.loops.methods import PARTS, read_methods
from lightning_efficient.loops.parts import Part, Run
from lightning_efficient.loops.processes import check_whole
from lightning_efficient.loops.state import check_driver_state
from lightning_efficient.loops.wrappers import bare_model, bare_optimizer
from lightning_efficient.surgery.optimizer import rebind
from lightning_efficient.surgery.schedulers import Scheduler
from lightning_efficient.weightspace import Transform
from lightning_efficient.weightspace.site import check_state

_LOG = logging.getLogger(__name__)


class Driver:
    """Methods in a training loop; :func:`lightning_efficient.attach` makes it.

    Between two optimizer steps the model holds the weights that the network uses, so it evaluates, saves and copies as
    any model does. What a state dictionary of the model does not say is in :meth:`state_dict`.

    Attributes:
        changes: Method → what was done to the model; ``print(driver)`` shows it.
        total_steps: Optimizer steps of the run, or None.
    """

    def __init__(self, run: Run, parts: Mapping[str, Part], arguments: Mapping[str, Mapping[str, Any]]) -> None:
        self.total_steps = run.total
        self._run, self._parts = run, dict(parts)
        self._arguments = {name: dict(given) for name, given in arguments.items()}
        self._step = 0
        self._begun = self._stepped = False
        self._idle = 0  # steps that were told, and that the optimizer did not take
        self._handles: list[Any] = []

    @property
    def changes(self) -> dict[str, Any]:
        """Method → what was done to the model."""
        return {name: part.change for name, part in self._parts.items()}

    @property
    def steps(self) -> int:
        """Optimizer steps done, as counted by :meth:`step`."""
        return self._step

    def __str__(self) -> str:
        return "\n".join(change.report() for change in self.changes.values() if change is not None)

    # -- the loop --------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Gradients are complete and unscaled. Call it before they are clipped; otherwise it may be left out."""
        self._before()
        self._run.boundary.before_step(self._run.optimizer)

    def step(self) -> None:
        """An optimizer step is over, and that of the schedulers: call it once after each.

        A step that a gradient scaler has skipped counts, as it does in a Trainer.

        Warns:
            UserWarning: There are more steps than ``total_steps``, some without a step of the optimizer.
        """
        self._idle += not self._stepped
        self._begun = self._stepped = False
        self._step += 1
        if self._idle and self._step - 1 == self.total_steps:
            warnings.warn(
                f"`driver.step()` was called more than total_steps={self.total_steps} times, {self._idle} times "
                "without a step of the optimizer, so that schedules ended too soon: where gradients are accumulated, "
                "call it only once they are complete (accelerate: `if accelerator.sync_gradients:`).",
                UserWarning,
                stacklevel=2,
            )
        for part in self._parts.values():
            part.at(self._run, self._step)

    def restore(self) -> None:
        """Leave the network's weights in the model, after an exception out of ``optimizer.step()`` that is caught."""
        self._run.boundary.restore()
        self._begun = self._stepped = False

    @torch.no_grad()
    def finish(
        self, batches: Iterable[Any] | None = None, forward: Callable[[nn.Module, Any], object] | None = None
    ) -> nn.Module:
        """End the methods: running statistics are averaged anew, masks are zeros for good, the optimizer is free again.

        Units that ``hesso_pruning`` has brought to zero are cut out, of the model and of what the optimizer remembers.

        Args:
            batches: Training batches, for norms with running statistics; as many as ``recalibrate`` says are read.
            forward: How to run a batch. None: ``model(**batch)`` for a mapping, ``model(batch[0])`` for a tuple or
                list, ``model(batch)`` for anything else.

        Returns:
            The model, without wrappers, for :func:`lightning_efficient.export`, which folds swapped norms.

        Warns:
            UserWarning: A schedule had not come to its end, or statistics are moving averages.
        """
        self._run.boundary.restore()
        left = [part.finish(self._run, self._step, batches, forward) for part in self._parts.values()]
        self.detach()
        for what in filter(None, left):
            warnings.warn(f"{what}.", UserWarning, stacklevel=3)
        return self._run.model

    def detach(self) -> None:
        """Let go of the optimizer and leave the model as it is; the driver is of no further use."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._run.boundary.detach()
        for part in self._parts.values():
            part.release()

    @torch.no_grad()
    def _held(self, model: nn.Module) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Method → weight → state of what a model's weights still hold of this run, over or broken off."""
        self._run.boundary.restore()
        self.detach()
        held: dict[str, dict[str, dict[str, Tensor]]] = {}
        for name, part in self._parts.items() if self._run.model is model else ():
            states = self._run.boundary.saved(part.transforms)
            held[name] = {weight: s for weight, s in states.items() if self._fits(weight, part.transforms[weight], s)}
        return held

    def _fits(self, weight: str, transform: Transform, state: Mapping[str, Tensor]) -> bool:
        """Whether a weight is as large as its state (`finish` cuts)."""
        try:
            check_state(state, type(transform), self._run.boundary.sites[weight].param.detach(), weight, ValueError)
        except ValueError:
            return False
        return True

    # -- going on with a run ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What to save beside the states of model and optimizer; plain, so that ``weights_only=True`` reads it."""
        return {
            "version": 1,
            "step": self._step,
            "total_steps": self.total_steps,
            "methods": {
                name: {
                    "arguments": self._arguments[name],
                    "schedule": list(part.steps),
                    "progress": part.progress(),
                    "weights": self._run.boundary.saved(part.transforms),
                }
                for name, part in self._parts.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a run: load the states of the model and of the optimizer first, then this.

        Args:
            state: From :meth:`state_dict`, of a driver with the same methods and arguments.

        Raises:
            ValueError: It is no such state, of other methods, arguments or weights. Nothing is changed then.

        Warns:
            UserWarning: The model's weights are not those that the state was saved with.
        """
        check_driver_state(state, self._arguments)
        saved = {name: method["weights"] for name, method in state["methods"].items()}
        for name, part in self._parts.items():
            _check_weights(self._run, part, saved[name])
            part.check(self._run, state["methods"][name], state["step"])
        self._take(state)
        with torch.no_grad():
            for name, part in self._parts.items():
                for weight, transform in part.transforms.items():
                    self._run.boundary.sites[weight].load(transform, saved[name][weight])
        self._begin(self._run.boundary.start())

    def _take(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        for name, part in self._parts.items():
            part.steps = tuple(state["methods"][name]["schedule"])
            part.resume(self._run, state["methods"][name]["progress"])

    def _begin(self, strangers: Sequence[str]) -> None:
        if strangers:
            warnings.warn(
                f"{len(strangers)} weight(s) are not those that the state was saved with ({strangers[:3]} ...; an "
                "averaged model?). Training goes on from the weights of the model, the function unchanged. Load the "
                "model's state before the driver's.",
                UserWarning,
                stacklevel=3,
            )
        for part in self._parts.values():
            part.at(self._run, self._step)

    def _hook(self) -> None:
        optimizer = self._run.optimizer
        # Before the boundary's own: what a part does after a step it does to W, and the boundary makes it Ŵ once.
        pre, post = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
        self._handles = [pre(self._pre_hook), post(self._post_hook)]
        self._run.boundary.attach([optimizer])

    def _before(self) -> None:
        if self._stepped:
            raise RuntimeError(
                "the optimizer steps a second time without `driver.step()` in between: call it once after each "
                "`optimizer.step()`, or schedules stand still."
            )
        if not self._begun:
            self._begun = True
            for part in self._parts.values():
                part.before_step(self._run, self._step)

    def _pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before()

    def _post_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._stepped = True
        for part in self._parts.values():
            part.after_step(self._run, self._step + 1)


def attach(
    model: nn.Module,
    optimizer: Any,
    methods: Mapping[str, Mapping[str, Any] | bool | None],
    *,
    total_steps: int | None = None,
    schedulers: Sequence[Scheduler] = (),
    example: Inputs | None = None,
    state: Mapping[str, Any] | None = None,
    previous: Driver | None = None,
) -> Driver:
    """Switch methods on in a training loop of your own: plain torch, Fabric, accelerate, ``transformers.Trainer``.

    All or nothing: whatever is wrong is found before the weights change. The numbers are those of the callbacks in a
    Lightning Trainer, to the bit.

    Args:
        model: The model; wrappers of DDP, ``torch.compile`` and Fabric are looked through. Swap norms before a
            ``DistributedDataParallel`` is made.
        optimizer: Its optimizer, or a wrapper of Fabric or accelerate around it. One only.
        methods: Key of a method → its arguments, as in YAML: ``{"sigma_reparam": {}, "magnitude_pruning": {"amount":
            0.5}}``. Possible are ``norm_swap``, ``sigma_reparam``, ``temp_scale``, ``magnitude_pruning`` and
            ``hesso_pruning``.
        total_steps: Optimizer steps of the run, of which fractions in schedules are; None: give steps (``int``) there.
        schedulers: Learning-rate schedulers of the optimizer, for norms that bring parameters.
        example: A small batch as the model takes it: a tensor, a tuple of positional or a dict of keyword arguments.
            Needed by ``temp_scale`` and ``hesso_pruning``, and by ``norm_swap`` with running statistics.
        state: From :meth:`Driver.state_dict`, where the model's weights are loaded already; otherwise call
            :meth:`Driver.load_state_dict` once they are.
        previous: Driver of an earlier run of this model, over or broken off, without a state: schedules begin anew, but
            masks stay on, units stay gone, and a temperature is not given twice.

    Returns:
        The driver: call ``step()`` after each optimizer step, and ``finish()`` at the end.

    Raises:
        ValueError: A method, an argument, a combination or a state that cannot work; or a weight is in no optimizer.
    """
    arguments = read_methods(methods)
    parts = {name: PARTS[name](**given) for name, given in arguments.items()}
    optimizer = bare_optimizer(optimizer)
    if total_steps is not None and (type(total_steps) is not int or total_steps < 1):
        raise ValueError(f"`total_steps` must be a number of optimizer steps from 1, or None; got {total_steps!r}.")
    saved, progress = {}, {}
    if state is not None:
        check_driver_state(state, arguments)
        saved = {name: method["weights"] for name, method in state["methods"].items()}
        progress = {name: method["progress"] for name, method in state["methods"].items()}
        total_steps = total_steps if total_steps is not None else state["total_steps"]
    call = None if example is None else as_call(example)
    check_whole(model)
    parallel = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if previous is not None and state is None:
        saved = previous._held(bare_model(model))
    run = Run(bare_model(model), optimizer, total_steps, call, saved, progress, parallel)
    for name, part in parts.items():
        part.steps = part.resolve(total_steps) if state is None else tuple(state["methods"][name]["schedule"])
        if state is not None:
            part.check(run, state["methods"][name], state["step"])
    try:
        for part in parts.values():
            part.reshape(run)
        for name, part in parts.items():
            _add(run, name, part, saved.get(name, {}), whole=state is not None)
        run.boundary.check([optimizer])
        rebind([optimizer], [part.change for part in parts.values() if part.change is not None], schedulers, run.model)
    except BaseException:
        for part in parts.values():
            part.undo(run)
        raise
    driver = Driver(run, parts, arguments)
    strangers = run.boundary.start()
    driver._hook()
    if state is not None:
        driver._take(state)
    driver._begin(strangers)
    _report(parts)
    return driver


def _add(run: Run, name: str, part: Part, saved: Mapping[str, Mapping[str, Tensor]], whole: bool) -> None:
    """Put a part's transforms on its weights.

    Args:
        run: The run.
        name: The method.
        part: Its part.
        saved: Weight → state of a transform that it holds already.
        whole: Whether that is all there is: a run that goes on.
    """
    trained = trained_by(run.optimizer)
    sites = part.sites(run)
    kept = {weight: site for weight, site in sites.items() if id(site[0]) in trained}
    if sites and not kept:
        raise ValueError(f"{name}: none of its {len(sites)} weights is in the optimizer ({list(sites)[:3]} ...).")
    for weight in sites.keys() - kept.keys():
        if part.change is not None:
            part.change.targets.pop(weight, None)
            part.change.skipped[weight] = "in no optimizer"
    if whole:
        if missing := sorted(saved.keys() - kept.keys()):
            raise ValueError(f"{name}: the state has {len(missing)} weights that are no targets now: {missing[:5]}.")
        kept = {weight: site for weight, site in kept.items() if weight in saved}
    for weight, (param, transform) in kept.items():
        if (state := saved.get(weight)) is not None:
            check_state(state, type(transform), param.detach(), f"{name}: the state of {weight!r}", ValueError)
        run.boundary.add(weight, param, transform, state)
    part.transforms = {weight: transform for weight, (_, transform) in kept.items()}


def _check_weights(run: Run, part: Part, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    if saved.keys() != part.transforms.keys():
        apart = sorted(saved.keys() ^ part.transforms.keys())
        raise ValueError(f"{part.method}: the state and this run do not cover the same weights: {apart[:5]}.")
    for weight, transform in part.transforms.items():
        value = run.boundary.sites[weight].param.detach()
        check_state(saved[weight], type(transform), value, f"{part.method}: the state of {weight!r}", ValueError)


def _report(parts: Mapping[str, Part]) -> None:
    for name, part in parts.items():
        if part.change is None:
            continue
        _LOG.info(part.change.report())
        asked_for = ("excluded", "not covered", REFERENCE)
        odd = {weight: why for weight, why in part.change.skipped.items() if not why.startswith(asked_for)}
        if odd and part.complains:
            listed = "; ".join(f"{weight} ({why})" for weight, why in list(odd.items())[:6])
            warnings.warn(f"{name} leaves {len(odd)} weight(s) alone: {listed}.", UserWarning, stacklevel=3)
