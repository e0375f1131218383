"""``save_pretrained`` of Hugging Face and PEFT refused, by name, while what it writes would not be the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_efficient.common.comparing import ExportError

# Their own way to a file, which knows nothing of what has been done to the model.
SAVE = "save_pretrained"


class RefusedSave:
    """Stands in a model's ``save_pretrained`` attribute while the file that it writes would lose something.

    Args:
        inner: What stood there before, on the instance.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.holders: list[tuple[Any, str]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            ExportError: Always.
        """
        raise ExportError(" ".join(dict.fromkeys(f"{SAVE} {why}" for _, why in self.holders)))

    def besides(self, holder: Any) -> Any:
        """What stood there, if nothing but this holder would be lost; else the refusal."""
        return self if any(one is not holder and one != holder for one, _ in self.holders) else self.inner


def save_besides(model: Any, holder: Any, folder: str | os.PathLike[str], **options: Any) -> None:
    """The library's own way to a folder, which may refuse for the sake of a holder alone: the caller keeps that.

    Args:
        model: The model.
        holder: As for :func:`refuse_saving`.
        folder: To write.
        options: Of that way.

    Raises:
        ExportError: It refuses for another reason.
    """
    own = vars(model).get(SAVE)
    save = own.besides(holder) if isinstance(own, RefusedSave) else own
    if save is None:
        type(model).save_pretrained(model, folder, **options)
    else:
        save(folder, **options)


def refuse_saving(model: nn.Module, holder: Any, why: str, of: Sequence[nn.Module] | None = None) -> None:
    """Have ``save_pretrained`` refuse, on the instances; until :func:`allow_saving`.

    Args:
        model: The whole model.
        holder: What the file would lose; plain data, or a module.
        why: What it would do, and what to do instead; the error says ``"save_pretrained "`` before it.
        of: The modules whose ``save_pretrained`` would; None: all that hold the module ``holder``.
    """
    if of is None:
        of = [m for m in model.modules() if any(child is holder for child in m.modules())]
    for owner in of:
        if not callable(getattr(owner, SAVE, None)):
            continue
        refusal = vars(owner).get(SAVE)
        if not isinstance(refusal, RefusedSave):
            refusal = RefusedSave(refusal)
            setattr(owner, SAVE, refusal)
        refusal.holders.append((holder, why))


def allow_saving(model: nn.Module, holder: Any) -> None:
    """Undo :func:`refuse_saving`.

    Args:
        model: The whole model, or any part of it that is to be allowed again.
        holder: As given there.
    """
    for owner in model.modules():
        if isinstance(refusal := vars(owner).get(SAVE), RefusedSave):
            refusal.holders = [(one, why) for one, why in refusal.holders if one is not holder and one != holder]
            if not refusal.holders:
                delattr(owner, SAVE)
                if refusal.inner is not None:
                    setattr(owner, SAVE, refusal.inner)
