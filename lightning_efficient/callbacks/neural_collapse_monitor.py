"""``NeuralCollapseMonitor``: NC1 to NC4 of a classifier, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_efficient.common.nests import named_tensors, tensors_in
from lightning_efficient.lifecycle.monitor import MonitoredStage, SeenCall, StageMonitor
from lightning_efficient.metrics import NeuralCollapse
from lightning_efficient.metrics.functional.neural_collapse import GlobalMean
from lightning_efficient.metrics.heatmap import heatmap
from lightning_efficient.metrics.streaming import gathered
from lightning_efficient.trainer.heads import Head, find_head
from lightning_efficient.trainer.replay import Stage
from lightning_efficient.trainer.showing import Picture

_STAGES: dict[str, Stage] = {"train": "fit", "val": "validate", "test": "test"}
_PICTURE = 40  # classes; more have no room


class NeuralCollapseMonitor(StageMonitor):
    """Watch the last features of a classifier and its weights for neural collapse; changes nothing in the run.

    At the end of each epoch of the stage, under ``efficient/neural_collapse_monitor/``: ``nc1`` to ``nc4`` and their
    parts, as :class:`lightning_efficient.metrics.NeuralCollapse` defines them, and ``samples``. ``EarlyStopping`` and
    ``ModelCheckpoint`` can monitor them. TensorBoard also gets the cosines between the centred class means, a picture.

    The head and the labels are found on the first batch, by trying: the last linear layer whose output changes the
    loss, if no other reaches it another way, and the integers of the batch that change the loss and not that output.
    Where that does not single one out, an error asks for the name. Labels outside the classes (-100) are left out.
    Losses, weights and random numbers are those of a run without the monitor, to the bit.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        head: Name of the classifier, a linear layer. ``None``: found.
        labels: Where the labels are in a batch: ``"1"``, ``"target"``. ``None``: found.
        global_mean: ``"classes"``: the mean of the class means, ``"samples"``: of all samples.
        stage: Whose batches are read: ``"train"``, ``"val"`` or ``"test"``. The paper measures the training set with
            the weights at the end of an epoch; in ``"train"`` they change while it is read.
        max_samples: Samples of an epoch that are read, from the first, over all processes.
        name: Set between the method and the quantity in logged names; needed where two of these monitors run.
        picture: Draw the cosines for TensorBoard, of at most 40 classes.

    Raises:
        ValueError: An argument out of range; two monitors of one name in one Trainer.
        NoMatchError: There is no such module; or head or labels are not found.

    Source: Papyan, Han and Donoho, PNAS 2020, arXiv 2008.08186.
    """

    method = "neural_collapse_monitor"
    quantities = "neural collapse"

    def __init__(
        self,
        enabled: bool = True,
        head: str | None = None,
        labels: str | None = None,
        global_mean: GlobalMean = "classes",
        stage: MonitoredStage = "val",
        max_samples: int = 25_600,
        name: str | None = None,
        picture: bool = True,
    ) -> None:
        super().__init__(enabled, stage, max_samples, name, picture)
        NeuralCollapse(2, global_mean=global_mean)  # refuses what it does not know
        self.head = head
        self.labels = labels
        self.global_mean: GlobalMean = global_mean
        self._found: Head | None = None
        self.forget()

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return super().config() | {name: getattr(self, name) for name in ("head", "labels", "global_mean")}

    @property
    def state_key(self) -> str:
        """Tells two monitors of one Trainer apart."""
        return self._generate_state_key(head=self.head, stage=self.stage, name=self.name)

    def watched(self) -> dict[str, str]:
        """The head, once it is known."""
        name = self.head if self._found is None else self._found.name
        return {} if name is None else {"head": name}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Another run may have another model."""
        super().setup(trainer, pl_module, stage)
        self._found = None

    def prepare(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Find the head and the labels."""
        if self._found is None:
            self._found = (
                Head(self.head, self.labels)
                if self.head is not None and self.labels is not None
                else find_head(trainer, pl_module, _STAGES[self.stage], batch, self.head, self.labels)
            )

    def forget(self) -> None:
        """Empty sums."""
        self._metric: NeuralCollapse | None = None
        self._cosines: Tensor | None = None
        self._classes = 0

    def take(self, calls: Mapping[str, list[SeenCall]], batch: Any, room: int) -> Tensor:
        """Add the features of the call that has a row for each label."""
        assert self._found is not None
        tensors = dict(named_tensors(batch))
        if self._found.labels not in tensors:
            raise ValueError(
                f"NeuralCollapseMonitor: labels={self._found.labels!r} is not in the batch; it has {list(tensors)}."
            )
        labels = tensors[self._found.labels].flatten()
        for call in calls["head"]:
            features = next(tensors_in((call.args, dict(call.kwargs)))).detach().flatten(0, -2)
            if len(features) == len(labels):
                return self._add(call, features, labels, room)
        raise ValueError(
            f"NeuralCollapseMonitor: labels={self._found.labels!r} has {len(labels)} entries, and no call of "
            f"head={self._found.name!r} as many rows."
        )

    def _add(self, call: SeenCall, features: Tensor, labels: Tensor, room: int) -> Tensor:
        output, weight = call.output.detach().flatten(0, -2), cast(Tensor, call.module.weight).detach()
        valid = ((labels >= 0) & (labels < output.shape[1])).nonzero().flatten()[:room]
        rows = features[valid]
        if bool(rows.isfinite().all()):
            if self._metric is None:
                self._metric = NeuralCollapse(
                    output.shape[1], global_mean=self.global_mean, nc4_samples=self.max_samples
                ).to(features.device)
            weight = weight if weight.shape[0] == output.shape[1] else weight.t()  # Hugging Face's Conv1D
            self._metric.update(rows, labels[valid], weight, logits=output[valid])
        return rows

    def names(self) -> list[str]:
        """What is logged, where features are no numbers."""
        return ["nc1", "nc2", "nc3", "nc4"]

    def figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Over all samples of all processes."""
        # A process that has read nothing takes part with empty sums.
        width = int(
            self.over_processes(trainer, pl_module, 0 if self._metric is None else self._metric.num_classes, "max")
        )
        metric = self._metric or NeuralCollapse(width, global_mean=self.global_mean).to(pl_module.device)
        with metric.sync_context(dist_sync_fn=gathered):
            if int(metric.sums().seen().sum()) < 2:
                self.tell(f"samples of fewer than two classes were read in a {self.stage} epoch: nothing is logged.")
                return {}
            values = metric.measured()
            self._cosines = metric.cosines()
        return {name: float(value) for name, value in values.items()}

    def draw(self, step: int) -> Mapping[str, Callable[[], Picture]]:
        """The cosines between the centred class means."""
        if (cosines := self._cosines) is None or (k := len(cosines)) > _PICTURE:
            return {}
        return {
            "cosines": lambda: heatmap(
                cosines.tolist(), [str(i) for i in range(k)], title=f"cosines of class means, step {step}",
                unit="cosine", low=-1.0, high=1.0, legend=f"a simplex has {-1 / (k - 1):.3f} beside the diagonal",
                axes=("class", "class"),
            )
        }  # fmt: skip
