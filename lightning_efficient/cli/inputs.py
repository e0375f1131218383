"""Example inputs from the command line: written as shapes, or the first batch of the user's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_efficient.common.registry import near
from lightning_efficient.common.running import Call, Inputs, calls_of_batch, evaluating, first_line

FORM = "[name=]N,N,...[:kind], such as 1,3,224,224 or ids=1,16:int"
# Few numbers, so that they are ids of any vocabulary.
_KINDS = {
    "float": lambda shape, rng: torch.randn(shape, generator=rng),
    "int": lambda shape, rng: torch.randint(0, 4, shape, generator=rng),
    "mask": lambda shape, rng: torch.ones(shape, dtype=torch.long),
    "bool": lambda shape, rng: torch.ones(shape, dtype=torch.bool),
}


def read_inputs(texts: Sequence[str] | None) -> Inputs | None:
    """Tensors of some shapes: a tensor, several by position, or by name.

    Args:
        texts: Each ``[name=]N,N,...[:kind]``; the kinds are ``float`` (random, the default), ``int`` (small ids),
            ``mask`` (whole ones) and ``bool`` (true).

    Raises:
        ValueError: One reads otherwise, or some have names and others do not.
    """
    if not texts:
        return None
    rng = torch.Generator().manual_seed(0)
    read = [_read(text, rng) for text in texts]
    named = {name: tensor for name, tensor in read if name}
    if named and len(named) < len(read):
        raise ValueError(
            f"of the inputs {list(texts)} some have no name, or the same one: give each a name of its own."
        )
    if named:
        return named
    return read[0][1] if len(read) == 1 else tuple(tensor for _, tensor in read)


def _read(text: str, rng: torch.Generator) -> tuple[str, Tensor]:
    name, _, rest = text.rpartition("=")
    shape, _, kind = rest.partition(":")
    sizes = [size.strip() for size in shape.split(",")]
    if not all(size.isdigit() and int(size) > 0 for size in sizes) or (name and not name.strip().isidentifier()):
        raise ValueError(f"{text!r} is not a shape; expected {FORM}.")
    if kind and kind not in _KINDS:
        raise ValueError(f"{text!r}: unknown kind {kind!r}{near(kind, _KINDS)}; expected one of {', '.join(_KINDS)}.")
    return name.strip(), _KINDS[kind or "float"](tuple(map(int, sizes)), rng)


def first_batch_of(data: Any, samples: int = 2) -> Any:
    """The first training batch of some data, of two samples at most.

    Args:
        data: A LightningDataModule, or anything that gives batches.
        samples: How many.

    Raises:
        ValueError: It gives none.
    """
    if isinstance(data, LightningDataModule):
        data.prepare_data()
        data.setup("fit")
        loader: Any = data.train_dataloader()
    else:
        loader = data
    if isinstance(loader, Mapping | list | tuple):
        batch = next(iter(CombinedLoader(loader)), (None,))[0]
    else:
        batch = next(iter(loader), None)
    if batch is None:
        raise ValueError(f"the training data of {type(data).__name__} gives no batch.")
    return apply_to_collection(batch, Tensor, lambda tensor: tensor[:samples] if tensor.ndim else tensor)


def inputs_of(model: nn.Module, batch: Any) -> Inputs:
    """The part of a batch that a model runs on.

    Args:
        model: The model.
        batch: A tensor, or a nest.

    Raises:
        ValueError: No part that one would try runs.
    """
    failures = []
    for call in calls_of_batch(model, batch):
        try:
            with evaluating(model):
                call.run(model)
        except Exception as error:
            failures.append(f"[{call}]: {first_line(error)}")
            continue
        return _inputs(call)
    raise ValueError(
        f"{type(model).__name__} runs on no part of a training batch: {'; '.join(failures)}. Describe its inputs "
        f"instead: --input {FORM}."
    )


def _inputs(call: Call) -> Inputs:
    return dict(call.kwargs) if call.kwargs else call.args
