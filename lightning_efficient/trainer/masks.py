"""Which tensor of a batch hides padding, by what it does to the loss; how wide a model is and what it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_efficient.common.nests import named_tensors, tensors_in
from lightning_efficient.companions.padding import Keeps, TokenMask
from lightning_efficient.norms.effects import exchanged
from lightning_efficient.trainer.replay import Replay

_KEEPS: tuple[Keeps, ...] = ("nonzero", "zero")
# Whoever writes this key means Hugging Face's: 1 where a token counts.
_KNOWN = "attention_mask"


def tensor_named(batch: Any, name: str) -> tuple[str, Tensor]:
    """A tensor of a batch and where it is.

    Args:
        batch: As the step gets it.
        name: Keys and positions joined by dots, or their end.

    Raises:
        ValueError: There is no such tensor, or several.
    """
    tensors = dict(named_tensors(batch))
    paths = [name] if name in tensors else [path for path in tensors if path.endswith(f".{name}")]
    if len(paths) != 1:
        kinds = {path: f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for path, t in tensors.items()}
        count = "several tensors" if paths else "no tensor"
        raise ValueError(f"`mask` is {name!r}, and the batch has {count} of that name; it has {kinds}.")
    return paths[0], tensors[paths[0]]


def named_mask(batch: Any, name: str, keeps: Keeps | None, pad_id: int | None) -> TokenMask | None:
    """What a name says: tokens of which one is padding, lengths, or a known mask; None: a mask of unknown meaning.

    Args:
        batch: As the step gets it.
        name: Of a tensor in it: keys and positions joined by dots, or their end.
        keeps: What it says of tokens that count; None: not given.
        pad_id: The token that is padding.

    Raises:
        ValueError: There is no such tensor, or several.
    """
    path, tensor = tensor_named(batch, name)
    if keeps is not None or pad_id is not None:
        return TokenMask(path, keeps or "nonzero", pad_id)
    if tensor.dim() == 1 and tensor.dtype != torch.bool:
        return TokenMask(path, "lengths")
    return TokenMask(path) if path.rpartition(".")[2] == _KNOWN else None


def known_mask(batch: Any, pad_id: int | None) -> TokenMask | None:
    """The mask of a batch that needs no asking: Hugging Face's key, or tokens in which ``pad_id`` is padding.

    Args:
        batch: As the step gets it.
        pad_id: The token that is padding; None: not given.
    """
    tensors = dict(named_tensors(batch))
    if pad_id is None:
        return next((TokenMask(p) for p, t in tensors.items() if p.rpartition(".")[2] == _KNOWN and t.dim() > 1), None)
    tokens = [p for p, t in tensors.items() if t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool]
    padded = [p for p in tokens if bool((tensors[p] == pad_id).any())]
    return TokenMask((padded or tokens)[0], pad_id=pad_id) if tokens else None


@dataclass
class Look:
    """One training step of a module, repeated outside its loop.

    Args:
        trainer: Inside ``fit``.
        pl_module: Its module.
        batch: As the step gets it.
        number: Of the batch.
    """

    trainer: Trainer
    pl_module: LightningModule
    batch: Any
    number: int

    def mask(self, name: str | None = None) -> TokenMask | None:
        """The mask whose hidden tokens can be exchanged without the loss moving, while it moves with the others.

        Args:
            name: Of the tensor, or its end, if only its meaning is asked.

        Returns:
            None: there is none in this batch, perhaps because it has no padding.
        """
        with self._step() as loss:
            return next(self._masks(loss, None if name is None else tensor_named(self.batch, name)[0]), None)

    def _masks(self, loss: Callable[[Any], Tensor | None], only: str | None) -> Iterator[TokenMask]:
        tensors = dict(named_tensors(self.batch))
        before: Tensor | None = None
        for name, mask in tensors.items():
            if only not in (None, name) or (places := _both(mask)) is None:
                continue
            before = loss(self.batch) if before is None else before
            for tokens in (t for n, t in tensors.items() if n != name and t.shape[:2] == places.shape):
                other = exchanged(tokens)
                if before is None or other is None:
                    continue
                moved = [_moved(before, loss(self._with(tokens, other, where))) for where in (places, ~places)]
                if moved[0] != moved[1]:
                    yield TokenMask(name, _KEEPS[int(moved[1])])

    def _with(self, tokens: Tensor, other: Tensor, where: Tensor) -> Any:
        spread = where.reshape(*where.shape, *[1] * (tokens.dim() - 2)).to(tokens.device)
        new = torch.where(spread, other, tokens)
        return apply_to_collection(self.batch, Tensor, lambda t: (new if t is tokens else t).clone())

    def size(self, rows: tuple[int, int]) -> tuple[float | None, float | None]:
        """Width of the model, and floating-point operations of a training step on the batch; None: unknown.

        Args:
            rows: Samples and padded length of the batch. The width is that of most outputs of modules with these.
        """
        widths: Counter[int] = Counter()

        def look(module: Any, args: Any, out: Any) -> None:
            widths.update(t.shape[2] for t in tensors_in(out) if t.dim() == 3 and tuple(t.shape[:2]) == rows)

        # Not as a hook on everything: what a container returns is counted with its last part.
        leaves = [m for m in self.pl_module.modules() if not list(m.children())]
        handles = [leaf.register_forward_hook(look) for leaf in leaves]
        flops: float | None = None
        try:
            with self._step() as loss, FlopCounterMode(display=False) as counter:
                loss(self.batch)
            flops = 3.0 * counter.get_total_flops()  # a backward takes twice a forward
        except Exception:  # an operation that the counter cannot trace; the report does without
            flops = None
        finally:
            for handle in handles:
                handle.remove()
        return (float(widths.most_common(1)[0][0]) if widths else None), flops or None

    def _step(self) -> _Step:
        return _Step(self)


class _Step:
    """The loss of the step as a function of the batch, in evaluation mode, everything as found afterwards."""

    def __init__(self, look: Look) -> None:
        self.replay = Replay(look.trainer, look.pl_module, "fit")
        self.number = look.number
        self.quiet = self.replay.quiet(parameters=False)

    def __enter__(self) -> Callable[[Any], Tensor | None]:
        self.quiet.__enter__()
        return self._loss

    def __exit__(self, *error: Any) -> Literal[False]:
        self.quiet.__exit__(*error)
        return False

    def _loss(self, batch: Any) -> Tensor | None:
        with suppress(Exception):  # a step that does not run outside its loop, or checks its input, says nothing
            out = self.replay.step(apply_to_collection(batch, Tensor, torch.clone), self.number)
            loss = out.get("loss") if isinstance(out, dict) else out
            return loss.detach() if isinstance(loss, Tensor) else None
        return None


def _both(mask: Tensor) -> Tensor | None:
    """Where a tensor that could be a mask of (samples, tokens) is not zero; None: it could not, or hides nothing."""
    if mask.dim() < 2 or mask.is_complex() or mask.numel() != mask.shape[0] * mask.shape[-1]:
        return None
    rows = mask.reshape(mask.shape[0], -1)
    additive = mask.is_floating_point() and bool(((rows == 0) | (rows <= -100)).all())
    if mask.dtype != torch.bool and not additive and not bool(((rows == 0) | (rows == 1)).all()):
        return None
    places = rows != 0
    return places if bool(places.any()) and not bool(places.all()) else None


def _moved(before: Tensor, after: Tensor | None) -> bool:
    return after is None or not bool((after - before).abs() <= 1e-6 * before.abs())
