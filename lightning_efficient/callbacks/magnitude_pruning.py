"""``MagnitudePruning``: masks by a schedule, from outside the LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.common.match import Globs
from lightning_efficient.common.schedule import Schedule
from lightning_efficient.common.schema import Flag, OrNone, Record
from lightning_efficient.common.shards import local
from lightning_efficient.lifecycle.masks import PruningCallback
from lightning_efficient.lifecycle.strategies import is_sharded
from lightning_efficient.lifecycle.weights import Plan
from lightning_efficient.pruning import criteria
from lightning_efficient.pruning.gradual import GradualPruning
from lightning_efficient.weightspace.snapshot import SNAPSHOT, restore_snapshot


class MagnitudePruning(PruningCallback):
    """Prune weights by a schedule; what is pruned stays zero, through resume, averaging and export.

    The model's parameters hold the pruned weights, so checkpoints and evaluation need nothing of this package. Masks
    are a function of ``trainer.global_step``. Logs ``efficient/magnitude_pruning/sparsity``, the share of the
    targets' weights that are zero. Targets are the weights of linear layers, convolutions and attention projections,
    the output layer among them (``exclude`` it if it should stay); biases, norms and tied weights never are.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names; a glob also matches every module below a matching one. ``None``: all.
        exclude: Globs over module names, applied after ``include``.
        amount: Share of the weights to prune in the end, in [0, 1).
        schedule: ``"cubic"`` (Zhu & Gupta): fast, then ever slower. ``"one_shot"``: all at ``start``. ``"constant"``:
            all before the first step. ``"iterative"``: ``rounds`` times the same share of what is left, see ``rewind``.
        criterion: ``"magnitude"``, ``"taylor"`` (``|w · gradient|``), ``"wanda"`` (``|w|`` times the norm of its input)
            or ``"random"``, the control.
        scope: Which weights compete: ``"global"``, ``"layer"`` (each tensor), or ``"neuron"`` (each output).
        granularity: What is pruned as one: ``"element"``, ``"row"`` (a neuron or filter), ``"channel"`` (an input),
            ``"head"`` (the inputs of an attention's output projection that belong to a head), ``"2:4"`` (2 kept of 4
            inputs in a row) or ``"4x1"`` (blocks, rows x columns).
        start: When ``cubic`` and ``one_shot`` begin: steps (int) or fraction of the run (float). ``None``: 0.1 and 0.5.
        length: How long ``cubic`` takes, likewise. ``None``: 0.6.
        every: Between two changes of ``cubic``, likewise.
        rounds: How often ``iterative`` prunes; the run is divided into ``rounds + 1`` equal parts.
        rewind: After each round of ``iterative``: ``"weights"`` (lottery ticket: weights, buffers, optimizers and
            schedulers go back), ``"learning_rate"`` (learning rates and schedulers go back), ``"none"`` (fine-tuning).
        rewind_to: The step to go back to, in steps (int) or as a fraction of the run (float); 0 is initialization.
        amounts: Glob over module names → its own amount instead of ``amount``; the first that covers a module counts,
            and its weights compete among themselves.
        embeddings: Include ``nn.Embedding`` tables.
        seed: Of the random criterion.
        keep_zeros: Hold weights that are zero when a new run begins (a model that was pruned elsewhere) at zero.

    Raises:
        ValueError: An argument is out of range, or the schedule does not fit into the run.
    """

    method = "magnitude_pruning"
    only_with = (
        ("schedule", ("cubic",), ("every",)),
        ("schedule", ("iterative",), ("rounds", "rewind", "rewind_to")),
        ("criterion", ("random",), ("seed",)),
    )
    sharded = True
    progress_schema = Record({"snapshot": OrNone(SNAPSHOT), "back": Flag()})

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        amount: float = 0.5,
        schedule: Literal["cubic", "one_shot", "constant", "iterative"] = "cubic",
        criterion: Literal["magnitude", "taylor", "wanda", "random"] = "magnitude",
        scope: Literal["global", "layer", "neuron"] = "global",
        granularity: str = "element",
        start: int | float | None = None,
        length: int | float | None = None,
        every: int | float = 0.01,
        rounds: int = 5,
        rewind: Literal["weights", "learning_rate", "none"] = "weights",
        rewind_to: int | float = 0,
        amounts: dict[str, float] | None = None,
        embeddings: bool = False,
        seed: int = 0,
        keep_zeros: bool = False,
    ) -> None:
        super().__init__(enabled, include, exclude, embeddings, keep_zeros)
        self.amount, self.amounts, self.scope, self.granularity = amount, amounts, scope, granularity
        self.criterion, self.seed = criterion, seed
        self.rewind, self.rewind_to = rewind, rewind_to
        self.schedule = Schedule(schedule, start, length, every, rounds)
        self.rule = GradualPruning(
            amount, self.schedule, criterion, scope, granularity, rewind, rewind_to, amounts, seed
        )
        self._globs = Globs("amounts", (), {}, type(self).__name__)
        self._steps: tuple[int, ...] = ()
        self._step = 0
        self._applied: dict[str, float] = {}
        self._back = False
        self._inputs: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._collect = True
        self._handles: list[RemovableHandle] = []

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        names = ("amount", "criterion", "scope", "granularity", "rewind", "rewind_to", "amounts", "seed")
        schedule = {"schedule" if name == "kind" else name: value for name, value in vars(self.schedule).items()}
        return super().config() | {name: getattr(self, name) for name in names} | schedule

    def without_effect(self) -> str:
        """Nothing is pruned."""
        none = not any([self.amount, *(self.amounts or {}).values(), self.keep_zeros])
        return "amount=0 prunes nothing" if none else ""

    # -- life cycle ------------------------------------------------------------------------------------------------

    def plan(self, pl_module: LightningModule) -> Plan:
        """Choose and check the weights, and read ``amounts`` against them, without changing anything."""
        plan = super().plan(pl_module)
        self._globs = self.rule.read_amounts(pl_module, self._targets, type(self).__name__)
        return plan

    def check_sharded(self, pl_module: LightningModule) -> None:
        """Refuse what needs more than parts of the inputs; which units there can be, every weight says by its cut."""
        mesh = pl_module.device_mesh
        if self.criterion == "wanda" and mesh is not None and mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "MagnitudePruning(criterion='wanda') looks at the inputs of layers, of which tensor parallel layers "
                "have parts. Use criterion='magnitude' or 'taylor', or FSDP2 alone (tensor_parallel_size=1)."
            )

    def progress(self) -> dict[str, Any]:
        """What to go back to, and whether that is due."""
        return {"snapshot": None if self._snapshot is None else self._snapshot.as_plain(), "back": self._back}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on with the schedule of the run that is resumed."""
        self._snapshot, self._back = restore_snapshot(progress["snapshot"]), progress["back"]

    def rewound(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune again, when the schedule is where it was."""
        super().rewound(trainer, pl_module)
        self._unwatch()
        self._applied, self._step = {}, -1

    def check_progress(self, state: Mapping[str, Any], step: int) -> None:
        """There is something to go back to where the schedule does that, and it is due only between two steps."""
        super().check_progress(state, step)
        schedule, there = state["standing"]["schedule"], state["snapshot"] is not None
        if schedule and self.rule.returns and step > schedule[3] and not there:
            self.refuse("['snapshot']", f"there after step {schedule[3]}", state["snapshot"])
        if state["back"] and not (self.rule.returns and there and self.criterion in ("taylor", "wanda")):
            self.refuse("['back']", "false", state["back"])

    def restart(self) -> None:
        """Begin the schedule anew; masks that the model has stay on."""
        super().restart()
        self._applied, self._back, self._step, self._steps = {}, False, -1, ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule, before anything is pruned."""
        resumed = self.standing.resumed
        super().on_train_start(trainer, pl_module)
        if self.enabled:
            if resumed:
                self._check_snapshot(trainer, pl_module, self._snapshot, "['snapshot']", whole=True)
            self._steps = self.standing.fix(trainer, type(self).__name__, self.rule.resolve, self.schedule.end)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prune where the weights alone decide; else prepare to look at this batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._boundary is None:
            return
        self._step = step = self.step(trainer)
        if self.rule.returns and self._snapshot is None and step >= self._steps[3]:
            self._snapshot = self._take(trainer, pl_module)
        if not self._back and self._due(step):
            if self.criterion in ("magnitude", "random"):
                self._prune(trainer, pl_module, {name: self._score(name) for name in self._transforms}, advance=True)
            elif self.criterion == "wanda" and not self._handles:
                self._watch_inputs(pl_module)
        if self._back:
            self._go_back(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Forwards from here are recomputations of activation checkpointing."""
        self._collect = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gradients of the network's weights, before anything is done to them; those of the last micro-batch stay."""
        self._collect = True
        if self._boundary is not None and self.criterion == "taylor" and self._due(self.step(trainer)):
            grads = {name: self._targets[name].param.grad for name in self._transforms}
            self._scores = {
                name: criteria.taylor(self._sites()[name].weight, local(grad))
                for name, grad in grads.items()
                if grad is not None
            }

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Prune where the batch decides, then on with the step."""
        if self._handles:
            self._scores = self._input_scores(trainer)
        scores, self._scores = self._scores, {}
        # A missing or infinite score (an unused layer, a step that the gradient scaler will skip): try the next step.
        if scores and scores.keys() == self._transforms.keys() and self._finite(scores):
            self._prune(trainer, pl_module, scores, advance=False)
            self._unwatch()
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was pruned, and if the schedule was not finished."""
        if self._boundary is not None and (late := self._due(self._step)):
            rank_zero_warn(
                f"{type(self).__name__} could not prune as scheduled ({late}): criterion={self.criterion!r} had no "
                "finite score for every target in one step. Are layers unused, compiled, or never called themselves?"
            )
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._unwatch()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._unwatch()
        super().teardown(trainer, pl_module, stage)

    def _finite(self, scores: Mapping[str, Tensor]) -> bool:
        """On all processes."""
        return not any(self._counts({name: ~torch.isfinite(score) for name, score in scores.items()}).values())

    # -- pruning ---------------------------------------------------------------------------------------------------

    def _groups(self) -> dict[str, tuple[float, list[str]]]:
        return self.rule.groups(self._globs, self._present())

    def _due(self, step: int) -> dict[str, float]:
        """Pattern → share to be pruned now, where it has grown."""
        return self.rule.due(step, self._steps, self._groups(), self._applied)

    def _score(self, name: str) -> Tensor:
        return self.rule.score(name, self._sites()[name])

    def _prune(self, trainer: Trainer, pl_module: LightningModule, scores: Mapping[str, Tensor], advance: bool) -> None:
        if self._waits(trainer):
            return
        due = self._due(self.step(trainer))
        layouts = {name: self._layout(name) for name in self._transforms} if is_sharded(trainer) else None
        masks = self.rule.masks(due, self._groups(), self._targets, scores, self.masks, layouts)
        changed = self._set_masks(trainer, pl_module, masks, advance)
        self._applied |= due
        self._back = changed and self.rule.returns

    def _go_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._snapshot is not None
        self._rewind(trainer, pl_module, self._snapshot, weights=self.rewind == "weights")
        self._back = False

    # -- the inputs of layers, for wanda ---------------------------------------------------------------------------

    def _watch_inputs(self, pl_module: LightningModule) -> None:
        self._inputs = {}
        for name in self._transforms:
            hook = partial(self._see, name, pl_module)
            self._handles.append(self._targets[name].module.register_forward_pre_hook(hook, with_kwargs=True))

    def _see(
        self, name: str, pl_module: LightningModule, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> None:
        if self._collect and pl_module.training:
            squared = criteria.squared_input_norm(module, args[0] if args else next(iter(kwargs.values())))
            self._inputs[name] = self._inputs.get(name, 0) + squared

    def _input_scores(self, trainer: Trainer) -> dict[str, Tensor]:
        scores = {}
        for name, squared in self._inputs.items():
            target = self._targets[name]
            total = squared if trainer.world_size == 1 else trainer.strategy.reduce(squared, reduce_op="sum")
            assert isinstance(total, Tensor)
            weight, groups = target.canonical(self._sites()[name].weight), getattr(target.module, "groups", 1)
            scores[name] = target.canonical(criteria.wanda(weight, total.sqrt(), groups, self._layout(name)))
        return scores

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs, self._scores, self._collect = [], {}, {}, True

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks and what they saw."""
        return super().__getstate__() | {"_handles": [], "_inputs": {}, "_scores": {}}
