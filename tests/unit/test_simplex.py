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


def test_sparse_frame_of_the_sheet() -> None:
    """64 features, 10 classes, 3000 steps: 60.0 % zeros, mean angle 96.29 of 96.38, least 96.25, norm .128 ± .012."""
    weight = F.simplex_etf(64, 10, 0.6, steps=3000)
    assert int((weight == 0).sum()) == int(0.6 * 640)
    assert float(angles(weight).mean()) == pytest.approx(96.29, abs=0.09)
    assert float(angles(weight).min()) == pytest.approx(96.25, abs=0.3)
    norms = weight.norm(dim=1)
    assert float(norms.mean()) == pytest.approx(0.128, abs=0.02)
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
