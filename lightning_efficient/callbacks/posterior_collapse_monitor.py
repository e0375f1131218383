"""``PosteriorCollapseMonitor``: which latent units of a variational autoencoder still say something, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_efficient.common.nests import named_tensors
from lightning_efficient.lifecycle.monitor import MonitoredStage, SeenCall, StageMonitor
from lightning_efficient.metrics import PosteriorCollapse
from lightning_efficient.metrics.functional.pooling import tensor_of
from lightning_efficient.trainer.showing import Picture

_SCALARS = ("active_units", "collapsed", "active_pairs", "kl_total", "units")


class PosteriorCollapseMonitor(StageMonitor):
    """Watch the latent units of a variational autoencoder for posterior collapse; changes nothing in the run.

    At the end of each epoch of the stage, under ``efficient/posterior_collapse_monitor/``: ``active_units``,
    ``collapsed`` (share), ``active_pairs``, ``kl_total`` (nats) and ``units``, as
    :class:`lightning_efficient.metrics.PosteriorCollapse` defines them, and ``samples``. ``EarlyStopping`` and
    ``ModelCheckpoint`` can monitor them. TensorBoard also gets the KL of every unit and the collapse curve, a picture.
    Losses, weights and random numbers are those of a run without the monitor, to the bit.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        mu: Name of the module that returns posterior means ``(samples, ...)``, every element a unit; or, without
            ``logvar``, both: two tensors, or one whose last axis (the channels of a feature map) has both halves.
        logvar: Name of the module that returns logarithms of the variances. ``None``: ``mu`` returns both.
        prior_mu: Like ``mu``, of a prior that depends on the input. ``None``: fixed at 0.
        prior_logvar: Like ``logvar``, of the prior.
        prior_std: Standard deviation of a fixed prior.
        eps: KL below which a unit says nothing about a sample, in nats.
        delta: Share of samples for which a collapsed unit may say something.
        stage: Whose batches are read: ``"train"``, ``"val"`` or ``"test"``.
        max_samples: Samples of an epoch that are read, from the first, over all processes.
        name: Set between the method and the quantity in logged names; needed where two of these monitors run.
        picture: Draw for TensorBoard.

    Raises:
        ValueError: ``mu`` is not given, an argument is out of range, or the modules' outputs do not fit together.
        NoMatchError: There is no such module.

    Source: see :class:`lightning_efficient.metrics.PosteriorCollapse`.
    """

    method = "posterior_collapse_monitor"
    only_with = (("prior_logvar", (None,), ("prior_std",)),)
    quantities = "posterior collapse"

    def __init__(
        self,
        enabled: bool = True,
        mu: str | None = None,
        logvar: str | None = None,
        prior_mu: str | None = None,
        prior_logvar: str | None = None,
        prior_std: float = 1.0,
        eps: float = 0.01,
        delta: float = 0.05,
        stage: MonitoredStage = "val",
        max_samples: int = 25_600,
        name: str | None = None,
        picture: bool = True,
    ) -> None:
        super().__init__(enabled, stage, max_samples, name, picture)
        self.mu, self.logvar = mu, logvar
        self.prior_mu, self.prior_logvar = prior_mu, prior_logvar
        self.prior_std, self.eps, self.delta = prior_std, eps, delta
        self.forget()

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        names = ("mu", "logvar", "prior_mu", "prior_logvar", "prior_std", "eps", "delta")
        return super().config() | {name: getattr(self, name) for name in names}

    @property
    def state_key(self) -> str:
        """Tells two monitors of one Trainer apart."""
        return self._generate_state_key(mu=self.mu, stage=self.stage, name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the module, which nothing can find."""
        super().setup(trainer, pl_module, stage)
        if self.enabled and self.mu is None:
            raise ValueError(
                "PosteriorCollapseMonitor: `mu` is not given: name the module that returns the posterior means, and by "
                "`logvar` the one of the log variances unless it returns both."
            )

    def watched(self) -> dict[str, str]:
        """Those that are named."""
        given = {name: getattr(self, name) for name in ("mu", "logvar", "prior_mu", "prior_logvar")}
        return {argument: name for argument, name in given.items() if name is not None}

    def forget(self) -> None:
        """Empty sums."""
        self._metric = PosteriorCollapse(self.eps, self.delta, prior_std=self.prior_std)
        self._drawn: dict[str, Tensor] = {}

    def take(self, calls: Mapping[str, list[SeenCall]], batch: Any, room: int) -> Tensor:
        """Add the last call of each module in the step."""
        missing = [argument for argument in self.watched() if argument not in calls]
        if missing:
            raise ValueError(f"PosteriorCollapseMonitor: the modules of {missing} were not called where others were.")
        found: dict[str, Tensor] = {}
        for which in ("", "prior_"):
            if f"{which}mu" in calls:
                output = calls[f"{which}mu"][-1].output
                if f"{which}logvar" in calls:
                    found[f"{which}mu"] = tensor_of(output)
                else:
                    found[f"{which}mu"], found[f"{which}logvar"] = self._both(output, f"{which}mu")
            if f"{which}logvar" in calls:
                found[f"{which}logvar"] = tensor_of(calls[f"{which}logvar"][-1].output)
        rows = {name: tensor.detach()[:room].flatten(1) for name, tensor in found.items()}
        if all(bool(tensor.isfinite().all()) for tensor in rows.values()):
            self._metric.to(rows["mu"].device).update(**rows)
        return torch.cat(list(rows.values()), 1)

    def _both(self, output: Any, argument: str) -> tuple[Tensor, Tensor]:
        tensors = [t for _, t in named_tensors(output) if t.is_floating_point() and t.dim() > 1]
        if len(tensors) >= 2 and tensors[0].shape == tensors[1].shape:
            return tensors[0], tensors[1]
        axis = 1 if tensors and tensors[0].dim() > 3 else -1
        if len(tensors) != 1 or tensors[0].shape[axis] % 2:
            shapes = [tuple(t.shape) for t in tensors]
            raise ValueError(
                f"PosteriorCollapseMonitor: {argument}={getattr(self, argument)!r} returned {shapes}; expected means "
                "and log variances, as two tensors of one shape or two halves of one. Or name another module by "
                f"`{argument.replace('mu', 'logvar')}`."
            )
        mu, logvar = tensors[0].chunk(2, axis)
        return mu, logvar

    def names(self) -> list[str]:
        """What is logged, where outputs are no numbers."""
        return list(_SCALARS)

    def figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Over all samples of all processes."""
        values = self._metric.to(pl_module.device).compute()
        self._drawn = {name: value.cpu() for name, value in values.items()}
        return {name: float(values[name]) for name in _SCALARS}

    def draw(self, step: int) -> Mapping[str, Callable[[], Picture]]:
        """KL of the units, largest first, and the share that has collapsed for every ``eps``."""
        return {"units": self._picture}

    def _picture(self) -> Picture:
        from matplotlib.figure import Figure  # half a second that a run without a picture need not wait

        figure = Figure(figsize=(8, 3.2), layout="constrained", dpi=110)
        left, right = figure.subplots(1, 2)
        kl = self._drawn["kl"].sort(descending=True).values
        left.bar(range(1, len(kl) + 1), kl.tolist())
        left.set(xlabel="unit, by KL", ylabel="KL, nats")
        right.plot(self._drawn["eps"].tolist(), self._drawn["collapsed_curve"].tolist(), marker=".")
        right.set(xscale="log", xlabel="eps, nats", ylabel="share of units collapsed", ylim=(-0.02, 1.02))
        return figure
