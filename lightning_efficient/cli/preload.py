"""Imported once for all runs of ``lightning-efficient fit`` that fork from one process: what each would import."""

import timm  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import lightning_efficient
import lightning_efficient.cli.commands

for _name in lightning_efficient.__all__:  # imported when they are asked for
    getattr(lightning_efficient, _name)
