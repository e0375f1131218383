"""The optimizer boundary against the autograd parametrization of the published formula, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_sigma import iterate, parametrized, raw_and_gains
from torch import nn

from lightning_efficient.weightspace.sigma_reparam import (
    SigmaReparamConfig,
    apply_sigma_reparam,
    find_targets,
)

STEPS = 100


class Net(nn.Module):
    """A convolution, an attention block with fused projections, a grouped convolution and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.mix = nn.Conv1d(12, 12, 3, padding=1, groups=3)
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        self.cross = nn.MultiheadAttention(12, 3, kdim=12, vdim=10, batch_first=True)
        self.memory = nn.Linear(12, 10)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x).flatten(2)
        h = h + self.mix(h)
        h = h.transpose(1, 2)
        h = h + self.attn(h, h, h, need_weights=False)[0]
        h = h + self.cross(h, h, self.memory(h), need_weights=False)[0]
        return self.head(h.mean(1))


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def batches(n: int, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 1, 5, 5, generator=g, dtype=torch.float64),
            torch.randint(0, 5, (size,), generator=g),
        )
        for _ in range(n)
    ]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.05),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
}


def run(model, optimizers, data, accumulate=1, clip=None, after=lambda: None):
    losses = []
    micro = list(data)
    for start in range(0, len(micro), accumulate):
        for o in optimizers:
            o.zero_grad()
        total = 0.0
        for x, y in micro[start : start + accumulate]:
            loss = nn.functional.cross_entropy(model(x), y) / accumulate
            loss.backward()
            total += loss.item()
        losses.append(total)
        if clip:
            # Same order as in a Trainer: pull back first, then clip what the optimizer will see.
            for o in optimizers:
                if hasattr(o, "boundary"):
                    o.boundary.before_step(o)
            nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]], clip)
        for o in optimizers:
            o.step()
        after()
    return losses


def groups(names, params, gains, decayed):
    """Weights and biases as the user grouped them, gains in a zero-decay group."""
    return [{"params": params}, {"params": gains, "weight_decay": 0.0}]


def tail(test, cell):
    """Each setting with each way of splitting; what accumulates and clips, once."""
    if test != "test_boundary_equals_autograd":
        return False
    if (cell["accumulate"], cell["clip"]) == (1, None):
        mixed = (cell["qkv"], cell["init"]) in (("fused", "preserve"), ("split", "one"))
        return mixed == (cell["optimizer"] == "sgd")
    split = "fused" if cell["clip"] is None else "split"
    return (cell["qkv"], cell["init"]) != (split, "preserve")


@pytest.mark.parametrize("init", ["preserve", "one"])
@pytest.mark.parametrize("qkv", ["fused", "split"])
@pytest.mark.parametrize(
    ("optimizer", "accumulate", "clip"),
    [("adamw", 1, None), ("sgd", 1, None), ("adamw", 3, None), ("adamw", 1, 0.05), ("sgd", 2, 0.05)],
)
def test_boundary_equals_autograd(optimizer, accumulate, clip, qkv, init):
    ours, theirs = make(), make()
    targets = find_targets(ours, SigmaReparamConfig(qkv=qkv))
    assert set(targets.matched) == {
        "stem.weight", "mix.weight", "attn.in_proj_weight", "attn.out_proj.weight", "cross.q_proj_weight",
        "cross.k_proj_weight", "cross.v_proj_weight", "cross.out_proj.weight", "memory.weight", "head.weight",
    }  # fmt: skip
    sites = parametrized(theirs, {n: len(blocks) for n, (_, blocks) in targets.matched.items()}, init)
    raw, gains = raw_and_gains(sites)

    theirs_optimizer = OPTIMIZERS[optimizer](
        [
            {"params": [p for p in theirs.parameters() if not any(p is g for g in gains)]},
            {"params": gains, "weight_decay": 0.0},
        ]
    )
    ours_optimizer = OPTIMIZERS[optimizer](ours.parameters())
    config = SigmaReparamConfig(init=init, qkv=qkv, gain="linear", gain_lr=1)
    _, boundary = apply_sigma_reparam(ours, ours_optimizer, config)
    ours_optimizer.boundary = boundary

    data = batches(STEPS * accumulate)
    expected = run(theirs, [theirs_optimizer], data, accumulate, clip, lambda: iterate(sites))
    got = run(ours, [ours_optimizer], data, accumulate, clip)

    assert max(abs(loss - expected[0]) for loss in expected) > 1e-2, "the oracle must have trained"
    assert max(abs(a - b) for a, b in zip(expected, got, strict=True)) < 1e-10
    for (name, site), (module, attribute), w, gamma in zip(boundary.sites.items(), sites, raw, gains, strict=True):
        torch.testing.assert_close(site.param.detach(), getattr(module, attribute).detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(site.chain[0].gain.detach(), gamma.detach(), rtol=0, atol=1e-10, msg=name)
        site.pull(None)
        torch.testing.assert_close(site.param.detach(), w.detach(), rtol=0, atol=1e-10)


def test_two_optimizers_step_independently():
    ours, theirs = make(), make()
    split = ["stem", "mix", "attn"]
    targets = find_targets(ours)
    sites = parametrized(theirs, {n: len(b) for n, (_, b) in targets.matched.items()})
    _, gains = raw_and_gains(sites)

    def parts(model, extra):
        first = [p for n, p in model.named_parameters() if n.split(".")[0] in split and p.numel() > 1]
        ids = {id(p) for p in [*first, *extra]}
        return first, [p for p in model.parameters() if id(p) not in ids]

    from lightning_efficient.surgery.optimizer import add_parameters
    from lightning_efficient.weightspace import Boundary
    from lightning_efficient.weightspace.sigma_reparam import make_transform

    a, b = parts(ours, [])
    ours_optimizers = [OPTIMIZERS["adamw"](a), OPTIMIZERS["sgd"](b)]
    boundary = Boundary()
    for name, (param, blocks) in targets.matched.items():
        boundary.add(name, param, make_transform(SigmaReparamConfig(gain="linear", gain_lr=1), blocks))
    for o in ours_optimizers:
        add_parameters(o, boundary.thetas(o), [])
    boundary.start()
    boundary.attach(ours_optimizers)

    first_gains = [g for g, n in zip(gains, targets.matched, strict=True) if n.split(".")[0] in split]
    other_gains = [g for g in gains if not any(g is f for f in first_gains)]
    a, b = parts(theirs, gains)
    theirs_optimizers = [
        OPTIMIZERS["adamw"]([{"params": a}, {"params": first_gains, "weight_decay": 0.0}]),
        OPTIMIZERS["sgd"]([{"params": b}, {"params": other_gains, "weight_decay": 0.0}]),
    ]
    data = batches(STEPS)
    expected = run(theirs, theirs_optimizers, data, after=lambda: iterate(sites))
    got = run(ours, ours_optimizers, data)
    assert max(abs(x - y) for x, y in zip(expected, got, strict=True)) < 1e-10


def test_function_unchanged_gradient_orthogonal_and_norm_kept():
    model = make().float()
    x, y = batches(1)[0]
    x = x.float()
    before = model(x).detach().clone()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    _, boundary = apply_sigma_reparam(model, optimizer)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)

    nn.functional.cross_entropy(model(x), y).backward()
    probe = copy.deepcopy(boundary)
    for site in probe.sites.values():
        site.param.grad = boundary.sites[site.name].param.grad.clone()
        site.pull(site.param.grad)
        grad, raw = site.param.grad, site.param.detach()
        for block in site.chain[0].blocks:
            g, w = block.of(grad).reshape(-1), block.of(raw).reshape(-1)
            assert torch.dot(g, w).abs() <= 1e-6 * g.norm() * w.norm(), site.name
        assert site.chain[0].theta.grad is not None
        assert site.chain[0].theta.grad.abs().min() > 0

    run(model, [optimizer], [(a.float(), b) for a, b in batches(200)])
    for site in boundary.sites.values():
        transform = site.chain[0]
        for i, block in enumerate(transform.blocks):
            true = torch.linalg.matrix_norm(block.of(site.param.detach()).flatten(1), 2)
            assert true.item() == pytest.approx(transform.gain[i].abs().item(), rel=0.02), site.name


def test_scaling_the_raw_weight_changes_nothing():
    model = make()
    x, _ = batches(1)[0]
    _, boundary = apply_sigma_reparam(model, OPTIMIZERS["sgd"](model.parameters()))
    before = model(x).detach()
    with torch.no_grad():
        for site in boundary.sites.values():
            site.pull(None)
            site.param.mul_(3)
            site.push(advance=True)
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-12)


def test_gain_through_zero_keeps_the_weight():
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    raw = model[0].weight.detach().clone()
    config = SigmaReparamConfig(gain="linear")
    _, boundary = apply_sigma_reparam(model, torch.optim.SGD(model.parameters(), lr=0.1), config)
    site = boundary.sites["0.weight"]
    with torch.no_grad():
        for gain in (0.0, -0.5, 0.0, 1.0):
            site.pull(None)
            torch.testing.assert_close(site.param.detach(), raw, rtol=1e-12, atol=0)
            site.chain[0].gain.fill_(gain)
            site.push(advance=False)
            assert torch.linalg.matrix_norm(site.param.detach(), 2).item() == pytest.approx(abs(gain), abs=1e-11)
