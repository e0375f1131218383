"""``Distillation``: a teacher's outputs beside the labels, without touching the LightningModule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import find_module
from lightning_efficient.common.schedule import check_span, check_spans, transition, transition_steps
from lightning_efficient.common.schema import MapOf, Number, OrNone, Record, TensorOf, Text, check
from lightning_efficient.lifecycle.base import EfficientCallback, peers
from lightning_efficient.lifecycle.hooks import hook_files
from lightning_efficient.lifecycle.recipe import Entry, RecipeError
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.lifecycle.structural import StructuralCallback
from lightning_efficient.lifecycle.teacher import find_teacher, fingerprint, initial_copy, made_ready
from lightning_efficient.lifecycle.weights import WeightSpaceCallback
from lightning_efficient.trainer.step import wrap_training_step
from lightning_efficient.trainer.taught import Comparison, Taught


class Distillation(EfficientCallback):
    """Train towards a teacher as well as towards the labels: ``(1 - w) · loss + w · distance to the teacher``.

    ``training_step`` runs as it is; whatever calls of the student network it makes, with any number of them, the
    teacher gets the same inputs and the loss that the step returns has the mean distance added. Steps that return
    ``None`` stay as they are, and dicts keep their other keys. The teacher is in no state dict, optimizer or process
    group; it runs in evaluation mode without gradients, in the run's precision. With ``alpha=0`` training is that
    without the callback, to the bit.

    ``teacher="initial"`` is the network as it is when training begins, before any other callback of this package has
    changed it: list this one first. Checkpoints hold its weights, so that a resumed run has the same teacher. Any other
    teacher is found again, and refused if it is not the same.

    Logs ``efficient/distillation/loss``, the distance without its weight, and ``efficient/distillation/weight``.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        teacher: ``"initial"``; the path of a checkpoint of the same class; ``"timm:<name>"`` or ``"hf:<name or
            folder>"`` for pretrained weights; or a module, a LightningModule among them (copied, never changed).
        alpha: The weight ``w``, from 0 to 1.
        temperature: Of ``"kl"``, above 0.
        kind: ``"kl"``: ``T² KL(teacher || student)`` of the softened predictions; ``"mse_logits"``;
            ``"cosine_hidden"``: one minus the cosine of hidden states, which need the teacher's width;
            ``"attention"``: attention transfer, where the hidden states are large, whatever their width.
        schedule: ``"constant"``, or down to 0, ``"linear"`` or ``"cosine"``.
        hold: How long the weight is ``alpha`` before it goes down: steps (int) or fraction of the run (float).
        length: How long it takes to go down, likewise.
        student: Name of the submodule that takes the batch and returns the logits. ``None``: what ``training_step``
            calls, the module itself or its only network, found in the first step.
        teacher_module: Its counterpart in the teacher. ``None``: that of the same name in a LightningModule, else the
            teacher itself.
        hidden: Names of the submodules whose outputs are compared, for the last two kinds.
        teacher_hidden: Their counterparts in the teacher. ``None``: the same names.
        mask: Name under which the network, or the batch, is given which tokens count. ``None``: all do.
        axis: Of the classes or channels. ``None``: the last of up to 3 axes, 1 of more (images).

    Raises:
        ValueError: An argument is out of range or names nothing; under manual optimization; a callback that changes the
            model is listed before; the outputs do not fit.
        RecipeError: The checkpoint that is resumed has no teacher, or another one.
    """

    method = "distillation"
    only_with = (("schedule", ("linear", "cosine"), ("hold", "length")), ("kind", ("kl",), ("temperature",)))
    constants = ("teacher", "fingerprint")
    resume_may_change = frozenset({
        "enabled", "teacher", "alpha", "temperature", "kind", "student", "teacher_module", "hidden", "teacher_hidden",
        "mask", "axis",
    })  # fmt: skip
    progress_schema = Record(
        {"teacher": OrNone(MapOf(Text(), TensorOf())), "fingerprint": OrNone(Number(finite=False))}
    )

    def __init__(
        self,
        enabled: bool = True,
        teacher: Any = "initial",
        alpha: float = 0.5,
        temperature: float = 2.0,
        kind: Literal["kl", "mse_logits", "cosine_hidden", "attention"] = "kl",
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        hold: int | float = 0.0,
        length: int | float = 1.0,
        student: str | None = None,
        teacher_module: str | None = None,
        hidden: list[str] | None = None,
        teacher_hidden: list[str] | None = None,
        mask: str | None = "attention_mask",
        axis: int | None = None,
    ) -> None:
        super().__init__(enabled)
        # Not as an attribute of its own: a LightningModule of the student's class would pass for an averaged copy.
        self._given = (teacher,)
        self.alpha, self.temperature, self.kind = alpha, temperature, kind
        self.schedule, self.hold, self.length = schedule, hold, length
        self.student, self.teacher_module = student, teacher_module
        self.hidden, self.teacher_hidden, self.mask, self.axis = hidden, teacher_hidden, mask, axis
        self._check_arguments()
        self._steps = (0, 0)
        self._taught: Taught | None = None
        self._undo: Callable[[], None] | None = None
        self._last: dict[str, Tensor] | None = None
        self._earlier: list[Change] = []
        self._said = False
        self.restart()

    def _check_arguments(self) -> None:
        if not isinstance(self.teacher, (str, nn.Module)):
            raise ValueError(
                f"`teacher` takes 'initial', a path, 'timm:...', 'hf:...' or a module; got {self.teacher!r}."
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must be a weight from 0 to 1; got {self.alpha!r}.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be a finite number above 0; got {self.temperature!r}.")
        for name in ("hold", "length"):
            check_span(name, getattr(self, name))
        if self.schedule != "constant":
            check_spans(hold=self.hold, length=self.length)
        inside = self.kind in ("cosine_hidden", "attention")
        if inside != bool(self.hidden):
            needed = "the names of the submodules that are compared" if inside else "None, as it compares logits"
            raise ValueError(f"kind={self.kind!r} needs `hidden`: {needed}; got {self.hidden!r}.")
        if self.teacher_hidden is not None and len(self.teacher_hidden) != len(self.hidden or ()):
            raise ValueError(
                f"`teacher_hidden` must name as many submodules as `hidden`; got {self.teacher_hidden} for "
                f"{self.hidden}."
            )

    @property
    def teacher(self) -> Any:
        """What was asked for."""
        return self._given[0]

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data; a teacher that is a module is named by its type."""
        names = (
            "alpha", "temperature", "kind", "schedule", "hold", "length", "student", "teacher_module", "hidden",
            "teacher_hidden", "mask", "axis",
        )  # fmt: skip
        teacher = self.teacher if isinstance(self.teacher, str) else type(self.teacher).__name__
        return {"enabled": self.enabled, "teacher": teacher} | {name: getattr(self, name) for name in names}

    # -- life cycle ----------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """No teacher yet."""
        self._initial: dict[str, Tensor] | None = None
        self._fingerprint: float | None = None

    def progress(self) -> dict[str, Any]:
        """The teacher, or how to tell it."""
        return {"teacher": self._initial, "fingerprint": self._fingerprint}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """The teacher of the run that is resumed."""
        self._initial, self._fingerprint = progress["teacher"], progress["fingerprint"]

    def check_checkpoint(
        self, pl_module: LightningModule, checkpoint: dict[str, Any], entries: Sequence[Entry]
    ) -> None:
        """The initial network of a run that had no teacher is lost."""
        asked = self.enabled and pl_module.trainer.state.fn == "fit"
        state, initial = checkpoint.get("callbacks", {}).get(self.state_key), self.teacher == "initial"
        found = isinstance(state, Mapping)
        if asked and initial and (state is None or (found and state.get("fingerprint") is not None)):
            raise RecipeError(
                "Distillation(teacher='initial') cannot resume from this checkpoint: the network with which its run "
                "began is not in it, as it was trained without, or with another teacher. Give the teacher as a path."
            )
        if asked and not initial and found and state.get("teacher") is not None:
            raise RecipeError(
                f"Distillation(teacher={self.config()['teacher']!r}) cannot resume from this checkpoint, whose run has "
                "teacher='initial'. Give that, or begin a new run from the weights alone "
                f"({type(pl_module).__name__}.load_from_checkpoint(path))."
            )
        super().check_checkpoint(pl_module, checkpoint, entries)

    def check_progress(self, state: Mapping[str, Any], step: int) -> None:
        """There is the one of the two that this teacher leaves."""
        super().check_progress(state, step)
        initial = self.teacher == "initial"
        for field, there in (("teacher", initial), ("fingerprint", not initial)):
            if (state[field] is not None) != there:
                self.refuse(f"['{field}']", "there" if there else "null", state[field])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; note what earlier fits have changed."""
        super().setup(trainer, pl_module, stage)
        if not self.enabled or stage != "fit":
            return
        _check_automatic(pl_module)
        hook_files(pl_module)
        self._earlier = list(attachment(pl_module).changes)
        ours = peers(trainer)
        before = [cb for cb in ours[: ours.index(self)] if isinstance(cb, (StructuralCallback, WeightSpaceCallback))]
        if self.teacher == "initial" and before:
            raise ValueError(
                f"the initial network is the teacher, and {', '.join(type(cb).__name__ for cb in before)} would change "
                "it first. List Distillation before every callback that changes the model."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the teacher and wrap ``training_step``, before weights are changed."""
        super().on_fit_start(trainer, pl_module)
        if not self.enabled:
            return
        _check_automatic(pl_module)
        hidden = tuple(self.hidden or ())
        how = Comparison(
            self.kind, self.temperature, self.student, self.teacher_module, hidden,
            tuple(self.teacher_hidden or hidden), self.mask, self.axis,
        )  # fmt: skip
        self._taught = Taught(pl_module, self._find(trainer, pl_module), how)
        self._undo = wrap_training_step(pl_module, partial(self._step, trainer, pl_module))
        teacher = self._taught.network
        rank_zero_info(
            f"Distillation by {self.kind} from {self.config()['teacher']}: {type(teacher).__name__}, "
            f"{sum(p.numel() for p in teacher.parameters())} parameters."
        )

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        if self.teacher == "initial":
            teacher: nn.Module = initial_copy(pl_module, self._earlier)
            state = {name: value for name, value in teacher.state_dict().items() if isinstance(value, Tensor)}
            if self._initial is not None:
                mine = Record({name: TensorOf(t.dtype, shape=tuple(t.shape)) for name, t in state.items()})
                where = f"the checkpoint's state of {self.state_key}, field ['teacher'],"
                check(self._initial, mine, where, RecipeError)
                teacher.load_state_dict(self._initial, strict=False)
            self._initial = {name: value.detach().cpu().clone() for name, value in state.items()}
        else:
            inner = (
                pl_module
                if self.student is None
                else find_module(pl_module, self.student, "student", type(self).__name__)
            )
            teacher = find_teacher(self.teacher, pl_module, inner)
            found, known = fingerprint(teacher), self._fingerprint
            if known is not None and not (found == known or (found != found and known != known)):
                raise RecipeError(
                    f"Distillation: the teacher, {self.config()['teacher']!r}, is not the one with which the "
                    "checkpoint was written: its weights differ. Resume with the same weights."
                )
            self._fingerprint = found
        return made_ready(teacher, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule."""
        super().on_train_start(trainer, pl_module)
        if self.enabled and self.schedule != "constant":
            first, length = self.standing.fix(trainer, type(self).__name__, self._resolve, sum)
            self._steps = first, length

    def _resolve(self, total: int | None) -> tuple[int, int]:
        return transition_steps(total, hold=self.hold, length=self.length)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the last step had."""
        if self._last is not None and self.logs_now(trainer, pl_module):
            for name, value in self._last.items():
                pl_module.log(f"{self.prefix}/{name}", value, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave ``training_step`` as it was found."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave ``training_step`` as it was found."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave ``training_step`` as it was found."""
        super().teardown(trainer, pl_module, stage)
        self._release()

    def _release(self) -> None:
        if self._taught is not None:
            self._taught.remove()
        if self._undo is not None:
            self._undo()
        self._forget()

    def _forget(self) -> None:
        self._taught, self._undo, self._last, self._earlier, self._said = None, None, None, [], False

    # -- a step --------------------------------------------------------------------------------------------------

    def _weight(self, trainer: Trainer) -> float:
        if self.schedule == "constant":
            return self.alpha
        first, length = self._steps
        return self.alpha * transition(self.step(trainer), None, hold=first, length=length, shape=self.schedule)

    def _step(
        self, trainer: Trainer, pl_module: LightningModule, step: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """``training_step``, with the distance to the teacher in its loss."""
        weight, taught = self._weight(trainer), self._taught
        if weight == 0 or taught is None:
            return step(*args, **kwargs)
        output, calls = taught.run(step, args, kwargs)
        task = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(task, Tensor):
            return output
        if not calls:
            if not self._said:
                self._said = True
                rank_zero_warn(
                    f"Distillation: a training_step of {type(pl_module).__name__} did not call its student network "
                    "with gradients; its loss is left as it is."
                )
            return output
        distance = taught.distance(calls, args[0] if args else next(iter(kwargs.values()), None))
        self._last = {"loss": distance.detach(), "weight": torch.tensor(weight)}
        loss = (1 - weight) * task + weight * distance
        if not isinstance(output, Mapping):
            return loss
        changed: Any = copy.copy(output)
        changed["loss"] = loss
        return changed

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit, so that ``ddp_spawn`` can send the callback to its processes."""
        return self.__dict__ | {"_taught": None, "_undo": None, "_last": None, "_earlier": []}


def _check_automatic(pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"Distillation adds to the loss that `training_step` returns, and {type(pl_module).__name__} optimizes "
            "manually: its losses are not seen. Use automatic optimization, or call "
            "`lightning_efficient.functional.distillation_kl` in your step."
        )
