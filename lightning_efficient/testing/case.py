"""One cell of the battery's table, and the pieces its runs are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Sampler

from lightning_efficient.lifecycle.base import EfficientCallback

Loader = DataLoader[Any]
Callbacks: TypeAlias = EfficientCallback | Sequence[EfficientCallback]


class ResumableLoader:
    """The batches of another loader, which continue where a checkpoint left them."""

    def __init__(self, loader: Loader) -> None:
        self.batches = list(loader)
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.position = self.position, 0
        for i in range(start, len(self.batches)):
            self.position = (i + 1) % len(self.batches)
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        """Where to continue."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there."""
        self.position = state["position"]


@dataclass
class Case:
    """One cell of the table.

    Args:
        callback: Makes the callback, or a tuple of them that are used together.
        modules: Variant → makes a fresh module with the same initial weights each time. ``"plain"`` is required; the
            scenarios ``configure_model``, ``setup``, ``checkpointing``, ``manual``, ``prebuilt_optimizer``, ``fsdp2``
            and ``tp`` use the variant of their name; the last two are built in ``__init__``, and cut in
            ``configure_model`` where there is a ``device_mesh``.
        loader: ``loader(batches, size, dtype)`` makes a data loader without shuffling.
        root: Folder for checkpoints.
        folds: Whether the method's checkpoints are plain: loadable without this package.
        steps: Optimizer steps a run takes.
        more_graphs: How many graphs more than without the callback ``torch.compile`` may build in a run.
    """

    callback: Callable[[], Callbacks]
    modules: Mapping[str, Callable[[], LightningModule]]
    loader: Callable[[int, int, torch.dtype], Loader]
    root: Path
    folds: bool = True
    steps: int = 6
    more_graphs: int = 0

    def ours(self) -> tuple[EfficientCallback, ...]:
        """Fresh callbacks."""
        made = self.callback()
        return (made,) if isinstance(made, EfficientCallback) else tuple(made)

    def trainer(self, *extra: Callback, with_callback: bool = True, **kwargs: Any) -> Trainer:
        """A quiet CPU Trainer with the callback first, unless ``extra`` contains one already."""
        callbacks = list(extra)
        if with_callback and not any(isinstance(cb, EfficientCallback) for cb in callbacks):
            callbacks = [*self.ours(), *callbacks]
        defaults: dict[str, Any] = {
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": self.root,
            "max_steps": self.steps, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        }  # fmt: skip
        return Trainer(callbacks=callbacks, **{**defaults, **kwargs})

    def data(self, batches: int | None = None, size: int = 4, dtype: torch.dtype = torch.float32) -> Loader:
        """As many batches as a run has steps, unless said otherwise."""
        return self.loader(self.steps if batches is None else batches, size, dtype)

    def train(self, trainer: Trainer, module: LightningModule, data: Loader | ResumableLoader, **kwargs: Any) -> None:
        """``trainer.fit`` with a validation batch."""
        dtype = next(iter(data))[0].dtype if isinstance(data, DataLoader) else torch.float32
        trainer.fit(module, data, self.loader(1, 4, dtype), **kwargs)

    def fit(self, variant: str = "plain", *extra: Callback, **kwargs: Any) -> tuple[Trainer, LightningModule]:
        """A fresh module of the variant, trained."""
        module = self.modules[variant]()
        trainer = self.trainer(*extra, **kwargs)
        self.train(trainer, module, self.data())
        return trainer, module


class Dealt(Sampler[int]):
    """Deals samples out to the processes like cards, without the shuffling that Lightning's sampler adds."""

    def __init__(self, size: int, processes: int) -> None:
        self.size, self.processes = size, processes

    def __len__(self) -> int:
        return self.size // self.processes

    def __iter__(self) -> Iterator[int]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return iter(range(rank, self.size, self.processes))


class FixedStatistics(Callback):
    """Keeps batch norm in evaluation mode, since batch statistics make no two ways of batching equal.

    Args:
        module: Whose batch norms, those that it has now; None: those that there are in training.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.held = None if module is None else _batch_norms(module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Freeze the running statistics."""
        for module in _batch_norms(pl_module) if self.held is None else self.held:
            module.eval()


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
