"""A temperature at the optimizer boundary, against the same training written out in autograd, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_efficient.surgery.optimizer import add_parameters
from lightning_efficient.weightspace import Block, Boundary, ScaleTransform, SpectralTransform, Temperature

HEADS, WIDTH, LENGTH = 2, 6, 5


class Biased(nn.Module):
    """Fused projection ``[q; k; v]`` with a bias, a query bias of its own, and a table of position biases."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.table = nn.Parameter(torch.randn(LENGTH, LENGTH, HEADS))
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, self.table.permute(2, 0, 1)).transpose(1, 2).flatten(2))


def knobs(per_head: bool) -> dict[str, tuple[list[Block], list[int] | None]]:
    """Parameter -> blocks, and the head of each."""
    if not per_head:
        rows = [Block(0, WIDTH)]
        return {"qkv.weight": (rows, None), "qkv.bias": (rows, None), "table": ([Block(0, LENGTH)], None)}
    rows = [Block(i * WIDTH // HEADS, WIDTH // HEADS) for i in range(HEADS)]
    heads = list(range(HEADS))
    return {"qkv.weight": (rows, heads), "qkv.bias": (rows, heads), "table": ([Block(h, 1, 2) for h in heads], heads)}


def put(model: nn.Module, optimizer: Any, temperature: Temperature, per_head: bool = False) -> Boundary:
    boundary = Boundary()
    for name, (blocks, heads) in knobs(per_head).items():
        boundary.add(name, model.get_parameter(name), ScaleTransform(temperature, blocks, heads))
    add_parameters(optimizer, boundary.thetas(optimizer), [])
    boundary.start()
    boundary.attach([optimizer])
    return boundary


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return [(make(4, LENGTH, WIDTH), make(4, LENGTH, 1)) for _ in range(steps)]


def reference(
    model: nn.Module, tau: Callable[[int, Tensor], Tensor], learnable: bool, heads: int, clip: float | None
) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Logits divided by tau in autograd; returns the losses, the network's weights and the last log tau."""
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    log_tau = tau(0, torch.zeros(heads, dtype=torch.float64)).log().requires_grad_(learnable)

    def network(step: int) -> dict[str, Tensor]:
        factor = (-(log_tau if learnable else tau(step, log_tau).log())).exp()
        columns = factor.repeat_interleave(WIDTH // heads)
        rows = torch.cat([columns, torch.ones(2 * WIDTH, dtype=torch.float64)])
        scaled = dict(params) | {"qkv.weight": params["qkv.weight"] * rows[:, None]}
        return scaled | {"qkv.bias": params["qkv.bias"] * rows, "table": params["table"] * factor}

    groups: list[dict[str, Any]] = [{"params": list(params.values())}]
    if learnable:
        groups.append({"params": [log_tau], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    losses = []
    for step, (x, y) in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        loss = F.mse_loss(functional_call(model, network(step), (x,)), y)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], clip)
        losses.append(loss.item())
        optimizer.step()
    return losses, {n: w.detach() for n, w in network(STEPS).items()}, log_tau.detach()


STEPS = 12


def train(
    model: nn.Module, optimizer: Any, boundary: Boundary, steps: int = STEPS, clip: float | None = None
) -> list[float]:
    losses = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        if clip is not None:
            boundary.before_step(optimizer)
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        losses.append(loss.item())
        optimizer.step()
    return losses


def schedule(step: int) -> float:
    return 1.0 - 0.04 * min(step, 8)


CASES: dict[str, tuple[Any, int, bool]] = {
    "constant": (0.7, 1, False),
    "schedule": (schedule, 1, False),
    "learned": (0.7, 1, True),
    "learned per head": (0.7, HEADS, True),
}


@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize("case", CASES)
def test_training_against_autograd(case: str, clip: float | None) -> None:
    tau, heads, learnable = CASES[case]
    model = Biased().double()

    def law(step: int, like: Tensor) -> Tensor:
        return torch.full_like(like, tau(step) if callable(tau) else tau)

    losses, weights, log_tau = reference(model, law, learnable, heads, clip)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    temperature = Temperature(tau, heads, learnable)
    boundary = put(model, optimizer, temperature, per_head=heads > 1)
    assert len(boundary.thetas(optimizer)) == learnable
    found = train(model, optimizer, boundary, clip=clip)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-12, atol=0)
    for name, expected in weights.items():
        weight = model.get_parameter(name).detach()
        if name == "qkv.bias":  # a bias on keys moves every logit of a row alike: its gradient is rounding, under Adam
            weight, expected = (torch.cat([t[:WIDTH], t[2 * WIDTH :]]) for t in (weight, expected))
        torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-13)
    if learnable:
        torch.testing.assert_close(temperature.log_tau.detach(), log_tau, rtol=1e-10, atol=0)
        assert float((log_tau - math.log(0.7)).abs().max()) > 0.01
    if callable(tau):
        assert temperature.tau.item() == pytest.approx(0.68)


def test_one_leaves_every_bit_as_it_is() -> None:
    runs = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = Biased()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        boundary = put(model, optimizer, Temperature(1.0)) if scaled else Boundary()
        for x, y in batches(4):
            optimizer.zero_grad()
            F.mse_loss(model(x.float()), y.float()).backward()
            optimizer.step()
        boundary.detach()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_after_sigma_reparam_in_either_order_of_adding() -> None:
    """``Ŵ = γ W / (σ τ)``: the spectral norm of the query rows is ``γ / τ`` at every moment."""
    finals = []
    for order in (1, -1):
        torch.manual_seed(0)
        model = Biased().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        temperature = Temperature(0.5, learnable=True)
        rows = [Block(0, WIDTH), Block(WIDTH, 2 * WIDTH)]
        spectral = SpectralTransform(rows)
        boundary = Boundary()
        for transform in (spectral, ScaleTransform(temperature, rows[:1]))[::order]:
            boundary.add("qkv.weight", model.qkv.weight, transform)
        add_parameters(optimizer, boundary.thetas(optimizer), [])
        boundary.start()
        boundary.attach([optimizer])
        train(model, optimizer, boundary, 5)
        sigma = torch.linalg.matrix_norm(model.qkv.weight[:WIDTH].detach(), 2)
        assert float(sigma) == pytest.approx(float(spectral.gain.detach()[0] / temperature.tau), rel=0.02)
        assert temperature.tau.item() != 0.5
        finals.append(model.qkv.weight.detach().clone())
    torch.testing.assert_close(*finals, rtol=0, atol=0)


def test_a_run_that_is_resumed_equals_one_that_is_not() -> None:
    def begin() -> tuple[nn.Module, Any, Temperature]:
        torch.manual_seed(0)
        model = Biased().double()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), Temperature(schedule)

    whole, optimizer, temperature = begin()
    train(whole, optimizer, put(whole, optimizer, temperature), 6)

    first, optimizer, temperature = begin()
    boundary = put(first, optimizer, temperature)
    for x, y in batches(6)[:3]:
        optimizer.zero_grad()
        F.mse_loss(first(x), y).backward()
        optimizer.step()
    states = {name: site.chain[0].state_dict() for name, site in boundary.sites.items()}
    assert {name: int(state["step"]) for name, state in states.items()} == dict.fromkeys(states, 3)

    second, resumed, fresh = begin()
    second.load_state_dict(first.state_dict())
    boundary = Boundary()
    for name, (blocks, heads) in knobs(False).items():
        boundary.add(name, second.get_parameter(name), ScaleTransform(fresh, blocks, heads), states[name])
    assert boundary.start() == []
    boundary.attach([resumed])
    resumed.load_state_dict(optimizer.state_dict())
    for x, y in batches(6)[3:]:
        resumed.zero_grad()
        F.mse_loss(second(x), y).backward()
        resumed.step()
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_theta_gets_its_gradient_when_one_of_its_weights_has_none() -> None:
    model = Biased().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    temperature = Temperature(0.5, learnable=True)
    boundary = put(model, optimizer, temperature)
    for skipped in (None, "table", "qkv.weight", None):
        optimizer.zero_grad()
        x, y = batches(1)[0]
        F.mse_loss(model(x), y).backward()
        expected = torch.zeros((), dtype=torch.float64)
        for name, (blocks, _) in knobs(False).items():
            parameter = model.get_parameter(name)
            if name == skipped:
                parameter.grad = None
            else:
                expected -= sum((b.of(parameter.grad) * b.of(parameter.detach())).sum() for b in blocks)
        before = temperature.log_tau.detach().clone()
        boundary.before_step(optimizer)
        torch.testing.assert_close(temperature.log_tau.grad, expected.view(1), rtol=1e-12, atol=0)
        optimizer.step()
        torch.testing.assert_close(temperature.log_tau.detach(), before - 0.05 * expected, rtol=1e-12, atol=0)
    for name in knobs(False):
        model.get_parameter(name).grad = None
    boundary.before_step(optimizer)
    assert temperature.log_tau.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_keep_their_values_to_rounding(dtype: torch.dtype) -> None:
    model = Biased().to(dtype)
    before = model.qkv.weight.detach().float().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    boundary = put(model, optimizer, Temperature(0.7))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model.qkv.weight[:WIDTH].float(), before[:WIDTH] / 0.7, rtol=2 * eps, atol=0)
    assert torch.equal(model.qkv.weight[WIDTH:].float(), before[WIDTH:])
    for x, y in batches(20):
        F.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()
    torch.testing.assert_close(model.qkv.weight[:WIDTH].float(), before[:WIDTH] / 0.7, rtol=8 * eps, atol=0)
    boundary.detach()


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf"), 1e-12])
def test_bad_temperatures(tau: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number above 0"):
        Temperature(tau)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="overwrite what is learned"):
        Temperature(schedule, learnable=True)
    with pytest.raises(ValueError, match="at least 1"):
        Temperature(heads=0)
    with pytest.raises(ValueError, match=r"one of 0\.\.1 for each of 2 blocks"):
        ScaleTransform(Temperature(heads=2), [Block(0, 1), Block(1, 1)], [0, 2])
    transform = ScaleTransform(Temperature(heads=2), [Block(0, 1), Block(1, 1)], [0, 1])
    with pytest.raises(ValueError, match="one per head"):
        transform.load_state_dict(ScaleTransform(Temperature(), [Block(0, 2)]).state_dict(), torch.zeros(2))
