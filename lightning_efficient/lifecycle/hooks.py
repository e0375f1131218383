"""The only file that puts anything on a LightningModule instance: hooks that chain the user's own, and can be undone.

No callback hook sees a module between 'complete' and 'weights loaded', nor a checkpoint before its weights are loaded,
so a method that changes modules needs these four hooks of the instance itself. They are bound methods, not
``functools.wraps`` wrappers: Lightning looks through ``__wrapped__`` and would skip them. A bound method is also bound
anew by ``deepcopy``.

A checkpoint passes here and nowhere else. *Save*: every callback gives its entry of the recipe. *Before the weights*:
every callback checks what the file says, and only when all agree is the model cut and are tensors renamed. *After the
weights* Lightning itself calls the callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_efficient.common.match import NoMatchError
from lightning_efficient.common.registry import METHODS
from lightning_efficient.common.shards import is_cut
from lightning_efficient.lifecycle import checkpoint as codec
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.cut_entries import CUT, ZEROED, check_cuts, make_cuts, read_cuts, write_cuts
from lightning_efficient.lifecycle.laws import put_laws, read_laws
from lightning_efficient.lifecycle.recipe import Entry, RecipeError
from lightning_efficient.lifecycle.state import NAME, Attachment, Request, attachment, set_zeroed, without
from lightning_efficient.surgery.optimizer import plain_view
from lightning_efficient.surgery.replace import restore_modules
from lightning_efficient.trainer.unsharded import unsharded


@runtime_checkable
class CheckpointMember(Protocol):
    """A callback that has a say in what a checkpoint holds."""

    enabled: bool
    method: str

    @property
    def needs_whole(self) -> bool:
        """Whether it has to run the model before that is cut over processes."""

    @property
    def state_key(self) -> str:
        """Key of the callback."""

    def entry(self, pl_module: LightningModule) -> Entry | None:
        """What the file says of the weights that are saved now; None: nothing beyond what the model carries."""

    def check_checkpoint(
        self, pl_module: LightningModule, checkpoint: dict[str, Any], entries: Sequence[Entry]
    ) -> None:
        """Before anything is loaded, refuse a file that this callback cannot go on from; changes nothing."""


def members(pl_module: LightningModule) -> list[CheckpointMember]:
    """The callbacks of ours in the Trainer of a module; none where there is no Trainer."""
    try:
        callbacks: list[Any] = pl_module.trainer.callbacks  # type: ignore[attr-defined]
    except RuntimeError:  # not attached to one
        return []
    return [callback for callback in callbacks if isinstance(callback, CheckpointMember)]


def install(pl_module: LightningModule, request: Request) -> None:
    """Apply a structural request now where the model exists already, and after every ``configure_model``."""
    keep_request(pl_module, request)
    _carry_over(pl_module, request)
    _apply(pl_module, request, required=False)


def keep_request(pl_module: LightningModule, request: Request) -> None:
    """Have the module's files, and what its ``configure_model`` makes, follow a structural request."""
    mine = attachment(pl_module)
    mine.requests = [r for r in mine.requests if r.key != request.key or r.method != request.method]
    mine.requests.append(request)
    _hook(pl_module, _HOOKS)


def hook_files(pl_module: LightningModule) -> None:
    """Have the module's files say what its weights hold, those without callback states among them."""
    _hook(pl_module, ("on_save_checkpoint", "on_load_checkpoint", "configure_optimizers"))


def hook_cutting(pl_module: LightningModule) -> None:
    """Have a copy of the module kept, where a callback needs one, before its ``configure_model`` cuts it."""
    _hook(pl_module, ("configure_model",))


def hook_loading(pl_module: LightningModule) -> None:
    """Have a file with a recipe checked before its weights are loaded, whichever callback wrote it."""
    _hook(pl_module, ("on_load_checkpoint",))


def hook_checking(pl_module: LightningModule) -> None:
    """Have callbacks that are off refuse a file that they have left something in, before its weights are loaded."""
    if NAME not in vars(pl_module) and "on_load_checkpoint" not in vars(pl_module):
        pl_module.__dict__["on_load_checkpoint"] = MethodType(_only_check, pl_module)


def _only_check(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    type(self).on_load_checkpoint(self, checkpoint)
    if (here := members(self)) and not any(member.enabled for member in here):
        for member in here:
            member.check_checkpoint(self, checkpoint, recipe.read(checkpoint))


def unhook_checking(pl_module: LightningModule) -> None:
    """Take that off again."""
    if getattr(vars(pl_module).get("on_load_checkpoint"), "__func__", None) is _only_check:
        del pl_module.__dict__["on_load_checkpoint"]


def _hook(pl_module: LightningModule, names: Iterable[str]) -> None:
    mine = attachment(pl_module)
    unhook_checking(pl_module)
    for name in names:
        function, current = _HOOKS[name], pl_module.__dict__.get(name)
        if name == "configure_optimizers" and not is_overridden(name, pl_module):
            continue  # Lightning's own error says that it is missing
        # LightningCLI puts a `configure_optimizers` on the instance as well, perhaps after us: then ours goes round it.
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
    before = dict(self.named_parameters(remove_duplicate=False))
    asked = self.device_mesh is not None and any(m.enabled and m.needs_whole for m in members(self))
    if asked and before and self.trainer.is_global_zero and not any(map(is_cut, before.values())):
        attachment(self).unsharded = unsharded(self)
    _previous(self, "configure_model")
    if any(is_cut(parameter) for parameter in self.parameters()):
        _follow(self, before)
        return
    for request in attachment(self).requests:
        _apply(self, request, required=True)


def _follow(pl_module: LightningModule, before: Mapping[str, nn.Parameter]) -> None:
    """Sharding makes new parameters, under the same names: what changes have noted of the old ones is about those."""
    mine, now = attachment(pl_module), dict(pl_module.named_parameters(remove_duplicate=False))
    if idle := [request for request in mine.requests if not request.changes]:
        raise ValueError(
            f"{idle[0].method}: {type(pl_module).__name__} was sharded in `configure_model` before any of its modules "
            "could be replaced. Build the network in `__init__` (on the meta device if it is large), and call "
            "`fully_shard` or `parallelize_module` in `configure_model`."
        )
    heirs = {id(old): now.get(name, old) for name, old in before.items()}

    def heir(old: nn.Parameter) -> nn.Parameter:
        return heirs.get(id(old), old)

    for change in mine.changes:
        change.replaced = [(old, heir(new)) for old, new in change.replaced]
        change.added = [(heir(new), None if weight is None else heir(weight)) for new, weight in change.added]


def configure_optimizers(self: LightningModule) -> Any:
    """The user's ``configure_optimizers``, run as if the model were untouched."""
    _leave_unattended(self)  # here, because every fit comes by, and nothing that only evaluates
    with plain_view(self, attachment(self).changes):
        return _previous(self, "configure_optimizers")


def on_save_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Make the file plain and add the recipe, then the user's hook: it sees the keys it knows."""
    mine = attachment(self)
    codec.fold(self, mine.requests, checkpoint)
    now = [entry for member in members(self) if member.enabled and (entry := member.entry(self)) is not None]
    written = {(entry.method, entry.key) for entry in now}
    for entry in [*now, *(e for e in mine.entries if (e.method, e.key) not in written)]:
        recipe.write(checkpoint, entry)
    write_cuts(checkpoint, CUT, mine.cut)
    write_cuts(checkpoint, ZEROED, mine.zeroed)
    _previous(self, "on_save_checkpoint", checkpoint)


def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """The user's hook, which sees the keys it knows; then everything is checked; then the model follows the file."""
    _previous(self, "on_load_checkpoint", checkpoint)
    mine, entries = attachment(self), recipe.read(checkpoint)
    cut, zeroed = read_cuts(checkpoint, CUT), read_cuts(checkpoint, ZEROED)
    for member in members(self):
        member.check_checkpoint(self, checkpoint, entries)
    if cut is None and mine.cut is not None:
        raise RecipeError(
            f"the checkpoint was written before {type(self).__name__} was cut, so its weights are larger. Load it into "
            "a model that has not been cut."
        )
    unfolded = codec.unfold(self, mine.requests, checkpoint)
    laws, states = read_laws({**checkpoint, **unfolded})
    carried = codec.of_weights(entries, states)
    if cut is not None:
        check_cuts(self, cut, states.get("state_dict", {}))
    put_laws(self, laws)
    if cut is not None:
        make_cuts(self, cut)
    checkpoint.update(states)
    mine.cut, mine.entries = cut, carried
    set_zeroed(self, zeroed)
    if cut is not None or zeroed is not None or carried:  # what trains on, and files of it, have to know, too
        hook_files(self)


def _leave_unattended(pl_module: LightningModule) -> None:
    """Training without the callback that left something in the weights: what does not survive that is forgotten."""
    mine, trainer = attachment(pl_module), pl_module.trainer
    if 0 in (trainer.max_epochs, trainer.max_steps):
        return
    present = {(m.method, m.state_key) for m in members(pl_module) if m.enabled}
    methods = {method for method, _ in present}
    masked, zeroed = METHODS.pruning("weights"), METHODS.pruning("units")
    gone = [e for e in mine.entries if (e.method, e.key) not in present and not METHODS[e.method].lasting]
    masks = [e.key for e in gone if e.method in masked and not methods & masked]
    lost = masks + (["zero units"] if mine.zeroed is not None and not methods & zeroed else [])
    if lost:
        rank_zero_warn(
            f"{type(pl_module).__name__} was pruned ({', '.join(lost)}), and no callback of this run holds what is "
            "zero at zero: it will grow again. Add the callback that pruned it, or export the model and train that."
        )
    if not methods & zeroed:
        set_zeroed(pl_module, None)
    if not methods & masked:  # another callback that prunes takes the masks over
        mine.entries = without(mine.entries, masked)
    others = {e.method for e in gone if e.method not in masked}
    mine.entries = [e for e in mine.entries if e.method not in others or (e.method, e.key) in present]


_HOOKS: dict[str, Callable[..., Any]] = {
    "configure_model": configure_model,
    "configure_optimizers": configure_optimizers,
    "on_save_checkpoint": on_save_checkpoint,
    "on_load_checkpoint": on_load_checkpoint,
}
