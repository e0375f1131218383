"""Simplex heads: the exact frame, the sparse one, to the sheet's figures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient import functional as F


def angles(weight: Tensor) -> Tensor:
    """Between all pairs of classes, degrees."""
    unit = nn.functional.normalize(weight, dim=1)
    pairs = (unit @ unit.t())[~torch.eye(len(weight), dtype=torch.bool)]
    return pairs.clamp(-1, 1).arccos().rad2deg()


@pytest.mark.parametrize(("features", "classes"), [(64, 10), (7, 7), (5, 2)])
def test_without_zeros_it_is_the_exact_frame(features: int, classes: int) -> None:
    weight = F.simplex_etf(features, classes)
    assert weight.shape == (classes, features)
    gram = weight @ weight.t()
    expected = (torch.eye(classes) * classes - 1).double() / (classes - 1)
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-12)
    assert torch.allclose(angles(weight), torch.tensor(math.degrees(math.acos(-1 / (classes - 1)))).double(), atol=1e-4)


@pytest.mark.parametrize(
    ("features", "classes", "mean", "least", "norm"), [(64, 10, 96.29, 96.25, 0.128), (128, 20, 93.016, 93.0, 0.1033)]
)
def test_sparse_frames_of_the_sheet(features: int, classes: int, mean: float, least: float, norm: float) -> None:
    """60 % zeros, 3000 steps: the mean angle of 64 features is 96.29 of 96.38, of 128 features 93.016 of 93.017."""
    weight = F.simplex_etf(features, classes, 0.6, steps=3000)
    assert int((weight == 0).sum()) == int(0.6 * features * classes)
    ideal = math.degrees(math.acos(-1 / (classes - 1)))
    assert ideal - 0.1 <= float(angles(weight).mean()) <= ideal
    assert float(angles(weight).mean()) == pytest.approx(mean, abs=0.09 if classes == 10 else 0.004)
    assert float(angles(weight).min()) == pytest.approx(least, abs=0.3)
    norms = weight.norm(dim=1)
    assert float(norms.mean()) == pytest.approx(norm, abs=0.15 * norm)
    assert float(norms.std()) == pytest.approx(0.012, abs=0.012)


def test_seed_and_random_stream() -> None:
    state = torch.get_rng_state()
    one = F.simplex_etf(8, 4, 0.25, steps=5)
    assert torch.equal(one, F.simplex_etf(8, 4, 0.25, steps=5))
    assert not torch.equal(one, F.simplex_etf(8, 4, 0.25, steps=5, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_a_head_in_place() -> None:
    head = nn.Linear(8, 4)
    weight, bias = head.weight, head.bias.detach().clone()
    F.fix_head(head, bias="keep")
    assert head.weight is weight
    assert torch.equal(head.bias, bias)
    F.fix_head(head)
    assert not head.bias.any()
    assert not any(p.requires_grad for p in head.parameters())
    F.fix_head(nn.Linear(8, 4, bias=False))


def test_what_cannot_be_is_refused() -> None:
    for arguments, message in (
        ((4, 5), "5 classes in 4 features: expected 2 <= classes <= features"),
        ((4, 1), "1 classes in 4"),
        ((4, 4, 1.0), "`sparsity` is 1.0"),
        ((4, 4, 0.99), "leaves a class of 4 features without an entry"),
    ):
        with pytest.raises(ValueError, match=message):
            F.simplex_etf(*arguments)
    with pytest.raises(ValueError, match="`bias` is 'none'"):
        F.fix_head(nn.Linear(4, 4), bias="none")
