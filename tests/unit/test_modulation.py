"""Shapley responses, scores and factors of AGM, against closed forms and the hooks of the method's own code."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient import functional as F
from lightning_efficient.companions.modulation import masked_outputs, modulated


def outputs(modalities: int, seed: int = 0) -> dict[frozenset[int], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(_: frozenset[int]) -> Tensor:
        return torch.randn(3, 4, generator=generator, dtype=torch.float64)

    return masked_outputs(drawn, drawn(frozenset()), modalities)


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_responses_are_shapley_values_and_add_up(modalities: int) -> None:
    """Against the mean over all orders in which modalities may come; the empty set gives 0."""
    given = outputs(modalities)
    assert len(given) == 2**modalities - 1
    responses = F.mono_modal_responses(given, modalities)
    torch.testing.assert_close(sum(responses), given[frozenset(range(modalities))], rtol=0, atol=1e-12)
    orders = list(permutations(range(modalities)))
    for m, response in enumerate(responses):
        total = torch.zeros(3, 4, dtype=torch.float64)
        for order in orders:
            before = frozenset(order[: order.index(m)])
            total += given[before | {m}] - (given[before] if before else 0)
        torch.testing.assert_close(response, total / len(orders), rtol=0, atol=1e-12)


def test_responses_of_the_sheet() -> None:
    two, three = outputs(2), outputs(3)
    a, v, av = (two[frozenset(s)] for s in ({0}, {1}, {0, 1}))
    torch.testing.assert_close(F.mono_modal_responses(two, 2)[0], (av - v + a) / 2)
    s = {name: three[frozenset(k)] for name, k in {
        "t": {2}, "at": {0, 2}, "vt": {1, 2}, "a": {0}, "v": {1}, "av": {0, 1}, "avt": {0, 1, 2},
    }.items()}  # fmt: skip
    expected = (s["avt"] - s["av"] + s["t"]) / 3 + (s["at"] - s["a"] + s["vt"] - s["v"]) / 6
    torch.testing.assert_close(F.mono_modal_responses(three, 3)[2], expected)


def test_scores_and_factors() -> None:
    targets = torch.tensor([1, 0])
    sure = torch.tensor([[-100.0, 100.0], [-100.0, 100.0]])  # right, then as wrong as can be
    scores = F.response_scores([sure, torch.zeros(2, 2)], targets)
    assert scores.tolist() == pytest.approx([-math.log(1e-8) / 2, math.log(2)], rel=1e-5)
    scores = torch.tensor([0.5, 1.0, 2.0])
    assert F.discrepancy(scores).tolist() == pytest.approx([math.exp(1.0), math.exp(0.25), math.exp(-1.25)])
    assert F.modulation(scores, scores, 2.5).tolist() == [1, 1, 1]
    assert F.modulation(scores, None, 0.0).tolist() == [1, 1, 1]
    assert F.modulation(torch.full((2,), 0.7), None, 1.0).tolist() == [1, 1]
    ahead = F.modulation(scores, None, 1.0)
    assert ahead[0] < 1 < ahead[2]
    assert float(ahead[0]) == pytest.approx(math.exp(1 - math.e))
    late = F.modulation(torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0]), 1.0, clamp=7)
    assert float(late[0]) == pytest.approx(math.exp(7))


def test_late_fusion_gets_exactly_the_factors() -> None:
    """Branch gradients are the factors times the plain ones, a shared bias gets their mean: .4, 2.3, 1.35."""
    torch.manual_seed(0)
    a, v, bias = nn.Linear(5, 3).double(), nn.Linear(4, 3).double(), nn.Parameter(torch.zeros(3).double())
    for branch in (a, v):
        branch.bias = None  # type: ignore[assignment]
    x, y, targets = torch.randn(6, 5).double(), torch.randn(6, 4).double(), torch.arange(6) % 3
    inputs = [x, y]

    def net(kept: frozenset[int]) -> Tensor:
        given = [z if i in kept else torch.zeros_like(z) for i, z in enumerate(inputs)]
        return a(given[0]) + v(given[1]) + bias  # type: ignore[no-any-return]

    out = net(frozenset({0, 1}))
    parameters = [a.weight, v.weight, bias]
    plain = torch.autograd.grad(nn.functional.cross_entropy(out, targets), parameters)
    out = net(frozenset({0, 1}))
    responses = F.mono_modal_responses(masked_outputs(net, out, 2), 2)
    new = modulated(out, responses, torch.tensor([0.4, 2.3]))
    assert torch.equal(new, out)
    grads = torch.autograd.grad(nn.functional.cross_entropy(new, targets), parameters)
    for grad, before, factor in zip(grads, plain, (0.4, 2.3, 1.35), strict=True):
        torch.testing.assert_close(grad, factor * before, rtol=1e-6, atol=0)


def test_equal_to_hooks_on_the_responses() -> None:
    """The method's code multiplies the gradient that reaches each response, in a hook."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, targets, factors = torch.randn(6, 9).double(), torch.arange(6) % 3, torch.tensor([0.3, 1.7, 1.1]).double()

    def run(kept: frozenset[int]) -> Tensor:
        mask = torch.tensor([i // 3 in kept for i in range(9)])
        return net(x * mask)  # type: ignore[no-any-return]

    def gradients(ours: bool) -> tuple[Tensor, ...]:
        out = run(frozenset({0, 1, 2}))
        responses = F.mono_modal_responses(masked_outputs(run, out, 3), 3)
        if ours:
            total = modulated(out, responses, factors)
        else:
            for response, factor in zip(responses, factors, strict=True):
                response.register_hook(lambda g, k=factor: k * g)
            total = torch.stack(responses).sum(0)
        return torch.autograd.grad(nn.functional.cross_entropy(total, targets), list(net.parameters()))

    for one, two in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
