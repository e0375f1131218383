"""What this package keeps on a LightningModule instance: all that is true of the model, whoever trains it next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import canonical_name
from lightning_efficient.lifecycle.recipe import Entry
from lightning_efficient.structured.cuts import Cuts

NAME = "_lightning_efficient"
# On submodules, plain data: their part of what can be cut out, so that they can be exported by themselves.
ZEROED_ATTRIBUTE = "_lightning_efficient_zeroed"


@dataclass
class Request:
    """A structural method asked for by a callback, and what came of it.

    Args:
        method: Name of the method in the recipe.
        key: ``state_key`` of the callback.
        config: The callback's arguments, plain data.
        apply: Changes the modules of a model that are not changed yet; raises ``NoMatchError`` if there are none.
        changes: One for each time it found something to change.
    """

    method: str
    key: str
    config: dict[str, Any]
    apply: Callable[[LightningModule], Change]
    changes: list[Change] = field(default_factory=list)


@dataclass
class Attachment:
    """What this package keeps on a LightningModule instance.

    Args:
        requests: Structural methods.
        previous: What the instance had in place of our hooks.
        example_batch: Two samples of the first training batch.
        entries: What weight-space methods have left in the weights, from the last fit or from the file that the
            weights were read from. Written to every file; a further fit with the same callback goes on from there.
        cut: What has been cut out of the module since it was built. Written to every file; a model that loads such a
            file is cut first.
        zeroed: Units that are zero and can be cut out: :func:`~lightning_efficient.export` does. Written to every
            file, read from it.
        unsharded: On the first process, between sharding and the first step: the module as it was before.
    """

    requests: list[Request] = field(default_factory=list)
    previous: dict[str, Any] = field(default_factory=dict)
    example_batch: Any = None
    entries: list[Entry] = field(default_factory=list)
    cut: Cuts | None = None
    zeroed: Cuts | None = None
    unsharded: LightningModule | None = None

    @property
    def changes(self) -> list[Change]:
        """Every structural change, in the order made."""
        return [change for request in self.requests for change in request.changes]

    def entry(self, method: str, key: str | None = None) -> Entry | None:
        """What a method has left in the weights.

        Args:
            method: Its name.
            key: ``state_key`` of its callback; None: of any.
        """
        return next((e for e in self.entries if e.method == method and key in (None, e.key)), None)

    def leave(self, entry: Entry) -> None:
        """Note what a method has left in the weights, in place of what it had left before."""
        self.entries = [e for e in self.entries if (e.method, e.key) != (entry.method, entry.key)] + [entry]


def attached(module: nn.Module) -> Attachment | None:
    """The module's attachment, if it has one."""
    return module.__dict__.get(NAME)


def attachment(pl_module: LightningModule) -> Attachment:
    """The module's attachment, made on first use."""
    return pl_module.__dict__.setdefault(NAME, Attachment())  # type: ignore[no-any-return]


def set_zeroed(pl_module: LightningModule, cuts: Cuts | None) -> None:
    """Have the module and its submodules know which of their units are zero and can be cut out; None: of none."""
    attachment(pl_module).zeroed = cuts
    for name, module in pl_module.named_modules(remove_duplicate=False):
        vars(module).pop(ZEROED_ATTRIBUTE, None)
        if name and cuts is not None and (part := cuts.within(canonical_name(name))).kept:
            vars(module)[ZEROED_ATTRIBUTE] = part


def zeroed(model: nn.Module) -> Cuts | None:
    """The zero units of a module: its own, or its part of those of the LightningModule that it belongs to."""
    mine = attached(model)
    return vars(model).get(ZEROED_ATTRIBUTE) if mine is None or mine.zeroed is None else mine.zeroed


def without(entries: Iterable[Entry], methods: Iterable[str]) -> list[Entry]:
    """The entries of other methods."""
    names = set(methods)
    return [entry for entry in entries if entry.method not in names]
