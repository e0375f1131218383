"""The only file that puts anything on a LightningModule instance: hooks that chain the user's own, and can be undone.

No callback hook sees a module between 'complete' and 'weights loaded', nor a checkpoint before its weights are loaded,
so a method that changes modules needs these four hooks of the instance itself. They are bound methods, not
``functools.wraps`` wrappers: Lightning looks through ``__wrapped__`` and would skip them. A bound method is also bound
anew by ``deepcopy``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule

from lightning_efficient.common.match import NoMatchError
from lightning_efficient.lifecycle import checkpoint as codec
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.recipe import Entry, RecipeError
from lightning_efficient.lifecycle.state import NAME, Attachment, Request, attachment, set_promised
from lightning_efficient.surgery.optimizer import plain_view
from lightning_efficient.surgery.replace import restore_modules


def install(pl_module: LightningModule, request: Request) -> None:
    """Apply a structural request now where the model exists already, and after every ``configure_model``."""
    mine = attachment(pl_module)
    mine.requests = [r for r in mine.requests if r.key != request.key or r.method != request.method]
    mine.requests.append(request)
    _carry_over(pl_module, request)
    _hook(pl_module, _HOOKS)
    _apply(pl_module, request, required=False)


def carry(pl_module: LightningModule) -> None:
    """Have the module's files say what its weights hold, those without callback states among them."""
    _hook(pl_module, ("on_save_checkpoint", "on_load_checkpoint"))


def _hook(pl_module: LightningModule, names: Iterable[str]) -> None:
    mine = attachment(pl_module)
    for name in names:
        function, current = _HOOKS[name], pl_module.__dict__.get(name)
        if getattr(current, "__func__", None) is not function:
            mine.previous[name] = current
            pl_module.__dict__[name] = MethodType(function, pl_module)


def detach(pl_module: LightningModule) -> None:
    """Take this package's hooks off the instance; its modules and weights stay as they are."""
    mine: Attachment | None = pl_module.__dict__.pop(NAME, None)
    for name, function in _HOOKS.items():
        if getattr(pl_module.__dict__.get(name), "__func__", None) is function:
            del pl_module.__dict__[name]
            if mine is not None and mine.previous.get(name) is not None:
                pl_module.__dict__[name] = mine.previous[name]


def fold_modules(pl_module: LightningModule) -> None:
    """Put the original modules back, with the tensors that give the same function."""
    for change in reversed(attachment(pl_module).changes):
        for old, new in change.swaps.values():
            if isinstance(new, codec.Foldable):
                old.load_state_dict(new.fold_state(dict(new.state_dict())))
        restore_modules(pl_module, change.swaps)
        change.swaps = {}


def unfoldable(pl_module: LightningModule) -> list[str]:
    """Names of changed modules whose originals cannot take over their function."""
    swaps = [item for change in attachment(pl_module).changes for item in change.swaps.items()]
    return [name for name, (_, new) in swaps if not isinstance(new, codec.Foldable)]


def _carry_over(pl_module: LightningModule, request: Request) -> None:
    """Changes of an earlier run that still stand are read off the modules, so that nothing is applied twice."""
    modules, params = set(map(id, pl_module.modules())), set(map(id, pl_module.parameters()))
    for change in request.changes:
        change.swaps = {n: (old, new) for n, (old, new) in change.swaps.items() if id(new) in modules}
        change.replaced = [(old, new) for old, new in change.replaced if id(new) in params]
        change.added = [(new, weight) for new, weight in change.added if id(new) in params]
    request.changes = [change for change in request.changes if change.swaps]


def _apply(pl_module: LightningModule, request: Request, required: bool) -> None:
    _carry_over(pl_module, request)
    try:
        request.changes.append(request.apply(pl_module))
    except NoMatchError:
        if required and not request.changes:
            raise


def _previous(pl_module: LightningModule, name: str, *args: Any) -> Any:
    before = attachment(pl_module).previous.get(name)
    return before(*args) if before is not None else getattr(type(pl_module), name)(pl_module, *args)


def configure_model(self: LightningModule) -> None:
    """The user's ``configure_model``, then every structural request on what is new."""
    _previous(self, "configure_model")
    for request in attachment(self).requests:
        _apply(self, request, required=True)


def configure_optimizers(self: LightningModule) -> Any:
    """The user's ``configure_optimizers``, run as if the model were untouched."""
    with plain_view(self, attachment(self).changes):
        return _previous(self, "configure_optimizers")


def on_save_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Make the file plain, then the user's hook: it sees the keys it knows."""
    codec.fold(self, attachment(self).requests, checkpoint)
    written = {entry.method for entry in recipe.read(checkpoint)}
    for entry in (entry for method, entry in attachment(self).held.items() if method not in written):
        recipe.write(checkpoint, entry)
    codec.write_cuts(checkpoint, codec.CUT, attachment(self).cut)
    codec.write_cuts(checkpoint, codec.PROMISED, attachment(self).promised)
    _previous(self, "on_save_checkpoint", checkpoint)


def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """The user's hook, which sees the keys it knows, then the tensors of the changed modules."""
    _previous(self, "on_load_checkpoint", checkpoint)
    _load_cuts(self, checkpoint)
    codec.unfold(self, attachment(self).requests, checkpoint)
    saved = {entry.method: entry for entry in recipe.read(checkpoint) if entry.method in HELD}
    attachment(self).held = {m: Entry(m, entry.key, entry.config) for m, entry in saved.items()}


def _load_cuts(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    mine, cut = attachment(self), codec.read_cuts(checkpoint, codec.CUT)
    if cut is not None:
        codec.make_cuts(self, cut)
    elif mine.cut is not None:
        raise RecipeError(
            f"the checkpoint was written before {type(self).__name__} was cut, so its weights are larger. Load it into "
            "a model that has not been cut."
        )
    mine.cut = cut
    set_promised(self, codec.read_cuts(checkpoint, codec.PROMISED))


# Methods that multiply weights by something that is not read off them again.
HELD = ("temp_scale",)

_HOOKS: dict[str, Callable[..., Any]] = {
    "configure_model": configure_model,
    "configure_optimizers": configure_optimizers,
    "on_save_checkpoint": on_save_checkpoint,
    "on_load_checkpoint": on_load_checkpoint,
}
