"""What callbacks share that read the outputs of modules during one stage, and log figures of an epoch at its end."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.match import find_module
from lightning_efficient.lifecycle.base import EfficientCallback, peers
from lightning_efficient.metrics.streaming import share
from lightning_efficient.norms.base import in_backward
from lightning_efficient.trainer.showing import Picture, show_picture

MonitoredStage: TypeAlias = Literal["train", "val", "test"]


class SeenCall(NamedTuple):
    """One call of a watched module.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What it returned.
        module: The module.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    module: nn.Module


class StageMonitor(EfficientCallback):
    """Reads calls of named modules in one stage, changes nothing, and logs figures of each epoch at its end.

    The figures are in ``callback_metrics`` when ``EarlyStopping`` and ``ModelCheckpoint`` look. The sanity check is
    read as well, so that a wrong argument shows before the first epoch, and forgotten. A subclass says which modules
    (:meth:`watched`), adds up what they did in a batch (:meth:`take`) and makes figures of it (:meth:`figures`).

    Args:
        enabled: ``False`` leaves the run without it.
        stage: Whose batches are read: ``"train"``, ``"val"`` or ``"test"``.
        max_samples: Read at most so many samples an epoch, over all processes.
        name: Set between the method and the quantity in logged names, to tell two monitors of one kind apart.
        picture: Draw, for whichever loggers show pictures.

    Raises:
        ValueError: An argument out of range; two monitors of one kind with the same name in one Trainer.
    """

    quantities: ClassVar[str]  # what the monitor measures, for messages

    def __init__(self, enabled: bool, stage: MonitoredStage, max_samples: int, name: str | None, picture: bool) -> None:
        super().__init__(enabled)
        if stage not in get_args(MonitoredStage):
            raise ValueError(f"`stage` is {stage!r}; expected 'train', 'val' or 'test'.")
        if max_samples < 1:
            raise ValueError(f"`max_samples` is {max_samples}; expected at least 1.")
        self.stage = stage
        self.max_samples = max_samples
        self.name = name
        self.picture = picture
        self._calls: defaultdict[str, list[SeenCall]] = defaultdict(list)
        self._open: ExitStack | None = None
        self._depth = 0
        self._room = 0
        self._batches, self._samples, self._broken = 0, 0, False
        self._told: set[str] = set()

    # -- what a subclass says -------------------------------------------------------------------------------------

    def watched(self) -> dict[str, str]:
        """Argument → the module that it names; ``""``: the LightningModule itself."""
        raise NotImplementedError

    def forget(self) -> None:
        """An epoch of the stage begins."""
        raise NotImplementedError

    def prepare(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Before a batch of the stage is read: find out what there is to know of it."""

    def take(self, calls: Mapping[str, list[SeenCall]], batch: Any, room: int) -> Tensor:
        """Add up what the modules did in one batch, unless it holds NaN or infinite values.

        Args:
            calls: Argument → calls of its module, in their order.
            batch: The batch.
            room: Samples that may still be read.

        Returns:
            What was read, one row a sample.
        """
        raise NotImplementedError

    def names(self) -> list[str]:
        """The quantities."""
        raise NotImplementedError

    def figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Quantity → value, over all processes; called on all of them, where something was read."""
        raise NotImplementedError

    def draw(self, step: int) -> Mapping[str, Callable[[], Picture]]:
        """Name → how to draw a picture of what :meth:`figures` has found at this step."""
        return {}

    # -- when -----------------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> str:
        """Of the names under which quantities are logged."""
        return super().prefix if self.name is None else f"{super().prefix}/{self.name}"

    @property
    def state_key(self) -> str:
        """Tells two monitors of one Trainer apart."""
        return self._generate_state_key(stage=self.stage, name=self.name)

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        names = ("enabled", "stage", "max_samples", "name", "picture")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint does not depend on having been watched."""
        return {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse two monitors that would log under the same names."""
        super().setup(trainer, pl_module, stage)
        same = [cb for cb in peers(trainer) if isinstance(cb, StageMonitor) and cb.prefix == self.prefix]
        if self.enabled and len(same) > 1:
            raise ValueError(
                f"{len(same)} enabled {type(self).__name__} log under {self.prefix}/: give each a `name` of its own."
            )
        self._told = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names given, now that the model is complete."""
        super().on_fit_start(trainer, pl_module)
        if self.enabled:
            self._modules(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        self._begin(trainer, "train")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        self._begin(trainer, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        self._begin(trainer, "test")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._read(trainer, pl_module, "train", batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read."""
        self._read(trainer, pl_module, "val", batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read."""
        self._read(trainer, pl_module, "test", batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward is over. Under manual optimization a step may have several."""
        if pl_module.automatic_optimization:
            self._close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up."""
        self._take("train", batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Add up."""
        self._take("val", batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Add up."""
        self._take("test", batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._end(trainer, pl_module, "train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._end(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._end(trainer, pl_module, "test")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        super().on_exception(trainer, pl_module, exception)
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind, and keep nothing of the data."""
        super().teardown(trainer, pl_module, stage)
        self._close()
        self._calls.clear()
        if self.enabled:
            self.forget()

    # -- how ------------------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, stage: str) -> None:
        self._close()
        if self.enabled and stage == self.stage:
            self._batches, self._samples, self._broken = 0, 0, False
            # Lightning deals samples out in turn, so that these are the first of the data set on any number of them.
            self._room = share(self.max_samples)
            self.forget()

    def _read(self, trainer: Trainer, pl_module: LightningModule, stage: str, batch: Any) -> None:
        self._close()
        self._calls.clear()
        if not self.enabled or stage != self.stage or self._room < 1 or trainer.barebones:
            return
        self._batches += 1
        self.prepare(trainer, pl_module, batch)
        with ExitStack() as stack:
            for argument, module in self._modules(pl_module).items():
                for handle in self._hooks(trainer, pl_module, argument, module):
                    stack.callback(handle.remove)
                if _inside_compiled(pl_module, module):
                    stack.enter_context(uncompiled())
            self._open = stack.pop_all()

    def _modules(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        who = type(self).__name__
        found = {arg: find_module(pl_module, name, arg, who) for arg, name in self.watched().items()}
        # A compiled module is called through its wrapper: hooks on that one are called, and nothing is recompiled.
        wrappers = {id(inner): outer for outer in pl_module.modules() if (inner := getattr(outer, "_orig_mod", None))}
        return {argument: wrappers.get(id(module), module) for argument, module in found.items()}

    def _hooks(self, trainer: Trainer, pl_module: LightningModule, argument: str, module: nn.Module) -> Iterator[Any]:
        root = module is pl_module
        # Under DDP Lightning sends a step through the wrapper, which calls the LightningModule around it.
        outside = int(root and trainer.model is not pl_module)
        self._depth = 0

        def enter(*_: Any) -> None:
            self._depth += 1

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if root:
                self._depth -= 1
                if self._depth < outside:
                    return
            if not in_backward():
                self._calls[argument].append(SeenCall(args, kwargs, output, module))

        if root:
            yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, with_kwargs=True)

    def _take(self, stage: str, batch: Any) -> None:
        self._close()
        if stage == self.stage and self._calls:
            calls = dict(self._calls)
            self._calls.clear()
            with torch.no_grad():
                rows = self.take(calls, batch, self._room)
            self._room, self._samples = self._room - len(rows), self._samples + len(rows)
            self._broken = self._broken or not bool(rows.isfinite().all())

    def _close(self) -> None:
        if self._open is not None:
            stack, self._open = self._open, None
            stack.close()

    def _end(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        if not self.enabled or stage != self.stage or trainer.sanity_checking or trainer.barebones:
            return
        samples = self.over_processes(trainer, pl_module, self._samples, "sum")
        broken = self.over_processes(trainer, pl_module, self._broken, "sum")
        names = ", ".join(repr(name) for name in self.watched().values())
        if not samples:
            if self._batches:  # else an epoch that was over when it was resumed
                self.tell(f"{names} was not called in any {stage} batch of the epoch: no {self.quantities} is logged.")
            return
        if broken:
            self.tell(f"outputs of {names} are NaN or infinite: what is logged of them is NaN from here on.")
            figures = dict.fromkeys(self.names(), math.nan)
        else:
            with _quiet():
                figures = self.figures(trainer, pl_module)
        figures |= {"samples": samples}
        for name, value in figures.items():
            # The same on all processes; Lightning warns where nothing says how to reduce, and a maximum is exact.
            pl_module.log(f"{self.prefix}/{name}", value, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
        if self.picture and not broken and trainer.is_global_zero:
            for name, draw in self.draw(trainer.global_step).items():
                show_picture(trainer.loggers, f"{self.prefix}/{name}", draw, trainer.global_step)

    def over_processes(self, trainer: Trainer, pl_module: LightningModule, value: float, how: str) -> float:
        """Sum or maximum of a number over all processes.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            value: Of this process.
            how: ``"sum"`` or ``"max"``.
        """
        # Exact for counts below 2**24, on devices without float64 as well.
        mine = torch.tensor(float(value), dtype=torch.float32, device=pl_module.device)
        return float(trainer.strategy.reduce(mine, reduce_op=how))

    def tell(self, problem: str) -> None:
        """Warn once a run.

        Args:
            problem: What is wrong, without the name of the callback.
        """
        if problem not in self._told:
            self._told.add(problem)
            rank_zero_warn(f"{type(self).__name__}: {problem}")


@contextmanager
def _quiet() -> Iterator[None]:
    """torchmetrics warns of a process that has seen no sample; the others may have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric .* was called before the ``update``")
        yield


def _inside_compiled(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module is a part of a compiled one, whose code would not call hooks that are added later."""
    path = next(path for path, inner in model.named_modules() if inner is module)
    parts = path.split(".") if path else []
    above = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    in_place = any(getattr(part, "_compiled_call_impl", None) is not None for part in (*above, module))
    return in_place or any(hasattr(part.forward, "_torchdynamo_orig_callable") for part in above)
