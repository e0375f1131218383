"""Posterior collapse of variational autoencoders: which latent units still say something."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kl_per_unit(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    prior_std: float = 1.0,
) -> Tensor:
    """KL divergence of each unit's posterior from its prior, in nats; both Gaussian.

    Args:
        mu: Posterior means, any shape.
        logvar: Logarithms of the posterior variances, same shape.
        prior_mu: Prior means, of a shape that ``mu`` can be added to. ``None``: 0.
        prior_logvar: Logarithms of the prior variances. ``None``: ``2 log prior_std``.
        prior_std: Standard deviation of a fixed prior.

    Returns:
        Shape of ``mu``.

    Raises:
        ValueError: ``mu`` and ``logvar`` of different shape, or ``prior_std`` not above 0.
    """
    if mu.shape != logvar.shape:
        raise ValueError(f"`mu` {tuple(mu.shape)} and `logvar` {tuple(logvar.shape)} differ; expected one shape.")
    if not prior_std > 0:
        raise ValueError(f"`prior_std` is {prior_std}; expected a number above 0.")
    wide = mu.to(torch.promote_types(mu.dtype, torch.float32))
    prior = wide.new_tensor(prior_std).square().log() if prior_logvar is None else prior_logvar.to(wide)
    apart = wide if prior_mu is None else wide - prior_mu.to(wide)
    ratio = logvar.to(wide) - prior
    return 0.5 * (apart.square() * torch.exp(-prior) + ratio.exp() - ratio - 1)


def predict_active_units(
    cov_eigenvalues: Tensor | Sequence[float], beta: float = 1.0, eta_dec: float = 1.0, units: int | None = None
) -> int:
    """How many latent units a linear Gaussian decoder can keep: eigenvalues above ``beta * eta_dec²``.

    Holds where reconstruction and KL term are on one scale, both halved (the usual ELBO) or neither; code that halves
    the KL alone has half the ``beta``. For a conditional model take the eigenvalues of the conditional covariance
    ``S_yy - S_yx S_xx⁻¹ S_xy``.

    Args:
        cov_eigenvalues: Of the covariance of the data, at least 0.
        beta: Weight of the KL term.
        eta_dec: Standard deviation of the decoder.
        units: Latent units that there are. ``None``: no limit.

    Raises:
        ValueError: Eigenvalues that are negative or no numbers, or another argument not above 0.

    Source: Dang et al., ICLR 2024, arXiv 2306.05023, with the condition on the eigenvalue itself, which their code has
    wrong for conditional models.
    """
    values = torch.as_tensor(cov_eigenvalues, dtype=torch.float64).flatten()
    for name, value in (("beta", beta), ("eta_dec", eta_dec)):
        if not value > 0:
            raise ValueError(f"`{name}` is {value}; expected a number above 0.")
    floor = -1e-9 * float(values.abs().max()) if len(values) else 0.0  # rounding of an eigendecomposition
    if not bool(((values >= floor) & values.isfinite()).all()):
        raise ValueError(f"`cov_eigenvalues` holds {values.min():g}; expected finite numbers from 0.")
    alive = int((values > beta * eta_dec**2).sum())
    return alive if units is None else min(alive, units)
