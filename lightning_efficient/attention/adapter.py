"""Attention scaled inside one module's forward, for what no weight can scale. Installed on the instance, undoable."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.attention.temper import Law, Temper

# nn.TransformerEncoder turns padded batches into nested tensors, which only the fused path can attend over.
_NESTED = "use_nested_tensor"


class TemperedForward:
    """Stands in a module's ``forward`` attribute and runs its own forward with scaled attention.

    An object, not a closure: it can be pickled, and a deep copy of the module runs the copy. ``torch.compile`` and
    ``torch.export`` trace through it.

    Args:
        module: The module.
        law: How its logits are multiplied.
    """

    def __init__(self, module: nn.Module, law: Law) -> None:
        self.module, self.law = module, law
        self.inner = vars(module).get("forward")  # somebody else's, on the instance
        self.hook: RemovableHandle | None = None
        self.nested: list[nn.TransformerEncoder] = []

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner or type(self.module).forward.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        with Temper(self.law):
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)


def install(model: nn.Module, module: nn.Module, law: Law) -> None:
    """Scale the attention that a module's forward computes.

    Args:
        model: The whole model: where it runs ``nn.MultiheadAttention`` through the fused inference path of
            ``nn.TransformerEncoder``, which does not call the module's forward, that path is switched off.
        module: The module.
        law: How its logits are multiplied.
    """
    forward = TemperedForward(module, law)
    if isinstance(module, nn.MultiheadAttention):
        forward.hook = module.register_forward_pre_hook(_no_fast_path)
        for encoder in (m for m in model.modules() if isinstance(m, nn.TransformerEncoder)):
            if encoder.use_nested_tensor and any(m is module for m in encoder.modules()):
                setattr(encoder, _NESTED, False)
                forward.nested.append(encoder)
    module.forward = forward


def installed(module: nn.Module) -> TemperedForward | None:
    """The adapter of a module, if it has one."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, TemperedForward) else None


def remove(module: nn.Module) -> None:
    """Give a module its own forward back.

    Args:
        module: A module that :func:`install` was called on.

    Raises:
        ValueError: It has no adapter, or something else has been put over it.
    """
    forward = installed(module)
    if forward is None:
        raise ValueError(f"{type(module).__name__} has no attention adapter on it; was its `forward` replaced since?")
    del module.forward
    if forward.inner is not None:
        module.forward = forward.inner
    if forward.hook is not None:
        forward.hook.remove()
    for encoder in forward.nested:
        setattr(encoder, _NESTED, True)


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """A hook of any kind makes ``nn.TransformerEncoderLayer`` call its attention module."""
