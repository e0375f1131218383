"""Running compiled modules as they are written."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def inside_compiled(module: nn.Module) -> nn.Module | None:
    """What ``torch.compile`` has wrapped, if the module is such a wrapper."""
    children = module._modules  # of a scripted module no dict
    return children["_orig_mod"] if "_orig_mod" in children else None  # noqa: SIM401


def uncompiled() -> AbstractContextManager[object]:
    """Context in which ``torch.compile`` wrappers run eagerly.

    For passes in a mode of their own (measuring, recalibrating): compiled code rounds differently, hides what happens
    inside, and would be compiled anew for them.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
