"""How a LightningModule calls its networks: found by running one of its steps on a real batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from typing_extensions import Self

from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.nests import mapped, tensors_behind
from lightning_efficient.structured.cuts import numbers_of, put_numbers
from lightning_efficient.trainer.penalties import Penalties
from lightning_efficient.trainer.replay import STEPS, EmptyLoaderError, Replay, Stage, own, run_step, silent
from lightning_efficient.trainer.stand_in import stand_in

_Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


class ModuleView(nn.Module):
    """A LightningModule reduced to one computation: base of :class:`RecordedCalls` and :class:`WholeStep`.

    It shares the LightningModule's children, parameters and buffers, under their names. Deep copies of it, to try
    things on, copy these alone, and leave the LightningModule, with its Trainer and whatever else it holds, out.

    Args:
        pl_module: The module.
        context: The precision plugin's; entered by the forward unless the view has been cast to another dtype.
    """

    def __init__(self, pl_module: LightningModule, context: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        for tables in ("_modules", "_parameters", "_buffers"):
            getattr(self, tables).update(getattr(pl_module, tables))
        self.training = pl_module.training  # not `train()`, which would reach the children
        self._dtype, self._context = _dtype(self), _Shared(context)

    @classmethod
    def of(cls, pl_module: LightningModule, *args: Any) -> Self:
        """An instance of a class that bears the name of the LightningModule's, because errors say it.

        Args:
            pl_module: The module.
            args: The other arguments.
        """
        named = type(type(pl_module).__name__, (cls,), {"__module__": cls.__module__})
        return cast(Self, named(pl_module, *args))

    def swapped(self, pl_module: LightningModule) -> dict[int, Any]:
        """What of the LightningModule has a copy in this view: ``id`` → copy.

        Args:
            pl_module: The module that this is a view of, or a deep copy of one.
        """
        swapped: dict[int, Any] = {}
        mine = dict(self.named_modules(remove_duplicate=False))
        for name, module in pl_module.named_modules(remove_duplicate=False):
            copied = mine.get(name)
            if copied is None:
                continue
            if name:
                swapped[id(module)] = copied
            for old, new in ((module._parameters, copied._parameters), (module._buffers, copied._buffers)):
                there = dict(new.items())  # of a scripted module no dict
                swapped |= {id(tensor): there.get(key) for key, tensor in old.items() if tensor is not None}
        return swapped

    def _precision(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._context.value()
        return context if _dtype(self) == self._dtype else nullcontext()


class RecordedCalls(ModuleView):
    """The networks of a LightningModule, and a forward that repeats the calls one of its steps made of them.

    Args:
        pl_module: The module.
        context: See :class:`ModuleView`.
        names: The module of each call.
    """

    def __init__(
        self, pl_module: LightningModule, context: Callable[[], AbstractContextManager[Any]], names: Sequence[str]
    ) -> None:
        super().__init__(pl_module, context)
        self.names = tuple(names)

    def forward(self, *calls: tuple[tuple[Any, ...], Mapping[str, Any]]) -> list[Any]:
        """Repeat the calls: (positional arguments, keyword arguments) of each."""
        modules = {canonical_name(name): module for name, module in self.named_modules()}
        with self._precision():
            return [modules[name](*args, **kwargs) for name, (args, kwargs) in zip(self.names, calls, strict=True)]


class WholeStep(ModuleView):
    """A LightningModule as one module whose forward is the user's whole step, between the networks as well.

    A tracer sees all of it: layers directly on the module, an encoder whose output a decoder reads,
    ``self.vae.encode(x)``. Nothing is logged or counted. It runs in the mode that it is in, with gradients as they are
    enabled around it.

    Args:
        pl_module: The module, attached to a Trainer.
        stage: Whose step; ``"forward"``: the module's forward, on the batch or the first of it.
    """

    def __init__(self, pl_module: LightningModule, stage: Stage | Literal["forward"]) -> None:
        super().__init__(pl_module, pl_module.trainer.precision_plugin.forward_context)
        self._stage = stage
        self._whose = _Shared(pl_module)
        # By which the user's code goes, so that what cuts units out of this one can lower them.
        self._numbers = tuple(name for name in numbers_of(pl_module) if name not in vars(self))
        vars(self).update({name: value for name, value in numbers_of(pl_module).items() if name in self._numbers})

    def forward(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """What the step returns, and what it logs: name → value, as logged last.

        Args:
            batch: As the step would get it.
        """
        returned, _, logged = self._run(self._stage, batch)
        return returned, logged

    def _run(self, stage: Stage | Literal["forward"], batch: Any) -> tuple[Any, list[Tensor], dict[str, Any]]:
        """What a step returns, the losses that it hands to ``manual_backward``, and what it logs."""
        losses: list[Tensor] = []
        logged: dict[str, Any] = {}
        pl_module: LightningModule = self._whose.value
        twin = stand_in(pl_module, lambda name, value, *_, **__: logged.update({name: value}), self.swapped(pl_module))
        twin.training = self.training
        backward = twin.manual_backward

        def kept(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            losses.append(loss)
            backward(loss, *args, **kwargs)

        vars(twin)["manual_backward"] = kept
        put_numbers(twin, {name: vars(self)[name] for name in self._numbers})
        with self._precision(), silent(pl_module.trainer):
            returned = run_step(twin, stage, batch)
        found = returned, list(losses), dict(logged)
        losses.clear()  # the stand-in holds itself, and what it holds would keep the graph, with sizes of before a cut
        logged.clear()
        return found


class AllSteps(WholeStep):
    """Several of a LightningModule's steps one after the other: a width that any of them reads is seen.

    In training mode only the training step runs, as in a fit. What that logs beside its loss is not looked at, nor are
    summands of losses that are made of weights alone: weight decay or a share of dead units may well be another number
    without some units.

    Args:
        pl_module: The module, attached to a Trainer.
        stages: Whose steps; see :class:`WholeStep`.
        apart: The training step runs in training mode only.
    """

    def __init__(
        self, pl_module: LightningModule, stages: Sequence[Stage | Literal["forward"]], apart: bool = False
    ) -> None:
        super().__init__(pl_module, stages[0])
        self._stages, self._apart = tuple(stages), apart

    def forward(self, *batches: Any) -> list[Any]:  # type: ignore[override]
        """What each step computes, on a batch of its own: what it returns and logs; of the training step its losses."""
        results: list[Any] = []
        for stage, batch in zip(self._stages, batches, strict=True):
            if stage != "fit" if self.training else (stage == "fit" and self._apart):
                continue
            gradients = stage == "fit" or torch.is_grad_enabled()  # a training step may ask for some
            weights = (*self.parameters(), *self.buffers())
            with torch.set_grad_enabled(gradients), Penalties(weights) as penalties:
                returned, losses, logged = self._run(stage, batch)
            if stage == "forward":
                results.append(returned)
                continue
            trained: list[Any] = [returned, losses]
            if stage != "fit" or next(tensors_behind(trained), None) is None:
                trained.append(logged)
            results.append(mapped(trained, penalties.without))
        return results


@dataclass
class Example:
    """A model and arguments that it runs on.

    Args:
        model: Shares its modules, and their names, with the LightningModule.
        args: Positional arguments of its forward.
        note: What it leaves out, for people.
    """

    model: ModuleView
    args: tuple[Any, ...]
    note: str = ""


def first_batch(trainer: Trainer) -> Any:
    """The first training batch of a ``fit`` that is about to start, as its step gets it.

    The loader forgets that it gave it.

    Args:
        trainer: In ``on_fit_start`` or later. Making the train loader before loops are restored loses a position that
            a checkpoint would restore: not for resumed runs.

    Raises:
        EmptyLoaderError: The loader gives no batch.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()  # what the loop will do, and then not again
    if trainer.train_dataloader is None:
        raise EmptyLoaderError(
            f"a training batch is needed here, and `limit_train_batches={trainer.limit_train_batches}` leaves none."
        )
    replay = Replay(trainer, trainer.lightning_module, "fit")
    with replay.quiet():
        return next(replay.batches(trainer.train_dataloader, 1))


def example_of(trainer: Trainer, pl_module: LightningModule, stage: Stage, batch: Any, samples: int = 2) -> Example:
    """Run the step of a stage on the first samples of a batch, and keep how it called the module's networks.

    Nothing is logged, no metric counts it, and everything is as before afterwards.

    Args:
        trainer: A Trainer inside that stage, or about to start it.
        pl_module: Its module.
        stage: The stage.
        batch: As the step gets it.
        samples: Of the batch; where the step does not take a part of it, the whole batch is used.

    Raises:
        ValueError: The step fails, or calls no submodule.
    """

    def run(given: Any) -> _Calls:
        with _recorded(pl_module) as calls:  # before there is a stand-in, whose parts have the hooks, too
            replay = Replay(trainer, pl_module, stage)
            with replay.quiet():
                replay.step(own(given))
        return calls

    calls = _on_part_or_whole(pl_module, stage, batch, samples, run)
    if not calls:
        raise ValueError(f"{type(pl_module).__name__}.{STEPS[stage]} calls no submodule of the module.")
    context = trainer.precision_plugin.forward_context
    model = RecordedCalls.of(pl_module, context, [name for name, *_ in calls])
    return Example(model, tuple((args, kwargs) for _, args, kwargs in calls))


def whole_step_of(
    trainer: Trainer,
    pl_module: LightningModule,
    stage: Stage | Literal["forward"],
    batch: Any,
    samples: int = 2,
    training: bool = False,
) -> Example:
    """The step of a stage on the first samples of a batch, as one module; tried once, and everything is as before.

    Args:
        trainer: A Trainer inside that stage, or about to start it.
        pl_module: Its module.
        stage: The stage; ``"forward"``: the module's forward, on the batch or the first of it.
        batch: As the step gets it.
        samples: Of the batch; where the step does not take a part of it, the whole batch is used.
        training: Try it in training mode, not in evaluation mode.

    Raises:
        ValueError: The step fails.
    """
    model = WholeStep.of(pl_module, stage)

    def run(given: Any) -> Any:
        replay = Replay(trainer, pl_module, "fit" if stage == "forward" else stage)
        with replay.quiet(), torch.set_grad_enabled(stage == "fit"):
            model.train(training)(own(given))
        return own(given)

    return Example(model, (_on_part_or_whole(pl_module, stage, batch, samples, run),))


def all_steps_of(trainer: Trainer, pl_module: LightningModule, batch: Any, samples: int = 2) -> Example:
    """``training_step``, and ``validation_step`` and ``forward`` where they run on a training batch, as one module.

    Args:
        trainer: A Trainer inside a ``fit``, or about to start it.
        pl_module: Its module.
        batch: As the training step gets it.
        samples: Of the batch; where a step does not take a part of it, the whole batch is used.

    Raises:
        ValueError: The training step fails, or it runs in training mode only and neither of the others runs.
    """
    found: dict[Stage | Literal["forward"], Any] = {}
    failed: dict[Stage | Literal["forward"], ValueError] = {}
    stages: tuple[Stage | Literal["forward"], ...] = ("fit", "validate", "forward")
    for stage in stages:
        try:
            found[stage] = whole_step_of(trainer, pl_module, stage, batch, samples).args[0]
        except ValueError as error:  # it is not there, or takes something else than a training batch
            failed[stage] = error
    if (first := failed.get("fit")) is None:
        return Example(AllSteps.of(pl_module, list(found)), tuple(found.values()))
    if not found:
        raise first
    try:  # such as with heads that a network has in training mode only
        step = whole_step_of(trainer, pl_module, "fit", batch, samples, training=True).args[0]
    except ValueError:
        raise first from None
    note = f"what only training computes was not compared, as {first.__cause__!r} comes up in evaluation mode"
    return Example(AllSteps.of(pl_module, ["fit", *found], True), (step, *found.values()), note)


def _on_part_or_whole(
    pl_module: LightningModule, stage: str, batch: Any, samples: int, run: Callable[[Any], Any]
) -> Any:
    part = apply_to_collection(batch, Tensor, lambda tensor: tensor[:samples] if tensor.ndim else tensor)
    try:
        return run(part)
    except Exception:
        try:
            return run(batch)
        except Exception as error:
            raise ValueError(
                f"{type(pl_module).__name__}.{STEPS.get(stage, stage)} does not run on a batch outside its loop "
                f"({type(error).__name__}: {error}), so its networks cannot be looked at."
            ) from error


@contextmanager
def _recorded(pl_module: LightningModule) -> Iterator[_Calls]:
    """The outermost submodule calls made inside."""
    calls: _Calls = []
    depth, handles = [0], []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if depth[0] == 0:
                fresh = apply_to_collection((args, dict(kwargs)), Tensor, lambda t: t.detach().clone())
                calls.append((name, *fresh))
            depth[0] += 1

        return hook

    def leave(*_: Any) -> None:
        depth[0] -= 1

    try:
        for name, module in pl_module.named_modules():
            if module is not pl_module and not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(enter(canonical_name(name)), with_kwargs=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class _Shared:
    """A value that deep copies of its holder share."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self


def _dtype(model: nn.Module) -> torch.dtype | None:
    """Of the first floating parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
