"""A student network and its teacher on the same inputs, as a training step calls the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.match import find_module
from lightning_efficient.companions.distillation import (
    attention_transfer,
    distillation_cosine,
    distillation_kl,
    distillation_mse,
)
from lightning_efficient.companions.recording import NetworkCall, Recorder, logits_of


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how; the arguments of :class:`~lightning_efficient.Distillation` of the same names."""

    kind: str
    temperature: float
    student: str | None
    teacher_module: str | None
    hidden: tuple[str, ...]
    teacher_hidden: tuple[str, ...]
    mask: str | None
    axis: int | None


class Taught:
    """Runs steps of a module, and tells how far the student was from the teacher in them.

    Args:
        pl_module: The module, whose student network is found in the first step if it is not named.
        teacher: Ready to run.
        how: What is compared.

    Raises:
        ValueError: A name is not there.
    """

    def __init__(self, pl_module: LightningModule, teacher: nn.Module, how: Comparison) -> None:
        hidden = tuple(full_name(pl_module, name, "hidden") for name in how.hidden)
        theirs = tuple(full_name(teacher, name, "teacher_hidden") for name in how.teacher_hidden)
        self.pl_module, self.network = pl_module, teacher
        self.how = how = replace(how, hidden=hidden, teacher_hidden=theirs)
        self.student: str | None = None
        self._ours: Recorder | None = None
        self._theirs: Recorder | None = None
        self._counterpart = teacher
        if how.student is not None:
            self._attach(how.student)

    def remove(self) -> None:
        """Take the hooks off the networks."""
        for recorder in (self._ours, self._theirs):
            if recorder is not None:
                recorder.remove()

    def run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """A step as it is: what it returns, and its calls of the student, for :meth:`distance`."""
        if self._ours is not None:
            return self._record(self._ours, step, args, kwargs)
        # The first step: hooks everywhere, of which the outermost tell; compiled code would be compiled with them.
        everywhere = Recorder(self.pl_module, None, self.how.hidden)
        try:
            with uncompiled():
                output, calls = self._record(everywhere, step, args, kwargs)
        finally:
            everywhere.remove()
        names = list(dict.fromkeys(call.name for call in calls))
        if "" not in names and len(names) > 1:
            raise ValueError(
                f"{type(self.pl_module).__name__}.training_step calls {', '.join(names)} one after the other, and not "
                "the module itself: the teacher would need a network that takes the batch and returns the logits. Put "
                "them into one module or into `forward`, and call that; or name the one to compare, `student`."
            )
        if not names:
            return output, []
        name = "" if "" in names else names[0]
        self._attach(name)
        return output, [call for call in calls if call.name == name]

    @staticmethod
    def _record(recorder: Recorder, step: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, list[NetworkCall]]:
        recorder.start()
        try:
            output = step(*args, **kwargs)
        finally:
            calls = recorder.stop()
        return output, [call for call in calls if call.trains]

    def _attach(self, student: str) -> None:
        student = full_name(self.pl_module, student, "student")
        same = isinstance(self.network, LightningModule) and student in dict(self.network.named_modules())
        given = self.how.teacher_module if self.how.teacher_module is not None else student if same else ""
        name = full_name(self.network, given, "teacher_module")
        self._counterpart = self.network.get_submodule(name)
        self.student = student
        self._ours = Recorder(self.pl_module, student, self.how.hidden)
        self._theirs = Recorder(self.network, name, self.how.teacher_hidden)

    def distance(self, calls: Sequence[NetworkCall], batch: Any) -> Tensor:
        """Mean over calls of the student of its distance to the teacher.

        Args:
            calls: From :meth:`run`, at least one.
            batch: Of the step, in which a mask may be.

        Raises:
            ValueError: The outputs do not fit each other.
        """
        return torch.stack([self._distance(call, batch) for call in calls]).mean()

    def _distance(self, call: NetworkCall, batch: Any) -> Tensor:
        if call.derived and call.name:
            raise ValueError(
                f"the inputs of the student, {call.name!r}, are made by other parts of the network, so the teacher "
                "would be shown what the student makes of the batch. Name a submodule that takes the batch, `student`, "
                "or put all parts into one module or into `forward`."
            )
        assert self._theirs is not None
        self._theirs.start()
        with torch.no_grad(), uncompiled():
            self._counterpart(*call.args, **call.kwargs)
        (taught,) = self._theirs.stop()
        if not self.how.hidden:
            return self._compared(call.output, taught.output, call, batch)
        distances = []
        for name, other in zip(self.how.hidden, self.how.teacher_hidden, strict=True):
            ours, theirs = call.hidden.get(name, []), taught.hidden.get(other, [])
            if not ours or len(ours) != len(theirs):
                raise ValueError(
                    f"in one call of the networks the student's {name!r} ran {len(ours)} times and the teacher's "
                    f"{other!r} {len(theirs)} times; expected the same number, from 1."
                )
            distances += [self._compared(a, b, call, batch) for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(distances).mean()

    def _compared(self, student: Any, teacher: Any, call: NetworkCall, batch: Any) -> Tensor:
        ours, theirs = (self._rows(logits_of(output)) for output in (student, teacher))
        mask, kind = self._mask(call, batch, ours), self.how.kind
        if kind == "kl":
            return distillation_kl(ours, theirs, self.how.temperature, mask)
        if kind == "attention":
            ours, theirs = (h.flatten(1, -2) if h.ndim > 3 else h for h in (ours, theirs))
            return attention_transfer(ours, theirs, mask)
        return (distillation_mse if kind == "mse_logits" else distillation_cosine)(ours, theirs, mask)

    def _rows(self, output: Tensor) -> Tensor:
        """With the classes or channels on the last axis."""
        axis = self.how.axis if self.how.axis is not None else -1 if output.ndim <= 3 else 1
        return output.movedim(axis, -1)

    def _mask(self, call: NetworkCall, batch: Any, rows: Tensor) -> Tensor | None:
        name = self.how.mask
        if name is None or rows.ndim < 3:
            return None
        found = call.kwargs.get(name)
        if found is None and isinstance(batch, Mapping):
            found = batch.get(name)
        if not isinstance(found, Tensor):
            return None
        if found.shape != rows.shape[:-1]:
            raise ValueError(
                f"`mask` is {name!r}, of shape {tuple(found.shape)}, and the outputs that are compared have shape "
                f"{tuple(rows.shape)}; expected {tuple(rows.shape[:-1])}. Name the one that fits; None: all count."
            )
        return found


def full_name(root: nn.Module, name: str, argument: str) -> str:
    """The whole name of a submodule, where the given one may begin inside the model.

    Args:
        root: Names count from here.
        name: Of the submodule; empty: the root.
        argument: Which argument names it, for the error.

    Raises:
        NoMatchError: There is none, or several.
    """
    module = find_module(root, name, argument, "Distillation")
    modules: dict[str, nn.Module] = dict(root.named_modules())
    return next(path for path, found in modules.items() if found is module)
