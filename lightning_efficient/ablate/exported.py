"""What a run's model costs once it is exported, logged by the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_efficient.ablate.files import EXPORT, write_json
from lightning_efficient.compare.exported import log_exported
from lightning_efficient.inference import ExportError


class ExportedCost(Callback):
    """Exports the model as training leaves it, measures the copy and logs its figures; keeps no file of it.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is missing before hours of training, not after."""
        if pl_module.example_input_array is None:
            raise ValueError(
                f"`export` measures a forward pass: give {type(pl_module).__name__} an `example_input_array`."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure. What cannot be exported has been trained nevertheless: the reason is kept, and the run goes on."""
        if not trainer.is_global_zero:
            return
        inputs: Any = pl_module.example_input_array
        try:
            log_exported(trainer.loggers, pl_module, inputs, step=trainer.global_step)
        except ExportError as error:
            write_json(self.folder / EXPORT, {"error": str(error)})
