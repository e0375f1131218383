"""Posterior collapse accumulated over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.metrics.functional.posterior_collapse import kl_per_unit
from lightning_efficient.metrics.functional.spectrum import check_embeddings
from lightning_efficient.metrics.streaming import StreamingMetric

_AXES = {"total": 1, "squares": 1, "kl": 1, "below": 2}


class PosteriorCollapse(StreamingMetric):
    """Which latent units of a variational autoencoder still say something, by three definitions that disagree.

    ``compute`` returns a dictionary:

    - ``active_units``: units whose posterior mean varies over the data by more than ``variance`` (Burda et al.); with a
      prior that depends on the input, the mean's distance to the prior's;
    - ``collapsed``: share of units that are (``eps``, ``delta``)-collapsed: their KL is below ``eps`` for at least
      ``1 - delta`` of the samples (Lucas et al.); ``collapsed_curve``: the same for every ``eps`` of the grid,
      ``(grid,)``, and ``eps``, the grid;
    - ``active_pairs``: share of (sample, unit) pairs with a KL of at least ``eps``; what the code of arXiv 2306.05023
      calls active units;
    - ``kl``: mean KL of each unit, in nats, ``(units,)``; ``kl_total``: their sum; ``variance``: of the posterior mean
      of each unit, ``(units,)``; ``units`` and ``samples``: how many.

    A unit with a mean that varies by 0.043 is active by the first definition, while about half of its KLs are below
    0.01. Sums are float64; few samples make the variance noisy.

    Args:
        eps: KL below which a unit says nothing about a sample, in nats.
        delta: Share of samples for which a collapsed unit may say something.
        variance: Above it a unit is active.
        prior_std: Standard deviation of a fixed prior.
        grid: Values of ``eps`` of the curve. ``None``: 26 from 1e-4 to 10, evenly in logarithm.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: An argument out of range; ``update`` with shapes that do not fit, NaN or infinite values;
            ``compute`` before the first sample.

    Source: Burda, Grosse and Salakhutdinov, 2016, arXiv 1509.00519 (active units); Lucas et al., NeurIPS 2019, arXiv
    1911.02469 (collapse); Dang et al., ICLR 2024, arXiv 2306.05023.
    """

    higher_is_better = None
    samples: Tensor
    total: Tensor
    squares: Tensor
    kl: Tensor
    below: Tensor

    def __init__(
        self,
        eps: float = 0.01,
        delta: float = 0.05,
        variance: float = 0.01,
        prior_std: float = 1.0,
        grid: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("eps", eps), ("variance", variance), ("prior_std", prior_std)):
            if not value > 0:
                raise ValueError(f"`{name}` is {value}; expected a number above 0.")
        if not 0 <= delta < 1:
            raise ValueError(f"`delta` is {delta}; expected a share from 0 below 1.")
        self.eps, self.delta, self.variance, self.prior_std = eps, delta, variance, prior_std
        self.grid = tuple(torch.logspace(-4, 1, 26, dtype=torch.float64).tolist() if grid is None else grid)
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for name, axes in _AXES.items():
            self.add_sum(name, axes)

    @torch.no_grad()
    def update(
        self, mu: Tensor, logvar: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None
    ) -> None:
        """Add samples.

        Args:
            mu: Posterior means ``(samples, ...)``; every element of a sample is a unit.
            logvar: Logarithms of the posterior variances, same shape.
            prior_mu: Prior means, of a conditional or hierarchical prior. ``None``: 0.
            prior_logvar: Logarithms of the prior variances. ``None``: those of ``prior_std``.
        """
        given = {"mu": mu, "logvar": logvar, "prior_mu": prior_mu, "prior_logvar": prior_logvar}
        known = self.width(self.total, 1 if int(self.samples) else None)
        wide = {name: self._rows(name, tensor, mu, known) for name, tensor in given.items() if tensor is not None}
        kl = kl_per_unit(**wide, prior_std=self.prior_std)
        apart = wide["mu"] - wide.get("prior_mu", 0.0)
        levels = kl.new_tensor([*self.grid, self.eps])
        self.add(
            samples=len(kl), total=apart.sum(0), squares=apart.square().sum(0), kl=kl.sum(0),
            below=torch.stack([(kl < level).sum(0) for level in levels], 1),
        )  # fmt: skip

    def _rows(self, name: str, tensor: Tensor, mu: Tensor, known: int | None) -> Tensor:
        if tensor.dim() < 2 or tensor.shape != mu.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}; expected that of `mu`, {tuple(mu.shape)}, (samples, units)."
            )
        rows = tensor.flatten(1)
        try:
            check_embeddings(rows, known)
        except ValueError as error:
            raise ValueError(str(error).replace("`embeddings`", f"`{name}`")) from None
        return self.wide(rows)

    def compute(self) -> dict[str, Tensor]:
        """Float64; see the class."""
        n = int(self.samples)
        if not n:
            raise ValueError("PosteriorCollapse: no sample was seen: call `update` first.")
        variance = (self.squares / n - (self.total / n).square()).clamp(min=0)
        # A count may reach the share exactly, which division would miss.
        collapsed = (self.below >= (1 - self.delta) * n - 1e-9 * n).double().mean(0)
        return {
            "active_units": (variance > self.variance).sum().double(),
            "collapsed": collapsed[-1],
            "active_pairs": 1 - self.below[:, -1].mean() / n,
            "kl_total": self.kl.sum() / n,
            "units": self.total.new_tensor(float(len(variance))),
            "samples": self.total.new_tensor(float(n)),
            "kl": self.kl / n,
            "variance": variance,
            "collapsed_curve": collapsed[:-1],
            "eps": self.total.new_tensor(self.grid),
        }
