"""``load_from_checkpoint``: a module as a file describes it, which can be trained on, saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_efficient.common.change import Change
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle import checkpoint as codec
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.cut_entries import CUT, ZEROED, make_cuts, read_cuts
from lightning_efficient.lifecycle.files import File, read_checkpoint
from lightning_efficient.lifecycle.hooks import hook_files, keep_request
from lightning_efficient.lifecycle.laws import put_laws, read_laws
from lightning_efficient.lifecycle.recipe import Entry, RecipeError
from lightning_efficient.lifecycle.state import Request, attachment, set_zeroed

M = TypeVar("M", bound=LightningModule)


def load_from_checkpoint(
    cls: type[M], path: File, map_location: Any = None, weights_only: bool | None = None, **kwargs: Any
) -> M:
    """``cls.load_from_checkpoint`` for files whose modules were changed: the changes are made before weights load.

    The module knows what the file says of its weights (masks, a temperature, units that are zero): a ``fit`` with the
    same callback goes on from there, and files saved later say it again.

    Args:
        cls: The user's LightningModule class.
        path: A checkpoint written by a Trainer: a local path, a URL that fsspec knows (``file://``, ``memory://``,
            ``s3://``), ``http(s)://``, or an open binary file. Also a local folder of shards, as
            ``ModelParallelStrategy`` writes them, with ``weights_only=False``: its index is a pickle.
        map_location: As in ``torch.load``.
        weights_only: As in ``torch.load``. None: True, which loads plain data and tensors only. False runs what code
            the file asks for: for files that you trust.
        **kwargs: Further arguments of ``cls.load_from_checkpoint``, such as hyper-parameters and ``strict``.

    Returns:
        An instance of ``cls``, with the structure that the recipe describes. A file without a recipe loads as the stock
        method would.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is not a whole checkpoint, or holds objects that are no plain data.
        RecipeError: The recipe is malformed, newer, or does not fit the model.
    """
    content = read_checkpoint(path, weights_only)
    if isinstance(path, (str, Path)) and Path(path).is_dir():  # Lightning's loader wants one file
        path = BytesIO()
        torch.save(content, path)
        path.seek(0)
    if weights_only is not None:
        kwargs["weights_only"] = weights_only
    entries = recipe.read(content)
    replays = [(e, replay) for e in entries if METHODS[e.method].replay and (replay := codec.replay_of(e))]
    cut, zeroed = read_cuts(content, CUT), read_cuts(content, ZEROED)
    laws, states = read_laws(content)
    if not entries and not laws:
        return cls.load_from_checkpoint(path, map_location=map_location, **kwargs)
    carried = codec.of_weights(entries, states)
    if "_class_path" in (content.get(cls.CHECKPOINT_HYPER_PARAMS_KEY) or ()):
        kwargs.setdefault("_class_path", None)  # written by a CLI; it would have to name a subclass of the loader below
    requests = [_request(entry, replay) for entry, replay in replays]

    def configure_model(self: LightningModule) -> None:
        cls.configure_model(self)
        for request in requests:
            request.changes.append(request.apply(self))
        if cut is not None:
            make_cuts(self, cut)

    def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        cls.on_load_checkpoint(self, checkpoint)
        here, plain = read_laws(checkpoint)
        put_laws(self, here)
        checkpoint.update(plain)

    def load_state_dict(self: LightningModule, *args: Any, **options: Any) -> Any:
        try:
            return cls.load_state_dict(self, *args, **options)
        except RuntimeError as error:
            what = [entry.method for entry, _ in replays] + ["slim"] * (cut is not None)
            raise RecipeError(
                f"what the checkpoint's recipe says ({', '.join(what) or 'temperatures'}) and its weights do not fit "
                f"together, or not {cls.__name__}: {error}"
            ) from error

    # A subclass that lives for this call only: all of Lightning's logic for hyper-parameters is reused as it is.
    hooks = {f.__name__: f for f in (configure_model, on_load_checkpoint, load_state_dict)}
    loader = cast(
        type[M],
        type(cls.__name__, (cls,), hooks | {"__module__": cls.__module__}),
    )
    model = loader.load_from_checkpoint(path, map_location=map_location, **kwargs)
    model.__class__ = cls
    mine = attachment(model)
    mine.cut, mine.entries = cut, carried
    set_zeroed(model, zeroed)
    hook_files(model)
    for request in requests:
        keep_request(model, request)
    return model


def _request(entry: Entry, replay: Callable[[nn.Module, Collection[str]], Change]) -> Request:
    """The change of an entry, for a model whose ``configure_model`` may make modules anew."""
    request = Request(entry.method, entry.key, dict(entry.config), apply=lambda model: replay(model, changed()))

    def changed() -> set[str]:
        return {name for change in request.changes for name in change.swaps}

    return request
