"""Running compiled modules as they are written."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def uncompiled() -> AbstractContextManager[object]:
    """Context in which ``torch.compile`` wrappers run eagerly.

    For passes in a mode of their own (measuring, recalibrating): compiled code rounds differently, hides what happens
    inside, and would be compiled anew for them.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
