from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_efficient.metrics.functional import spectral_norms


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
