"""A canary: a few batches on which a network in training is scored, without the run noticing."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_efficient.companions.predictions import SCORES, CrossEntropies, Predictions, score_of
from lightning_efficient.trainer.replay import Replay
from lightning_efficient.trainer.validation import ValidationLog, validation_loaders

_SEED = 0


class Canary:
    """Scores the network as it is, by the user's own ``validation_step``, or by a function.

    Args:
        trainer: Inside ``fit``, from ``on_fit_start`` on.
        pl_module: Its module.
        canary: A batch as a validation loader gives it, a DataLoader, a function of the module, or None: the first of
            the validation data.
        score: One of :data:`~lightning_efficient.companions.predictions.SCORES`, ``"loss"``, or the name of something
            that validation logs.
        batches: How many of the validation data.
        larger: Whether the model is better where the score is larger.

    Raises:
        ValueError: There is no ``validation_step`` or no validation data, and one is needed.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, canary: Any, score: str, batches: int, larger: bool = False
    ) -> None:
        self.trainer, self.pl_module, self.score, self.larger = trainer, pl_module, score, larger
        self._function: Callable[[LightningModule], Any] | None = canary if callable(canary) else None
        self._batches: list[Any] = []
        if self._function is None:
            if not is_overridden("validation_step", pl_module):
                raise ValueError(
                    f"a canary is scored by `validation_step`, which {type(pl_module).__name__} does not have: write "
                    "one, or give a function as `canary`, which takes the module and returns a number."
                )
            self._batches = self._read(canary, batches)

    def _read(self, canary: Any, batches: int) -> list[Any]:
        if canary is not None and not isinstance(canary, DataLoader):
            return [canary]
        loaders = [canary] if canary is not None else validation_loaders(self.trainer)
        if not loaders:
            raise ValueError(
                "there is no validation data for a canary: give the Trainer `val_dataloaders` and leave "
                "`limit_val_batches` above 0, or give a batch, a DataLoader or a function as `canary`."
            )
        replay = Replay(self.trainer, self.pl_module, "validate")
        with replay.quiet(parameters=False):
            return list(replay.raw_batches(loaders[0], None if canary is not None else batches))

    def __call__(self) -> float:
        """The score now, the worst of all processes; infinite (or minus it) where it is not finite anywhere.

        Raises:
            ValueError: The step does not show what the score is made of.
        """
        log = ValidationLog(False)
        replay = Replay(self.trainer, self.pl_module, "validate", None if self.score in SCORES else log.add)
        with replay.quiet():
            torch.manual_seed(_SEED)  # what is drawn is drawn alike in every check
            value = float(self._function(replay.twin)) if self._function is not None else self._scored(replay, log)
        worst = -math.inf if self.larger else math.inf
        value = value if math.isfinite(value) else worst
        if self.trainer.world_size > 1:
            number = torch.tensor(value, dtype=torch.float32, device=self.trainer.strategy.root_device)
            kind = "min" if self.larger else "max"
            value = float(self.trainer.strategy.reduce(number, reduce_op=kind))
        return value

    def _scored(self, replay: Replay, log: ValidationLog) -> float:
        seen, losses = Predictions(), []
        for metric in (m for m in replay.twin.modules() if isinstance(m, Metric)):
            metric.reset()
        replay.twin.on_validation_epoch_start()
        for number, raw in enumerate(self._batches):
            batch = replay.given(raw)
            log.at(0, batch)
            with CrossEntropies() as calls:
                output = replay.validate(batch, number, 0 if len(self.trainer.num_val_batches) > 1 else None)
            losses.append(output.get("loss") if isinstance(output, Mapping) else output)
            samples = _samples(batch) if self.score == "sequence_perplexity" else None
            if self.score in SCORES and not calls.give(seen, samples):
                raise ValueError(
                    f"score={self.score!r} reads the logits and targets of `cross_entropy` (or `nll_loss`), and "
                    f"{type(self.pl_module).__name__}.validation_step computes none. Use score='loss', the name of "
                    "something that it logs, or give a function as `canary`."
                )
        log.at(None, None)
        if self.score in SCORES:
            return score_of(self.score, seen)
        numbers = [float(loss) for loss in losses if isinstance(loss, Tensor) and loss.numel() == 1]
        if self.score == "loss" and len(numbers) == len(losses):
            return sum(numbers) / len(numbers)
        replay.twin.on_validation_epoch_end()
        return log.value(self._logged(sorted(log.known)), self.trainer)

    def _logged(self, names: list[str]) -> str:
        wanted = [name for name in names if "loss" in name] if self.score == "loss" else []
        if self.score in names or len(wanted) == 1:
            return self.score if self.score in names else wanted[0]
        close = difflib.get_close_matches(self.score, names, 1)
        said = "returns no loss and logs " if self.score == "loss" else "logs "
        raise ValueError(
            f"`score` is {self.score!r}{f' (did you mean {close[0]!r}?)' if close else ''}; expected one of "
            f"{', '.join([*SCORES, 'loss'])}, or something that {type(self.pl_module).__name__}.validation_step logs: "
            f"it {said}{names or 'nothing'}."
        )


def _samples(batch: Any) -> int | None:
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:  # nothing in it has a size
        return None
