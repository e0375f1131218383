"""Imported once for all runs of ``lightning-efficient fit`` that fork from one process: what each would import."""

import timm  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

from lightning_efficient.cli import commands  # noqa: F401
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import callback_class

for _method in METHODS.with_callback:  # imported when they are asked for
    callback_class(_method)
