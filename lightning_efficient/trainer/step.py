"""``training_step`` wrapped on the instance, so that what it returns can be changed; undone without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule


class _Step:
    """Stands for ``training_step`` on the instance; copies and pickles of the module have the original."""

    def __init__(self, step: Callable[..., Any], run: Callable[..., Any], pl_module: LightningModule) -> None:
        functools.update_wrapper(self, step)  # Lightning reads the user's signature off `__wrapped__`
        self._step, self._run, self._of = step, run, pl_module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._step, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _bound, (getattr(self._step, "__func__", self._step), self._of)


def _bound(function: Callable[..., Any], of: LightningModule) -> MethodType:
    return MethodType(function, of)


def wrap_training_step(
    pl_module: LightningModule, run: Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
) -> Callable[[], None]:
    """Have a Trainer call something else instead of a module's ``training_step``.

    It goes on the instance, where strategies look it up at each call, and where stand-ins of the module leave it out.

    Args:
        pl_module: The module.
        run: Called with the original, bound, and the arguments; returns what the step returns.

    Returns:
        What undoes it.
    """
    previous = pl_module.__dict__.get("training_step")
    wrapped = _Step(pl_module.training_step, run, pl_module)
    pl_module.__dict__["training_step"] = wrapped

    def undo() -> None:
        if pl_module.__dict__.get("training_step") is wrapped:
            del pl_module.__dict__["training_step"]
            if previous is not None:
                pl_module.__dict__["training_step"] = previous

    return undo
