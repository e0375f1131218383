"""Posterior collapse against distributions in torch, and the closed form of linear autoencoders."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lightning_efficient.functional import kl_per_unit, predict_active_units
from lightning_efficient.metrics import PosteriorCollapse

F64 = torch.float64


def of(mu: Tensor, logvar: Tensor, *prior: Tensor, **kwargs) -> dict[str, Tensor]:
    metric = PosteriorCollapse(**kwargs)
    for rows in torch.arange(len(mu)).split(31):
        metric.update(*(tensor[rows] for tensor in (mu, logvar, *prior)))
    return metric.compute()


def test_definitions() -> None:
    n, units, std = 200, 6, 1.5
    scale = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.02, 0.0], dtype=F64)
    mu, logvar = torch.randn(n, units, dtype=F64) * scale, 0.3 * torch.randn(n, units, dtype=F64) * scale
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(torch.zeros_like(mu), std))
    found = of(mu, logvar, prior_std=std, eps=0.2, delta=0.1)
    torch.testing.assert_close(found["kl"], kl.mean(0))
    torch.testing.assert_close(found["variance"], mu.var(0, unbiased=False))
    assert float(found["active_units"]) == int((mu.var(0, unbiased=False) > 0.01).sum())
    assert float(found["active_pairs"]) == pytest.approx(float((kl >= 0.2).double().mean()))
    assert float(found["collapsed"]) == pytest.approx(float(((kl < 0.2).double().mean(0) >= 0.9).double().mean()))
    curve = [float(((kl < eps).double().mean(0) >= 0.9).double().mean()) for eps in found["eps"].tolist()]
    assert found["collapsed_curve"].tolist() == pytest.approx(curve)
    assert len(curve) == 26
    assert float(found["eps"][0]) == pytest.approx(1e-4)
    assert float(found["eps"][-1]) == pytest.approx(10)
    assert (float(found["units"]), float(found["samples"])) == (units, n)


def test_the_three_definitions_disagree() -> None:
    """The sheet's unit: the variance of its mean is .043, and P(KL < .01) = .483."""
    n = 20_000
    mu = math.sqrt(0.043) * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = of(mu, torch.zeros(n, 1, dtype=F64))
    assert float(found["active_units"]) == 1
    assert float(found["collapsed"]) == 0
    assert 1 - float(found["active_pairs"]) == pytest.approx(math.erf(math.sqrt(0.02 / 0.043 / 2)), abs=0.01)


def test_priors_that_depend_on_the_input() -> None:
    n = 100
    tensors = [torch.randn(n, 2, 3, dtype=F64) for _ in range(4)]
    mu, logvar, prior_mu, prior_logvar = tensors
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(prior_mu, (prior_logvar / 2).exp()))
    torch.testing.assert_close(of(*tensors)["kl"], kl.mean(0).flatten())
    torch.testing.assert_close(kl_per_unit(*tensors), kl)
    same = of(mu, logvar, mu, logvar)  # the posterior is the prior: collapsed, however much it moves
    assert (float(same["active_units"]), float(same["collapsed"]), float(same["kl_total"])) == (0, 1, 0)


SPECTRUM = (4.0, 2.0, 1.0, 0.5, 0.25, 0.1)


@pytest.mark.parametrize(
    ("eta_dec", "eta_enc", "beta", "kl", "active"),
    [
        (0.6, 1.5, 1.0, [1.2040, 0.8574, 0.5108, 0.1643, 0, 0], 4),
        (1.0, 1.0, 1.6, [0.4581, 0.1116, 0, 0, 0, 0], 2),
    ],
)
def test_linear_autoencoders(eta_dec: float, eta_enc: float, beta: float, kl: list[float], active: int) -> None:
    """At the optimum of a linear VAE: variances and means in closed form, so KL = ½ log max(1, t / (β η²))."""
    assert predict_active_units(SPECTRUM, beta, eta_dec) == active
    t = torch.tensor(SPECTRUM, dtype=F64)
    noise = (beta * eta_dec**2 / t).clamp(max=1)  # posterior variance over the prior's
    z = torch.randn(4000, 6, dtype=F64)
    z = (z - z.mean(0)) / z.std(0, unbiased=False)
    mu = eta_enc * (1 - noise).sqrt() * z
    found = of(mu, (eta_enc**2 * noise).log().expand_as(mu), prior_std=eta_enc)
    assert found["kl"].tolist() == pytest.approx(kl, abs=6e-5)
    assert float(found["active_units"]) == active
    assert float(found["collapsed"]) == pytest.approx(1 - active / 6)


def test_predicted_units() -> None:
    assert predict_active_units(torch.tensor(SPECTRUM), 1.0, 0.6, units=3) == 3
    assert predict_active_units([0.5492], 1.0, math.sqrt(0.54)) == 1  # the official code's branch asks for .735
    assert predict_active_units([1.0, -1e-12], 1.0, 0.5) == 1
    # A conditional model of what its input says already (y = x, and noise): no latent unit is needed, then two are.
    x = torch.randn(500, 4, dtype=F64)
    for noise, alive in ((torch.zeros(4), 0), (torch.tensor([2.0, 2.0, 0.1, 0.1]), 2)):
        s = torch.cov(torch.cat([x, x + noise.double() * torch.randn(500, 4, dtype=F64)], 1).t())
        conditional = s[4:, 4:] - s[4:, :4] @ torch.linalg.solve(s[:4, :4], s[:4, 4:])
        assert predict_active_units(torch.linalg.eigvalsh(conditional).clamp(min=0), 1.0, 1.0) == alive
    for args, match in (([-1.0], "`cov_eigenvalues` holds -1"), ([math.nan], "`cov_eigenvalues`")):
        with pytest.raises(ValueError, match=match):
            predict_active_units(args)
    with pytest.raises(ValueError, match="`beta` is 0"):
        predict_active_units([1.0], beta=0)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_refused() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="no sample was seen"):
        PosteriorCollapse().compute()
    for args, match in (
        ((x, x[:, :2]), r"`logvar` has shape \(4, 2\); expected that of `mu`, \(4, 3\)"),
        ((x, x - math.inf), "`logvar` holds NaN or infinite"), ((x / 0, x), "`mu` holds NaN or infinite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            PosteriorCollapse().update(*args)
    for name, value in (("eps", 0), ("delta", 1), ("variance", -1), ("prior_std", 0)):
        with pytest.raises(ValueError, match=f"`{name}` is {value}"):
            PosteriorCollapse(**{name: value})
