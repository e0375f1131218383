"""The gains of sigmaReparam: relative steps, and rates of their own, against closed forms and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lamb
from torch import Tensor, nn
from torch.func import functional_call

from lightning_efficient.weightspace import Block, SpectralTransform
from lightning_efficient.weightspace.sigma_reparam import SigmaReparamConfig, apply_sigma_reparam


class Experts(nn.Module):
    """A mixture without a router: a stack of matrices, used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.down = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.einsum("ni,kio->nko", x, self.up).tanh().mean(1))


class Attention(nn.Module):
    """Fused projections under the name that ``qkv="split"`` knows, and a convolution before them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 6, 3, padding=1)
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.mix(x.unsqueeze(1)).transpose(1, 2)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).mean(1)


MODELS: dict[str, Callable[[], nn.Module]] = {"experts": Experts, "attention": Attention}


def made(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    return model, torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)


def matrices(boundary: Any, name: str, weight: Tensor) -> list[Tensor]:
    blocks = boundary.sites[name].chain[0].blocks
    return list(weight) if blocks[0].stack else [block.of(weight) for block in blocks]


# -- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, 0.3, 25.0])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_of_sgd_multiplies_the_gain(kind: str, rate: float) -> None:
    """``γ ← γ exp(-rate · lr · ⟨∂L/∂Ŵ, Ŵ⟩)``: of the matrix alone, whatever σ, u and v."""
    model, x, y = made(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    config = SigmaReparamConfig(gain="log", gain_lr=rate, qkv="split")
    _, boundary = apply_sigma_reparam(model, optimizer, config, example=(x,))
    F.mse_loss(model(x), y).backward()
    expected = {}
    for name, site in boundary.sites.items():
        weight, grad = site.param.detach().clone(), site.param.grad.clone()
        inner = [(w * g).sum() for w, g in zip(*(matrices(boundary, name, t) for t in (weight, grad)), strict=True)]
        expected[name] = site.chain[0].gain.clone() * torch.exp(-rate * 0.02 * torch.stack(inner))
    optimizer.step()
    for name, site in boundary.sites.items():
        found = site.chain[0].gain
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=0)
        norms = torch.stack([torch.linalg.matrix_norm(m.flatten(1), 2) for m in matrices(boundary, name, site.param)])
        torch.testing.assert_close(norms.detach(), found, rtol=0.02, atol=0)


def test_a_gain_that_would_cross_zero_stays_above_it() -> None:
    """AdamW, with a loss that asks for the negative of the matrix: the published gain goes through zero."""

    def signs(gain: Any) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5, bias=False)).double()
        x = torch.randn(64, 5, dtype=torch.float64)
        y = -model(x).detach()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        config = SigmaReparamConfig(gain=gain, gain_lr=10.0)
        _, boundary = apply_sigma_reparam(model, optimizer, config)
        seen = []
        for _ in range(40):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            seen.append(boundary.sites["0.weight"].chain[0].gain.item())
        return seen

    assert min(signs("linear")) < 0
    log = signs("log")
    assert 0 < min(log) < 0.1, "it must have been driven down"
    assert all(map(math.isfinite, log))


# -- whole runs ------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
    "amsgrad": lambda groups: torch.optim.Adam(groups, amsgrad=True),
    "nesterov": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.5),
    "lamb": lambda groups: Lamb(groups, weight_decay=0.1),
}


def train(
    model: nn.Module, x: Tensor, y: Tensor, optimizer: Any, network: Callable[[], Any], after: Any
) -> list[float]:
    """Eight steps in which a schedule halves the rates, then the user sets them by hand."""
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3], gamma=0.5)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = F.mse_loss(functional_call(model, network(), (x,)), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        after()
        schedule.step()
        if step == 5:
            for group in optimizer.param_groups:
                group["lr"] = group.get("by_hand", 1.0) * 2e-3
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("gain", "rate"), [("log", 1.0), ("log", 7.0), ("linear", 7.0)])
def test_runs_equal_autograd_with_a_rate_of_its_own(optimizer: str, gain: Any, rate: float) -> None:
    """``W e^θ / σ`` (or ``W θ / σ``) in autograd, where ``θ`` is in a group with ``rate`` times the weight's rate."""
    ours, x, y = made("attention")
    theirs, _, _ = made("attention")
    rates = {"mix.weight": 0.01, "qkv.weight": 0.003}
    cuts = {"mix.weight": 1, "qkv.weight": 3}

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        named = dict(model.named_parameters())
        first = [{"params": [named[name]], "lr": lr} for name, lr in rates.items()]
        return [*first, {"params": [p for n, p in named.items() if n not in rates], "lr": 0.01}]

    raw = dict(theirs.named_parameters())
    vectors, thetas = {}, {}
    for name, parts in cuts.items():
        svds = [torch.linalg.svd(m.detach().flatten(1), full_matrices=False) for m in raw[name].chunk(parts)]
        vectors[name] = [[s.U[:, 0], s.Vh[0]] for s in svds]
        first = torch.stack([s.S[0] for s in svds])
        thetas[name] = (first.log() if gain == "log" else first).requires_grad_()

    def network() -> dict[str, Tensor]:
        out = dict(raw)
        for name, parts in cuts.items():
            gains = thetas[name].exp() if gain == "log" else thetas[name]
            pieces = zip(raw[name].chunk(parts), gains, vectors[name], strict=True)
            out[name] = torch.cat([m * (g / (u @ m.flatten(1) @ v)) for m, g, (u, v) in pieces])
        return out

    @torch.no_grad()
    def iterate() -> None:
        for name, parts in cuts.items():
            for pair, m in zip(vectors[name], raw[name].flatten(1).chunk(parts), strict=True):
                pair[0] = F.normalize(m @ pair[1], dim=0)
                pair[1] = F.normalize(m.t() @ pair[0], dim=0)

    own = [
        {"params": [theta], "lr": rates[name] * rate, "weight_decay": 0.0, "by_hand": rate}
        for name, theta in thetas.items()
    ]
    expected = train(theirs, x, y, OPTIMIZERS[optimizer](groups(theirs) + own), network, iterate)

    made_by = OPTIMIZERS[optimizer](groups(ours))
    config = SigmaReparamConfig(gain=gain, gain_lr=rate, qkv="split")
    _, boundary = apply_sigma_reparam(ours, made_by, config)
    found = train(ours, x, y, made_by, lambda: dict(ours.named_parameters()), lambda: None)
    assert abs(expected[-1] - expected[0]) > 1e-3, "the oracle must have trained"
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for name, theta in thetas.items():
        torch.testing.assert_close(
            boundary.sites[name].chain[0].theta, theta, rtol=1e-10, atol=1e-12, check_stride=False
        )
        torch.testing.assert_close(ours.get_parameter(name), network()[name], rtol=1e-9, atol=1e-11)


class Fails(torch.optim.SGD):
    """Moves the parameters, and fails."""

    failing = False

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.failing:
            raise OSError("inside step")
        return result


def test_the_rate_counts_once_a_step() -> None:
    """With a pull-back before clipping, and after a step that failed: what it moved is not made longer later."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    optimizer = Fails(model.parameters(), lr=0.1)
    _, boundary = apply_sigma_reparam(model, optimizer, SigmaReparamConfig(gain="log", gain_lr=5.0))
    transform = boundary.sites["0.weight"].chain[0]

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        boundary.before_step(optimizer)
        optimizer.step()
        return transform.theta.item(), transform.theta.grad.item()

    start = transform.theta.item()
    end, grad = step()
    assert end == pytest.approx(start - 5 * 0.1 * grad, rel=1e-12)
    optimizer.failing = True
    with pytest.raises(OSError, match="inside step"):
        step()
    boundary.restore()
    optimizer.failing = False
    middle = transform.theta.item()
    end, grad = step()
    assert end == pytest.approx(middle - 5 * 0.1 * grad, rel=1e-12)


# -- states and arguments --------------------------------------------------------------------------------------------


def started(log: bool) -> tuple[SpectralTransform, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    transform = SpectralTransform([Block(0, 3), Block(3, 3)], log_gain=log)
    transform.start(weight)
    transform.push(weight)
    return transform, weight


@pytest.mark.parametrize("log", [False, True])
def test_a_state_of_the_other_parametrization_is_taken_over(log: bool) -> None:
    (first, weight), (other, _) = started(log), started(not log)
    with torch.no_grad():
        first.theta.mul_(0.7)
    other.load_state_dict(first.state_dict(), weight)
    torch.testing.assert_close(other.gain, first.gain, rtol=1e-6, atol=0)
    again, _ = started(log)
    again.load_state_dict(first.state_dict(), weight)
    assert torch.equal(again.theta, first.theta), "in its own parametrization to the bit"


@pytest.mark.parametrize("value", [0.0, -0.25])
def test_a_gain_without_a_logarithm_is_refused(value: float) -> None:
    (linear, weight), (log, _) = started(False), started(True)
    state = linear.state_dict() | {"gain": torch.tensor([1.5, value])}
    before = log.state_dict()
    with pytest.raises(ValueError, match=rf"a gain of {value:.3g} has no logarithm.*`gain='linear'`"):
        log.load_state_dict(state, weight)
    assert all(torch.equal(log.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_state_with_both_kinds_of_gain_is_refused() -> None:
    linear, weight = started(False)
    with pytest.raises(ValueError, match=r"a spectral state of 2 block\(s\) holds .*'log_gain'.*got .*'gain'"):
        linear.load_state_dict(linear.state_dict() | {"log_gain": torch.zeros(2)}, weight)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"gain": "exp"}, r"SigmaReparam\(`gain`\) takes one of \('linear', 'log'\); got 'exp'"),
        ({"gain_lr": 0.0}, r"`gain_lr`\) takes a finite factor above 0; got 0.0.*learnable_gain=False"),
        ({"gain_lr": -3}, r"`gain_lr`\).* got -3"),
        ({"gain_lr": math.nan}, r"`gain_lr`\).* got nan"),
        ({"gain_lr": math.inf}, r"`gain_lr`\).* got inf"),
    ],
)
def test_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SigmaReparamConfig(**arguments)


def test_a_constant_gain_has_no_parameter_and_no_rate() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = SigmaReparamConfig(gain="log", gain_lr=30.0, learnable_gain=False)
    _, boundary = apply_sigma_reparam(model, optimizer, config)
    gain = boundary.sites["0.weight"].chain[0].gain.clone()
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert torch.equal(boundary.sites["0.weight"].chain[0].gain, gain)
