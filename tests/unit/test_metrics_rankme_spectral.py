from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_efficient.metrics import RankMe
from lightning_efficient.metrics.functional import rankme, spectral_norms


def reference(z: torch.Tensor, eps: float = 1e-7) -> float:
    values = torch.linalg.svdvals(z.double()).tolist()
    total = math.fsum(values)
    return math.exp(-math.fsum((v / total + eps) * math.log(v / total + eps) for v in values))


@pytest.mark.parametrize("shape", [(200, 12), (9, 30)])
@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_function_and_metric_agree_with_float64(shape, decay):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=g) * decay ** torch.arange(shape[1])
    expected = reference(z)
    torch.testing.assert_close(float(rankme(z.double())), expected, rtol=1e-12, atol=0)
    # svdvals errs by about eps * |Z|, in all values: relative to their sum, at most eps * min(shape).
    loose = min(shape) * torch.finfo(torch.float32).eps * math.log(1e7) * expected
    torch.testing.assert_close(float(rankme(z)), expected, rtol=0, atol=loose)
    metric = RankMe(shape[1])
    for part in z.double().split(7):
        metric.update(part)
    # The Gram matrix halves the digits: values below sqrt(eps) of the largest are noise of that size.
    noise = shape[1] * math.sqrt(torch.finfo(torch.float64).eps)
    torch.testing.assert_close(float(metric.compute()), expected, rtol=noise * math.log(1e7), atol=0)


def test_known_ranks():
    eye = torch.eye(6, dtype=torch.float64)
    assert abs(rankme(eye) - 6) < 1e-4
    line = torch.ones(50, 6, dtype=torch.float64)
    assert abs(rankme(line) - 1) < 1e-4
    assert rankme(torch.zeros(5, 3)).isnan()
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        rankme(torch.zeros(2, 3, 4))


def test_metric_merges_and_refuses():
    z = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    whole, left, right = RankMe(5), RankMe(5), RankMe(5)
    whole.update(z)
    left.update(z[:13])
    right.update(z[13:])
    for name, reduction in left._reductions.items():
        setattr(left, name, reduction(torch.stack([getattr(left, name), getattr(right, name)])))
    torch.testing.assert_close(left.compute(), whole.compute())
    assert int(left.samples) == 60
    with pytest.raises(ValueError, match=r"expected \(samples, 5\)"):
        whole.update(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="num_features"):
        RankMe(0)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.attend = nn.MultiheadAttention(8, 2)
        self.table = nn.Embedding(9, 7)
        self.head = nn.Linear(7, 9, bias=False)
        self.head.weight = self.table.weight
        self.position = nn.Parameter(torch.ones(1, 4, 7))
        self.zero = nn.Parameter(torch.zeros(3, 3))
        self.tiny = nn.Parameter(torch.diag(torch.tensor([3e-18, 1e-18])))


def test_spectral_norms():
    torch.manual_seed(0)
    model = Odd()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    norms = spectral_norms(model, iterations=60)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert set(norms) == {
        "linear.weight", "conv.weight", "attend.in_proj_weight", "attend.out_proj.weight", "zero", "tiny"
    }  # fmt: skip
    for name, sigma in norms.items():
        exact = torch.linalg.matrix_norm(model.get_parameter(name).detach().double().flatten(1), 2)
        torch.testing.assert_close(sigma.double(), exact, rtol=1e-4, atol=0)
    assert norms["zero"] == 0


def test_spectral_norms_estimate_from_below_and_warm_start():
    torch.manual_seed(0)
    model = nn.Linear(300, 200)
    exact = torch.linalg.matrix_norm(model.weight.detach().double(), 2)
    vectors: dict[str, torch.Tensor] = {}
    estimates = [float(spectral_norms(model, iterations=2, vectors=vectors)["weight"]) for _ in range(40)]
    assert estimates[0] < 0.97 * exact
    assert all(a <= b * (1 + 1e-6) for a, b in pairwise(estimates))
    # Random start, k steps: the expected relative error of the squared norm is at most 0.871 log(n) / (k - 1)
    # (Kuczynski and Wozniakowski, 1992), without any gap between the singular values.
    assert math.sqrt(1 - 0.871 * math.log(300) / 79) * exact < estimates[-1] <= exact * (1 + 1e-6)
    with torch.no_grad():
        model.weight.zero_()
    assert spectral_norms(model, vectors=vectors)["weight"] == 0
    nn.init.ones_(model.weight)
    recovered = spectral_norms(model, vectors=vectors)["weight"]
    torch.testing.assert_close(float(recovered), math.sqrt(300 * 200), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="iterations"):
        spectral_norms(model, iterations=0)
