"""What every callback of the suite shares: the switch, the globs, where its fit stands, one hparams record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_efficient.common.arguments import OnlyWith, check_call, without_use
from lightning_efficient.common.match import Choice, check_globs, parameters_by_name
from lightning_efficient.common.registry import METHODS
from lightning_efficient.common.schema import OneOf, Record, check, short
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.hooks import hook_checking, hook_cutting, hook_loading, unhook_checking
from lightning_efficient.lifecycle.hparams import HPARAM_PREFIX, log_hparams
from lightning_efficient.lifecycle.recipe import CONFIG, Entry, RecipeError
from lightning_efficient.lifecycle.standing import STANDING, Standing
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.lifecycle.strategies import check_finders, check_schedules, check_strategy, is_sharded


class EfficientCallback(Callback):
    """Base class of every callback in this package.

    What belongs to a fit is kept in :attr:`standing` and in what :meth:`progress` returns; it begins anew in every
    ``setup("fit")`` (:meth:`restart`) and comes back where a fit resumes (:meth:`resume`). What is true of the model
    stays with the model: :meth:`entry`.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names; a glob also matches every module below a matching one. ``None``: all.
        exclude: Globs over module names, applied after ``include``.
    """

    method: ClassVar[str]
    # Of what `progress` returns, what is the same all through a fit: a rollback need not copy it.
    constants: ClassVar[tuple[str, ...]] = ()
    # Whether it watches the training, so that its own state is none of what a rollback puts back.
    guards: ClassVar[bool] = False
    # Of what `progress` returns: a file is checked against it before anything is loaded.
    progress_schema: ClassVar[Record] = Record({})
    # Whether it works on shards of parameters (FSDP2, tensor parallel).
    sharded: ClassVar[bool] = False
    # Whether it changes weights, or only looks.
    changes_weights: ClassVar[bool] = True
    # Arguments that a resumed run may give other values. None: all of them.
    resume_may_change: ClassVar[frozenset[str] | None] = None
    # Arguments that older files lack, and what was done before there were these.
    later_arguments: ClassVar[Mapping[str, Any]] = {}
    # An argument, values of it, and the arguments that mean something with these values alone.
    only_with: ClassVar[tuple[OnlyWith, ...]] = ()
    _autolog_paused = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have every callback refuse arguments of other types than its signature says, before it uses them."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", _checked(cls.__init__))  # noqa: B010

    def __init__(
        self, enabled: bool = True, include: list[str] | None = None, exclude: list[str] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(enabled, bool):
            raise TypeError(
                f"`enabled`, the first argument of {type(self).__name__}, takes True or False; got {enabled!r}. Give "
                "the other arguments by name."
            )
        for name, globs in (("include", include), ("exclude", exclude)):
            if globs is not None:
                check_globs(name, globs, type(self).__name__)
        self.enabled = enabled
        self.include = include
        self.exclude = exclude
        self.standing = Standing()
        # How often this callback has gone back to earlier weights on purpose: a guard then has to begin anew.
        self.rewinds = 0
        self._resumes = True
        self._logged_step = -1
        self._optimizers: list[int] = []

    @property
    def prefix(self) -> str:
        """Of the names under which quantities are logged."""
        return f"{HPARAM_PREFIX}{self.method}"

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; differs between two differently targeted instances."""
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def needs_whole(self) -> bool:
        """Whether it has to run the model before that is cut over processes: ``attachment(module).unsharded``."""
        return False

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return {"enabled": self.enabled, "include": self.include, "exclude": self.exclude}

    def without_effect(self) -> str:
        """Why training is as without this callback, with the arguments that it has; empty if it is not."""
        return ""

    @property
    def only_looks(self) -> bool:
        """Whether the arguments ask for that."""
        return False

    @property
    def goes_back(self) -> bool:
        """Whether a fit may go back to an earlier training state of its own, schedules of learning rates included."""
        return False

    # -- what belongs to a fit -----------------------------------------------------------------------------------

    def restart(self) -> None:
        """Forget the progress of the last fit; a new one begins, perhaps of another model."""

    def progress(self) -> dict[str, Any]:
        """How far this fit is, as plain data, beside :attr:`standing`."""
        return {}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on from there; the data fits :attr:`progress_schema`."""

    def rewound(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An earlier training state is back, :attr:`standing` and progress with it: derive anew what follows from it.

        Args:
            trainer: Between two steps.
            pl_module: Its module.
        """

    def state_dict(self) -> dict[str, Any]:
        """Where the fit stands; also a marker, so that Lightning warns when one resumes without this callback."""
        if not self.enabled:
            return {}
        standing = self.standing.as_plain()
        return {"method": self.method, "standing": standing, "config": self.config(), **self.progress()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the fit that is resumed; files that are only evaluated have nothing to say of a fit."""
        if self.enabled and self._resumes and state_dict:
            self._check_state(state_dict)
            self.standing = Standing.from_plain(state_dict["standing"])
            self.resume({k: v for k, v in state_dict.items() if k not in ("method", "standing", "config")})

    def _check_state(self, state: Any) -> None:
        fields = {**self.progress_schema.fields, "method": OneOf((self.method,)), "standing": STANDING}
        optional = {**self.progress_schema.optional, "config": CONFIG}  # older files have none
        check(state, Record(fields, optional), f"the checkpoint's state of {self.state_key}", RecipeError)

    def check_state(self, state: Mapping[str, Any], step: int) -> None:
        """Refuse a whole state, as :meth:`state_dict` returns it, that is not of a fit of this callback.

        Args:
            state: From a file.
            step: The Trainer's steps done then.

        Raises:
            RecipeError: Says what is wrong.
        """
        self._check_state(state)
        if state["standing"]["begun"]:
            self.check_progress(state, step - state["standing"]["start"])

    def check_progress(self, state: Mapping[str, Any], step: int) -> None:
        """Refuse a state whose fields contradict each other, before anything is loaded, by :meth:`refuse`.

        Args:
            state: Of a fit that had begun; fits :attr:`progress_schema`, and holds ``standing``, as plain data.
            step: Optimizer steps of that fit done.
        """

    def refuse(self, field: str, expected: str, found: Any) -> NoReturn:
        """Refuse a state for the value of a field.

        Args:
            field: Its path, such as ``['hesso']['chosen']``.
            expected: What it should be.
            found: What it is.

        Raises:
            RecipeError: Says so.
        """
        raise RecipeError(
            f"the checkpoint's state of {self.state_key}, field {field}, should be {expected}; got {short(found)}."
        )

    def _resolve(self, total: int | None) -> Sequence[int] | None:
        """The schedule in steps in a run of ``total``, as :meth:`Standing.fix` takes it; None: there is none."""
        return None

    def _check_standing(self, standing: Mapping[str, Any], step: int) -> None:
        """The schedule that a file holds follows from the arguments."""
        if step < 0:
            self.refuse("['standing']['start']", f"at most the checkpoint's step, {step + standing['start']}", standing)
        if standing["schedule"] is None:
            return
        try:
            made = self._resolve(standing["total"])
        except ValueError:
            made = ()
        if made is not None and list(made) != list(standing["schedule"]):
            expected = f"{list(made)}, by its arguments in a run of {standing['total']} steps (`total`)"
            self.refuse("['standing']['schedule']", expected if made else "one for `total`", standing["schedule"])

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def entry(self, pl_module: LightningModule) -> Entry | None:
        """What the file says of the weights that are saved now; None: nothing beyond what the model carries."""
        return None

    def check_checkpoint(
        self, pl_module: LightningModule, checkpoint: dict[str, Any], entries: Sequence[Entry]
    ) -> None:
        """Before anything is loaded, refuse a file that this callback cannot go on from; changes nothing.

        Args:
            pl_module: The module, inside a Trainer.
            checkpoint: The file.
            entries: Its recipe.

        Raises:
            RecipeError: Says which callback, what the file has and what was expected.
        """
        states = checkpoint.get("callbacks", {})
        if pl_module.trainer.state.fn != "fit":
            return
        entry = next((e for e in entries if (e.method, e.key) == (self.method, self.state_key)), None)
        if entry is not None and not self.enabled:
            raise RecipeError(
                f"the checkpoint was trained with {self.state_key}, which this run switches off (enabled=False): the "
                "state of its optimizers does not fit. Switch it on to resume, or start a new run from the weights "
                f"alone ({type(pl_module).__name__}.load_from_checkpoint(path))."
            )
        if not self.enabled:
            return
        if entry is not None:
            self._check_config(entry.config)
        if self.state_key not in states:
            return
        state = states[self.state_key]
        self._check_state(state)
        if "config" in state:
            self._check_config(state["config"])
        if type(done := checkpoint.get("global_step")) is int:
            step = done - state["standing"]["start"]
            self._check_standing(state["standing"], step)
            if state["standing"]["begun"]:
                self.check_progress(state, step)

    def _check_config(self, config: Mapping[str, Any]) -> None:
        if self.resume_may_change is None:
            return
        now = {name: value for name, value in self.config().items() if name not in self.resume_may_change}
        recipe.check_config(type(self).__name__, {**self.later_arguments, **config}, now)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether a fit resumes. What is on has been asked by the module's hook already."""
        self._resumes = trainer.state.fn == "fit"
        # Before there are optimizers, it is the file to resume from, and not one that a finder has written.
        if self._resumes and self.enabled and self._optimizers == [id(one) for one in trainer.optimizers]:
            check_finders(trainer, type(self).__name__, self.goes_back)
        if not self.enabled:
            self.check_checkpoint(pl_module, checkpoint, recipe.read(checkpoint))

    # -- life cycle ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything has changed; begin anew."""
        if self.enabled:
            hook_loading(pl_module)
        elif stage == "fit":
            hook_checking(pl_module)
        if stage == "fit":
            if self.enabled:
                METHODS.check([cb.method for cb in peers(trainer)])
                check_strategy(trainer, type(self).__name__, self.sharded, self.changes_weights)
                if self.goes_back:
                    check_schedules(trainer, type(self).__name__)
                if is_sharded(trainer):
                    self.check_sharded(pl_module)
                    hook_cutting(pl_module)
            self.standing = Standing()
            self._logged_step, self._optimizers = -1, [id(one) for one in trainer.optimizers]
            self.restart()

    def check_sharded(self, pl_module: LightningModule) -> None:
        """Where :attr:`sharded`, refuse arguments and modules that do not work on shards; changes nothing.

        Raises:
            ValueError: Says what works instead.
        """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse globs that name nothing; log one record of hyper-parameters for the whole suite."""
        if self.enabled and not self.only_looks and (why := self.without_effect()):
            rank_zero_warn(f"{type(self).__name__} changes nothing: {why}.")
        if self.enabled:  # callbacks that know what they choose from have done so more strictly
            names = parameters_by_name(pl_module)
            Choice.of(pl_module, self.include, self.exclude, type(self).__name__, names)
        everyone = [cb for cb in trainer.callbacks if isinstance(cb, EfficientCallback)]  # type: ignore[attr-defined]
        if everyone[0] is self and trainer.enable_autolog_hparams:
            log_hparams(trainer, pl_module, everyone)
            # Lightning's own record, which comes next, would be a second one of half the keys.
            trainer.enable_autolog_hparams, self._autolog_paused = False, True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The schedule of this fit counts from here, unless it goes on."""
        if self.enabled:
            self.standing.begin(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep two samples of the first batch, for an :func:`~lightning_efficient.export` without example inputs."""
        if self.enabled and attachment(pl_module).example_batch is None:
            attachment(pl_module).example_batch = apply_to_collection(batch, Tensor, _two_samples)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if the schedule was not finished: training ended early, or was shorter than Lightning had estimated."""
        if self.enabled and (missing := self.standing.missing(trainer)):
            done = self.step(trainer)
            rank_zero_warn(
                f"{type(self).__name__}: training ended at step {done}, and its schedule ends at step "
                f"{done + missing}: {self.unfinished()}"
            )

    def unfinished(self) -> str:
        """What it means that the schedule was not finished, for the report."""
        return "it stops half way."

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer as it was found."""
        self._resume_autolog(trainer)
        unhook_checking(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer as it was found."""
        self._resume_autolog(trainer)

    def _resume_autolog(self, trainer: Trainer) -> None:
        if self._autolog_paused:
            trainer.enable_autolog_hparams, self._autolog_paused = True, False

    # -- logging -------------------------------------------------------------------------------------------------

    def step(self, trainer: Trainer) -> int:
        """Optimizer steps of this fit done."""
        return self.standing.step(trainer)

    def logs_now(self, trainer: Trainer, pl_module: LightningModule, every_step: bool = False) -> bool:
        """Whether this is the end of a batch that ended a step; true once a step, on the Trainer's logging steps only.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            every_step: On every step: what costs nothing, and ``callback_metrics`` should have.
        """
        if trainer.barebones:
            return False
        # The Trainer counts the batches that end with a step, and under manual optimization all of them.
        batches = trainer.fit_loop.total_batch_idx + 1
        stepped = trainer.global_step if pl_module.automatic_optimization else batches
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = stepped > 0 and (every_step or (every > 0 and (stepped % every == 0 or trainer.should_stop)))
        if not due or trainer.global_step == self._logged_step:
            return False
        self._logged_step = trainer.global_step
        return True


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def checked(self: EfficientCallback, *args: Any, **kwargs: Any) -> None:
        if getattr(type(self).__init__, "__wrapped__", None) is init:  # not again on the way up to the base
            # The base speaks of these three.
            check_call(type(self), args, kwargs, skip=("enabled", "include", "exclude"))
            init(self, *args, **kwargs)
            if self.enabled and (idle := without_use(type(self), args, kwargs, self.only_with)):
                rank_zero_warn(f"{type(self).__name__}: {idle}.")
        else:
            init(self, *args, **kwargs)

    return checked


def _two_samples(tensor: Tensor) -> Tensor:
    return tensor[:2].detach().cpu().clone() if tensor.ndim else tensor.detach().cpu()


def peers(trainer: Trainer) -> list[EfficientCallback]:
    """The enabled callbacks of this package in a Trainer, in their listed order."""
    return [cb for cb in trainer.callbacks if isinstance(cb, EfficientCallback) and cb.enabled]  # type: ignore[attr-defined]
