"""The spectrum family against the oracles of its papers, singular values in float64, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from scipy.special import ive
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_efficient.metrics import (
    Alignment,
    AlphaReQ,
    EffectiveRank,
    LiDAR,
    ParticipationRatio,
    RankMe,
    StableRank,
    Uniformity,
)
from lightning_efficient.metrics.functional import (
    alpha_req,
    effective_rank,
    lidar,
    participation_ratio,
    rank_of_spectrum,
    rankme,
    singular_values,
    stable_rank,
)

D = 256


def embeddings(values: Tensor, samples: int, seed: int = 0) -> Tensor:
    """Float64, with these singular values and random singular vectors."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=g, dtype=torch.float64))[0] for n in (samples, D))
    return u * values @ v.t()


def of(metric: Metric, z: Tensor, batches: int = 3) -> float:
    for part in z.chunk(batches):
        metric.update(part)
    return float(metric.compute())


def power_law(a: float, count: int = D) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -a


EQUAL_SPECTRA = [(1, 1e-7, 1.000410996), (8, 1e-7, 8.003205), (32, 1e-7, 32.01181), (D, 1e-7, 256.02979),
                 (8, 1e-5, 8.2324), (32, 1e-5, 32.862)]  # fmt: skip


@pytest.mark.parametrize(("rank", "eps", "expected"), EQUAL_SPECTRA)
def test_rankme_of_equal_singular_values(rank: int, eps: float, expected: float) -> None:
    digits = 0.6 * 10.0 ** -len(str(expected).partition(".")[2])
    z = embeddings(torch.full((rank,), 3.0, dtype=torch.float64), 300)
    assert of(RankMe(D, eps), z) == pytest.approx(expected, abs=digits)
    assert of(EffectiveRank(D), z) == pytest.approx(rank, rel=1e-9)
    assert of(StableRank(D), z) == pytest.approx(rank, rel=1e-9)
    spectrum = torch.zeros(D, dtype=torch.float64)
    spectrum[:rank] = 3
    assert float(rank_of_spectrum(spectrum, eps)) == pytest.approx(expected, abs=digits)


@pytest.mark.parametrize(("a", "expected"), [(0.5, 209.05796), (1.0, 74.64008), (2.0, 4.988173)])
def test_power_laws(a: float, expected: float) -> None:
    z = embeddings(power_law(a), 300)
    assert of(RankMe(), z) == pytest.approx(expected, abs=6e-6 if a < 2 else 6e-7)
    assert float(rankme(z)) == pytest.approx(expected, abs=6e-6 if a < 2 else 6e-7)
    assert of(AlphaReQ(), z) == pytest.approx(2 * a, rel=1e-6)  # eigenvalues are squared singular values
    assert float(alpha_req(z, 1, None)) == pytest.approx(2 * a, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_of_every_range(alpha: float) -> None:
    z = embeddings(power_law(alpha / 2), 300)
    for first, last in ((1, 2), (2, 100), (11, None), (5, 10_000)):
        assert of(AlphaReQ(first=first, last=last), z) == pytest.approx(alpha, rel=1e-6)


@pytest.mark.parametrize(("samples", "rank"), [(256, 206.3), (1024, 247.4), (4096, 254.0)])
def test_gaussians_show_the_number_of_samples(samples: int, rank: float) -> None:
    z = torch.randn(samples, D, generator=torch.Generator().manual_seed(0))
    assert of(RankMe(D), z) == pytest.approx(rank, abs=1.0)  # by the draw
    found = of(ParticipationRatio(D), z)
    assert found == pytest.approx(D * samples / (samples + D), rel=0.015)
    assert found == pytest.approx(float(participation_ratio(z)), rel=1e-5)


def test_an_offset_counts_unless_it_is_taken_out() -> None:
    z = 0.1 * torch.randn(4096, D, generator=torch.Generator().manual_seed(0)) + 5
    assert of(RankMe(D), z) == pytest.approx(6.56, abs=0.03)
    assert of(RankMe(D, center=True), z) == pytest.approx(254.0, abs=0.1)
    assert of(ParticipationRatio(D, center=False), z) == pytest.approx(1, abs=1e-2)
    for metric, function in PAIRS:
        for center in (False, True):
            assert of(metric(center=center), z.double()) == pytest.approx(
                float(function(z.double(), center=center)), rel=1e-8
            )


PAIRS: list[tuple[Callable[..., Metric], Callable[..., Tensor]]] = [
    (RankMe, rankme),
    (EffectiveRank, effective_rank),
    (StableRank, stable_rank),
    (ParticipationRatio, participation_ratio),
    (AlphaReQ, alpha_req),
]


@pytest.mark.parametrize("shape", [(200, 12), (9, 30)])
@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize(("metric", "function"), PAIRS)
def test_metrics_are_their_pure_halves(
    metric: Callable[..., Metric], function: Callable[..., Tensor], shape: tuple[int, int], decay: float
) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * decay ** torch.arange(shape[1])
    # Values below sqrt(eps) of the largest are rounding of a Gram matrix; none is that small here.
    assert of(metric(shape[1]), z.double(), 7) == pytest.approx(float(function(z.double())), rel=1e-6)
    # float32 errs by about eps * |Z| in all values: relative to the smallest, 1e-6 and 1e-3 (1e-7 at 0.6 ** 29) here.
    assert float(function(z)) == pytest.approx(float(function(z.double())), rel=1e-4 if decay == 1 else 3e-2)


def test_rankme_by_hand() -> None:
    z = torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(z).tolist()
    p = [v / math.fsum(values) + 1e-7 for v in values]
    torch.testing.assert_close(float(rankme(z)), math.exp(-math.fsum(q * math.log(q) for q in p)), rtol=1e-12, atol=0)
    assert rankme(torch.zeros(5, 3)).isnan()
    assert RankMe(3).update(torch.zeros(5, 3)) is None


def test_small_singular_values_need_float64() -> None:
    """The sheet's table: in float32 a Gram matrix of rank 8 gives 8.12."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4096, 8, generator=g) @ torch.randn(8, D, generator=g)
    assert of(RankMe(D), z) == pytest.approx(float(rankme(z.double())), abs=2e-4)


@pytest.mark.parametrize("metric", [pair[0] for pair in PAIRS])
def test_invariances(metric: Callable[..., Metric]) -> None:
    z = embeddings(power_law(1.0, 20), 100)
    base = of(metric(), z, 1)
    turned = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    for other in (z * 37, z @ turned, z[torch.randperm(100)]):
        assert of(metric(), other, 4) == pytest.approx(base, rel=1e-8)


def test_no_more_values_than_samples_enter() -> None:
    """With fewer samples than features, eps is added to as many values as there are samples."""
    z = embeddings(torch.ones(10, dtype=torch.float64), 10)
    p = 0.1 + 1e-5
    assert of(RankMe(D, 1e-5), z) == pytest.approx(math.exp(-10 * p * math.log(p)), rel=1e-9)
    assert len(singular_values(z)) == 10


def test_a_collection_keeps_one_state() -> None:
    family = [RankMe(), EffectiveRank(), StableRank(), ParticipationRatio(), AlphaReQ()]
    z = embeddings(power_law(1.0), 300).float()
    together = MetricCollection(family)
    calls = []
    for metric in together.values(copy_state=False):
        update = metric.update
        metric.update = lambda z, update=update: (calls.append(1), update(z))  # type: ignore[method-assign]
    for part in z.split(50):
        together.update(part)
    assert len(together.compute_groups) == 1
    assert len(calls) == 5 + 5  # all of them once, then one for all
    apart = {type(metric).__name__: of(type(metric)(), z, 6) for metric in family}
    assert {name: float(value) for name, value in together.compute().items()} == pytest.approx(apart, rel=1e-10)


# -- LiDAR, uniformity -------------------------------------------------------------------------------------------------


def views(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    means = torch.zeros(500, 1, 32, dtype=torch.float64)
    means[..., :8] = 3 * torch.randn(500, 1, 8, generator=g, dtype=torch.float64)
    return means + 0.3 * torch.randn(500, 10, 32, generator=g, dtype=torch.float64)


def lidar_by_hand(x: Tensor, delta: float = 1e-4, eps: float = 1e-7) -> float:
    n, q, d = x.shape
    mu = x.mean(1)
    between = torch.cov(mu.t())
    within = sum(torch.einsum("vi,vj->ij", a, a) for a in x - mu[:, None]) / (n * (q - 1))
    values, vectors = torch.linalg.eigh(within + delta * torch.eye(d, dtype=x.dtype))
    root = vectors @ torch.diag(values**-0.5) @ vectors.t()
    found = torch.linalg.eigvalsh(root @ between @ root).clamp(min=0)
    p = found / found.sum() + eps
    return float(torch.exp(-(p * p.log()).sum()))


def test_lidar() -> None:
    x = views()
    assert of(LiDAR(32), x, 7) == pytest.approx(lidar_by_hand(x), rel=1e-9)
    assert float(lidar(x)) == pytest.approx(lidar_by_hand(x), rel=1e-9)
    assert float(lidar(x.float())) == pytest.approx(lidar_by_hand(x), rel=1e-5)
    assert float(lidar(x)) == pytest.approx(8.11, abs=0.02)
    assert float(rankme(x.flatten(0, 1))) == pytest.approx(17.7, abs=0.2)
    mixed = torch.randn(32, 32, dtype=torch.float64)
    assert float(lidar(x @ mixed, delta=0)) == pytest.approx(float(lidar(x, delta=0)), rel=1e-8)
    assert float(lidar(x @ mixed)) != pytest.approx(float(lidar(x)), rel=1e-8)


def test_lidar_takes_updates_with_other_numbers_of_views() -> None:
    x, metric = views(), LiDAR()
    for part, count in ((x[:200], 10), (x[200:], 4)):
        metric.update(part[:, :count])
    again = LiDAR()
    again.update(x[200:, :4])
    again.update(x[:200])
    assert float(metric.compute()) == pytest.approx(float(again.compute()), rel=1e-10)
    assert int(metric.more) == 200 * 9 + 300 * 3


def test_lidar_refuses() -> None:
    with pytest.raises(ValueError, match=r"\(6, 1, 4\); expected \(samples, views, features\) with at least 2 views"):
        LiDAR().update(torch.zeros(6, 1, 4))
    with pytest.raises(ValueError, match="at least 2 samples; got 0"):
        lidar(torch.zeros(0, 2, 4))
    with pytest.raises(ValueError, match=r"singular.*`delta` is 0"):
        lidar(torch.ones(5, 2, 3), delta=0)
    with pytest.raises(ValueError, match="`delta` is -1"):
        LiDAR(delta=-1)


@pytest.mark.parametrize(("d", "expected"), [(2, -1.575027), (16, -3.513036), (64, -3.875236)])
def test_uniformity_of_the_uniform_law(d: int, expected: float) -> None:
    t = 2.0
    # log[e^-2t Γ(d/2) t^(1-d/2) I_{d/2-1}(2t)], with scipy's scaled Bessel function
    law = math.lgamma(d / 2) + (1 - d / 2) * math.log(t) + math.log(ive(d / 2 - 1, 2 * t))
    assert law == pytest.approx(expected, abs=6e-7)
    x = torch.randn(2048, d, generator=torch.Generator().manual_seed(0))
    assert of(Uniformity(), x) == pytest.approx(law, abs=0.02)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("metric", [*(pair[0] for pair in PAIRS), Uniformity, partial(LiDAR, 8)])
def test_values_that_are_no_numbers_change_nothing(metric: Callable[..., Metric], bad: float) -> None:
    found = metric()
    shape = (9, 2, 8) if isinstance(found, LiDAR) else (9, 8)
    good = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found.update(good)
    before = float(found.compute())
    with pytest.raises(ValueError, match=r"NaN or infinite values in [12] of its \d+ rows, row 0 the first"):
        found.update(good.index_fill(0, torch.tensor([0]), bad).index_fill(-1, torch.tensor([1]), 1.0))
    assert float(found.compute()) == before


def test_functions_and_pairs_refuse_as_well() -> None:
    for _, function in PAIRS:
        with pytest.raises(ValueError, match="NaN or infinite"):
            function(torch.tensor([[1.0, math.nan]]))
        with pytest.raises(ValueError, match=r"shape \(0, 3\); expected at least one row"):
            function(torch.zeros(0, 3))
        with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
            function(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        Alignment().update(torch.ones(2, 2), torch.tensor([[1.0, 0.0], [math.nan, 0.0]]))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("metric", [pair[0] for pair in PAIRS])
def test_nothing_seen_and_other_widths(metric: Callable[..., Metric]) -> None:
    with pytest.raises(ValueError, match="no embedding was seen: call `update` first"):
        metric().compute()
    found = metric(5)
    with pytest.raises(ValueError, match=r"\(3, 4\); expected \(samples, 5\)"):
        found.update(torch.zeros(3, 4))
    found = metric()
    found.update(torch.zeros(0, 4))
    found.update(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"\(3, 5\); expected \(samples, 4\)"):
        found.update(torch.zeros(3, 5))
    found.reset()
    found.update(torch.randn(3, 5))
    with pytest.raises(ValueError, match="`num_features` is 0"):
        metric(0)
    for first, last in ((0, 5), (5, 5)):
        with pytest.raises(ValueError, match="1 <= first < last"):
            AlphaReQ(first=first, last=last)
    assert AlphaReQ()(torch.randn(9, 4)).isnan()  # no fifth eigenvalue


# -- where sums are kept -----------------------------------------------------------------------------------------------


def test_sums_stay_float64_and_off_devices_without_it() -> None:
    metric = RankMe()
    z = embeddings(power_law(1.0), 300)
    metric.update(z[:100].bfloat16())
    holder = torch.nn.ModuleList([metric]).to(torch.bfloat16).half()
    assert metric.gram.dtype == torch.float64
    assert metric.total.dtype == torch.float64
    metric.update(z[100:])
    assert metric.gram.dtype == torch.float64
    metric._apply(lambda t: SimpleNamespace(device=torch.device("mps")))  # type: ignore[arg-type,return-value]
    assert metric.gram.device.type == "cpu"
    metric.update(z[:10].float())
    assert int(metric.samples) == 310
    assert holder[0] is metric


def test_under_autocast_and_forward() -> None:
    z = embeddings(power_law(1.0), 300).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert of(RankMe(), z) == of(RankMe(), z)
        inside = of(RankMe(), z)
    assert inside == of(RankMe(), z)
    metric = RankMe()
    assert float(metric(z[:20])) == pytest.approx(float(rankme(z[:20].double())), rel=1e-6)
    metric(z[20:])
    assert float(metric.compute()) == pytest.approx(float(rankme(z.double())), rel=1e-6)
