"""The switch for training scripts that have never heard of us: ``LIGHTNING_EFFICIENT=methods.yaml python train.py``.

Lightning calls :func:`callbacks_from_environment` at every ``Trainer()`` of every script in an environment where this
package is installed, through the entry point group ``lightning.pytorch.callbacks_factory``. Hence no imports here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
from lightning_efficient.common.names import RUN_VARIABLE, VARIABLE


def callbacks_from_environment() -> list[Callback]:
    """Callbacks for the methods in the YAML file that ``LIGHTNING_EFFICIENT`` names; none if it is unset or empty.

    A Trainer that has a callback of the same method and targets already makes Lightning raise "Found more than one
    stateful callback": a factory is not told what the script itself passes. A process that ``ablate`` started also
    gets a callback that reports its progress, ahead of the methods, and one that keeps a point to resume from.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not what :func:`lightning_efficient.lifecycle.methods.read_methods_file` expects.
    """
    callbacks: list[Callback] = []
    path = os.environ.get(VARIABLE)
    if path:
        from lightning_efficient.lifecycle.methods import announce, read_methods_file

        ours = read_methods_file(path)
        announce(ours, f"{VARIABLE}={path}")
        callbacks += ours
    if os.environ.get(RUN_VARIABLE):
        from lightning_efficient.ablation.reporter import callbacks_of_the_run

        before, after = callbacks_of_the_run()
        callbacks = [before, *callbacks, *after]
    return callbacks
