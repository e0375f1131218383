"""What a method does in a loop, for the driver."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.common.change import Change
from lightning_efficient.common.running import Call
from lightning_efficient.common.schema import MapOf, Number, Schema, Text
from lightning_efficient.weightspace import Boundary, Transform

Sites = dict[str, tuple[nn.Parameter, Transform]]


@dataclass
class Run:
    """What the parts of a driver know in common.

    Args:
        model: Without wrappers around it.
        optimizer: The user's, torch's own.
        total: Optimizer steps of the run; None: unknown.
        example: A call of the model, if one was given.
        saved: Method → parameter → state, of a run that goes on with weights loaded already.
        progress: Method → how far it was, of such a run.
        parallel: Whether there is a ``DistributedDataParallel`` already, which knows of no later parameters.
        boundary: Of all parts.
    """

    model: nn.Module
    optimizer: Optimizer
    total: int | None
    example: Call | None
    saved: Mapping[str, Mapping[str, Mapping[str, Tensor]]] = field(default_factory=dict)
    progress: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parallel: bool = False
    boundary: Boundary = field(default_factory=Boundary)

    def needs_example(self, part: Part) -> Call:
        """The example; an error if there is none."""
        if self.example is None:
            raise ValueError(part.no_example())
        return self.example


class Part(ABC):
    """One method in a loop. Its constructor's keywords are the arguments, named as the callback's are."""

    method: ClassVar[str]
    # How many numbers its schedule in steps may be.
    lengths: ClassVar[tuple[int, ...]] = (0,)
    # What :meth:`progress` is.
    progress_schema: ClassVar[Schema] = MapOf(Text(), Number(low=0, high=1))
    # What it needs an example for; empty: nothing.
    example_for: ClassVar[str] = ""
    # Whether what it leaves alone is worth a warning; every model has widths that cannot be cut.
    complains: ClassVar[bool] = True

    def __init__(self, include: list[str] | None = None, exclude: list[str] | None = None) -> None:
        self.include, self.exclude = include, exclude
        self.change: Change | None = None
        # The schedule in steps, once the run is known.
        self.steps: tuple[int, ...] = ()
        self.transforms: dict[str, Transform] = {}

    def no_example(self) -> str:
        """That an example is missing, and what for."""
        return (
            f"{self.method}: {self.example_for}. Pass `example`: a small batch as the model takes it (a tensor, a "
            "tuple of positional or a dict of keyword arguments)."
        )

    def resolve(self, total: int | None) -> tuple[int, ...]:
        """The schedule in steps; raises ``ValueError`` if it does not fit into the run."""
        return ()

    def reshape(self, run: Run) -> None:  # noqa: B027
        """Replace modules; the only change before all parts have been checked."""

    def undo(self, run: Run) -> None:  # noqa: B027
        """Take that back."""

    def sites(self, run: Run) -> Sites:
        """Choose and check the weights, without changing anything."""
        return {}

    def at(self, run: Run, step: int) -> None:  # noqa: B027
        """``step`` optimizer steps are done: make ready for the forward of the next."""

    def before_step(self, run: Run, step: int) -> None:  # noqa: B027
        """Gradients are complete."""

    def after_step(self, run: Run, step: int) -> None:  # noqa: B027
        """The optimizer has stepped, for the ``step``-th time; parameters still hold ``W``."""

    def progress(self) -> dict[str, Any]:
        """How far it is, beyond what weights and the step say."""
        return {}

    def check(self, run: Run, saved: Mapping[str, Any], step: int) -> None:  # noqa: B027
        """Refuse what was saved of this method if it cannot be, beyond its schema; changes nothing."""

    def resume(self, run: Run, progress: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from there."""

    def finish(self, run: Run, step: int, batches: Iterable[Any] | None, forward: Any) -> str:
        """End it; what was left undone, as a sentence."""
        return ""

    def release(self) -> None:  # noqa: B027
        """Leave no hook behind."""
