"""``load_from_checkpoint``: a module as a file describes it, which can be trained on, saved and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule

from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle import checkpoint as codec
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.hooks import hook_files, keep_request
from lightning_efficient.lifecycle.state import Request, attachment, set_zeroed

M = TypeVar("M", bound=LightningModule)


def load_from_checkpoint(cls: type[M], path: str | Path | IO[bytes], map_location: Any = None, **kwargs: Any) -> M:
    """``cls.load_from_checkpoint`` for files whose modules were changed: the changes are made before weights load.

    The module knows what the file says of its weights (masks, a temperature, units that are zero): a ``fit`` with the
    same callback goes on from there, and files saved later say it again.

    Args:
        cls: The user's LightningModule class.
        path: A checkpoint written by a Trainer.
        map_location: As in ``torch.load``.
        **kwargs: Further arguments of ``cls.load_from_checkpoint``, such as hyper-parameters and ``strict``.

    Returns:
        An instance of ``cls``, with the structure that the recipe describes. A file without a recipe loads as the stock
        method would.

    Raises:
        RecipeError: The recipe is malformed, newer, or names modules that the model does not have.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if hasattr(path, "seek"):
        cast(IO[bytes], path).seek(0)
    entries = recipe.read(content)
    replays = [(e, replay) for e in entries if METHODS[e.method].replay and (replay := codec.replay_of(e))]
    cut, zeroed = codec.read_cuts(content, codec.CUT), codec.read_cuts(content, codec.ZEROED)
    if not entries and not codec.has_laws(content):
        return cls.load_from_checkpoint(path, map_location=map_location, **kwargs)
    if "_class_path" in content.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}):
        kwargs.setdefault("_class_path", None)  # written by a CLI; it would have to name a subclass of the loader below
    requests = [Request(e.method, e.key, dict(e.config), replay) for e, replay in replays]

    def configure_model(self: LightningModule) -> None:
        cls.configure_model(self)
        for request in requests:
            request.changes.append(request.apply(self))
        if cut is not None:
            codec.make_cuts(self, cut)

    def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        cls.on_load_checkpoint(self, checkpoint)
        codec.adapt(self, checkpoint)

    # A subclass that lives for this call only: all of Lightning's logic for hyper-parameters is reused as it is.
    hooks = {"configure_model": configure_model, "on_load_checkpoint": on_load_checkpoint}
    loader = cast(
        type[M],
        type(cls.__name__, (cls,), hooks | {"__module__": cls.__module__}),
    )
    model = loader.load_from_checkpoint(path, map_location=map_location, **kwargs)
    model.__class__ = cls
    mine = attachment(model)
    mine.cut, mine.entries = cut, codec.of_weights(entries)
    set_zeroed(model, zeroed)
    hook_files(model)
    for request in requests:
        keep_request(model, request)
    return model
