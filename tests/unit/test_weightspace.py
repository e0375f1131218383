"""The boundary and the spectral transform, where they are most likely to be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_efficient.surgery.optimizer import add_parameters
from lightning_efficient.weightspace import Block, Boundary, SpectralTransform, leading_singular_triplet
from lightning_efficient.weightspace.sigma_reparam import (
    SigmaReparamConfig,
    apply_sigma_reparam,
    find_targets,
    make_transform,
)

# -- singular vectors ------------------------------------------------------------------------------------------------


def matrix(kind: str, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def with_spectrum(m: int, n: int, values: Tensor) -> Tensor:
        left, right = torch.linalg.qr(randn(m, len(values)))[0], torch.linalg.qr(randn(n, len(values)))[0]
        return left @ torch.diag(values) @ right.t()

    decaying = torch.linspace(1, 0.1, 300, dtype=torch.float64)
    made = {
        "tall": lambda: randn(90, 20),
        "wide": lambda: randn(20, 90),
        "square": lambda: randn(40, 40),
        "tall, Lanczos": lambda: randn(900, 600),
        "wide, Lanczos": lambda: randn(600, 900),
        "square, Lanczos": lambda: randn(400, 400),
        "just exact": lambda: randn(256, 400),
        "just Lanczos": lambda: randn(400, 257),
        "rank 1": lambda: torch.outer(randn(30), randn(40)),
        "rank 1, Lanczos": lambda: torch.outer(randn(300), randn(400)),
        "rank 3, Lanczos": lambda: randn(300, 3) @ randn(3, 400),
        "near-equal": lambda: with_spectrum(60, 50, torch.tensor([1, 1 - 1e-7, 0.5], dtype=torch.float64)),
        "near-equal, Lanczos": lambda: with_spectrum(400, 350, decaying.index_fill(0, torch.tensor([1]), 1 - 1e-5)),
        "all equal, Lanczos": lambda: with_spectrum(300, 300, torch.ones(300, dtype=torch.float64)),
        "row": lambda: randn(1, 50),
        "column": lambda: randn(50, 1),
        "scalar": lambda: randn(1, 1),
        "tiny": lambda: randn(30, 40) * 1e-15,
        "huge": lambda: randn(30, 40) * 1e15,
        "tiny, Lanczos": lambda: randn(300, 400) * 1e-15,
        "huge, Lanczos": lambda: randn(300, 400) * 1e15,
    }
    return made[kind]().to(dtype)


KINDS = [
    "tall", "wide", "square", "tall, Lanczos", "wide, Lanczos", "square, Lanczos", "just exact", "just Lanczos",
    "rank 1", "rank 1, Lanczos", "rank 3, Lanczos", "near-equal", "near-equal, Lanczos", "all equal, Lanczos", "row",
    "column", "scalar", "tiny", "huge", "tiny, Lanczos", "huge, Lanczos",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_leading_triplet_against_the_svd(kind: str, dtype: torch.dtype) -> None:
    w = matrix(kind, dtype)
    random_state = torch.get_rng_state()
    u, sigma, v = leading_singular_triplet(w)
    assert torch.equal(torch.get_rng_state(), random_state), "drew from the global generator"
    assert u.dtype == sigma.dtype == v.dtype == dtype
    assert (u.shape, sigma.shape, v.shape) == ((w.shape[0],), (), (w.shape[1],))

    top = torch.linalg.svdvals(w.double())[0]
    # The Ritz value of a cluster that 48 Lanczos steps cannot split is low by less than the cluster is wide.
    rel = 1e-5 if kind == "near-equal, Lanczos" else (2e-6 if dtype == torch.float32 else 1e-8)
    torch.testing.assert_close(sigma.double(), top, rtol=rel, atol=0)
    assert abs(u.double().norm().item() - 1) < 1e-6
    assert abs(v.double().norm().item() - 1) < 1e-6
    # sigma = u'Wv, the identity on which the gradient of the method rests
    torch.testing.assert_close(u.double() @ w.double() @ v.double(), sigma.double(), rtol=1e-6, atol=0)


# -- the transform against autograd ----------------------------------------------------------------------------------

Cut = tuple[int, int, int]  # start, length, axis


def reference(
    model: nn.Module, cuts: dict[str, list[Cut]], x: Tensor, y: Tensor, steps: int, init: str
) -> tuple[list[float], dict[str, Tensor], list[Tensor]]:
    """``γ W / σ(W)`` written out in autograd: exact singular vectors to begin with, then one power iteration a step.

    Returns the losses, the network's weights and the gains.
    """
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    vectors: dict[tuple[str, int], list[Tensor]] = {}
    gains: dict[tuple[str, int], Tensor] = {}

    def part(weight: Tensor, cut: Cut) -> Tensor:
        return weight.narrow(cut[2], cut[0], cut[1])

    for name, pieces in cuts.items():
        for i, cut in enumerate(pieces):
            svd = torch.linalg.svd(part(params[name].detach(), cut).flatten(1), full_matrices=False)
            vectors[name, i] = [svd.U[:, 0], svd.Vh[0]]
            first = svd.S[:1] if init == "preserve" else torch.ones(1, dtype=torch.float64)
            gains[name, i] = first.clone().requires_grad_()

    def network() -> dict[str, Tensor]:
        out = dict(params)
        for name, pieces in cuts.items():
            scaled = []
            for i, cut in enumerate(pieces):
                (u, v), piece = vectors[name, i], part(params[name], cut)
                scaled.append(piece * (gains[name, i] / (u @ piece.flatten(1) @ v)))
            out[name] = torch.cat(scaled, dim=pieces[0][2])
        return out

    groups = [{"params": list(params.values())}, {"params": list(gains.values()), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(functional_call(model, network(), (x,)), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        with torch.no_grad():
            for (name, i), (u, v) in vectors.items():
                w = part(params[name], cuts[name][i]).flatten(1)
                u = F.normalize(w @ v, dim=0)
                vectors[name, i] = [u, F.normalize(w.t() @ u, dim=0)]
    return losses, {n: w.detach() for n, w in network().items()}, [g.detach() for g in gains.values()]


class Wrapped(nn.Sequential):
    """One layer, under a name."""

    def __init__(self, layer: nn.Module, name: str = "layer") -> None:
        super().__init__()
        self.add_module(name, layer)


def hugging_face_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Wrapped(Conv1D(12, 5), "c_attn")


def rank_one() -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.weight.data = torch.outer(torch.randn(5), torch.randn(6))
    return Wrapped(layer)


def channels_last(layer: nn.Module) -> nn.Module:
    return Wrapped(layer.to(memory_format=torch.channels_last))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[Cut]]] = {
    "linear": (lambda: Wrapped(nn.Linear(6, 5)), (7, 6), [(0, 5, 0)]),
    "rank 1": (rank_one, (7, 6), [(0, 5, 0)]),
    "one output": (lambda: Wrapped(nn.Linear(6, 1)), (7, 6), [(0, 1, 0)]),
    "one input": (lambda: Wrapped(nn.Linear(1, 6)), (7, 1), [(0, 6, 0)]),
    "conv1d": (lambda: Wrapped(nn.Conv1d(3, 4, 3)), (2, 3, 6), [(0, 4, 0)]),
    "conv2d": (lambda: Wrapped(nn.Conv2d(3, 4, (3, 2))), (2, 3, 5, 5), [(0, 4, 0)]),
    "channels last": (lambda: channels_last(nn.Conv2d(3, 4, (3, 2))), (2, 3, 5, 5), [(0, 4, 0)]),
    "grouped": (lambda: Wrapped(nn.Conv2d(4, 6, 3, groups=2)), (2, 4, 5, 5), [(0, 6, 0)]),
    "depthwise": (lambda: Wrapped(nn.Conv2d(4, 4, 3, groups=4)), (2, 4, 5, 5), [(0, 4, 0)]),
    "conv3d": (lambda: Wrapped(nn.Conv3d(2, 3, 2)), (2, 2, 3, 3, 3), [(0, 3, 0)]),
    "split qkv": (lambda: Wrapped(nn.Linear(5, 12), "qkv"), (7, 5), [(0, 4, 0), (4, 4, 0), (8, 4, 0)]),
    "split conv qkv": (lambda: Wrapped(nn.Conv2d(3, 6, 1), "qkv"), (2, 3, 2, 2), [(0, 2, 0), (2, 2, 0), (4, 2, 0)]),
    "split Conv1D": (hugging_face_conv1d, (7, 5), [(0, 4, 1), (4, 4, 1), (8, 4, 1)]),
}


@pytest.mark.parametrize("init", ["preserve", "one"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_weight_against_autograd(layer: str, init: str) -> None:
    make, shape, cuts = LAYERS[layer]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(*shape, dtype=torch.float64)
    if layer == "channels last":
        x = x.to(memory_format=torch.channels_last)
    y = torch.randn_like(model(x))
    name = f"{next(iter(dict(model.named_children())))}.weight"
    expected, weights, gains = reference(model, {name: cuts}, x, y, 6, init)

    weight = model.get_parameter(name)
    home, strides = weight.data_ptr(), weight.stride()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    _, boundary = apply_sigma_reparam(
        model, optimizer, SigmaReparamConfig(init=init, qkv="split", gain="linear", gain_lr=1)
    )
    assert [(b.start, b.length, b.dim) for b in boundary.sites[name].chain[0].blocks] == cuts
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert abs(expected[-1] - expected[0]) > 1e-3, "the oracle must have trained"
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-12)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[key], rtol=1e-10, atol=1e-11)
    found = boundary.sites[name].chain[0].gain.detach()
    torch.testing.assert_close(found, torch.cat(gains), rtol=1e-10, atol=1e-11)
    assert (weight.data_ptr(), weight.stride()) == (home, strides), "the weight must be written in place"


def test_gradient_of_another_memory_format() -> None:
    """A channels-last weight whose gradient is contiguous, and the other way round, gives the same pull-back."""
    torch.manual_seed(0)
    w, g = torch.randn(6, 3, 3, 3, dtype=torch.float64), torch.randn(6, 3, 3, 3, dtype=torch.float64)
    results = []
    for weight_format, grad_format in ((0, 0), (1, 0), (0, 1), (1, 1)):
        formats = (torch.contiguous_format, torch.channels_last)
        weight = w.clone(memory_format=formats[weight_format])
        grad = g.clone(memory_format=formats[grad_format])
        transform = SpectralTransform([Block(0, 6)])
        transform.start(weight)
        transform.pull(weight, grad)
        transform.advance(weight)
        results.append((weight, grad, transform.theta.grad, transform.left[0], transform.right[0]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert not torch.equal(results[0][1], g)


# -- the window ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """``unused`` gets no gradient unless asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        y = self.second(F.gelu(self.first(x)))
        return y + self.unused(x) if both else y


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def batches(n: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 6, generator=g), torch.randint(0, 3, (5,), generator=g)) for _ in range(n)]


def prepared(
    make: Callable[..., torch.optim.Optimizer] = adamw, dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[Net, torch.optim.Optimizer, Boundary]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = make(model.parameters())
    _, boundary = apply_sigma_reparam(model, optimizer, SigmaReparamConfig(**config))
    return model, optimizer, boundary


def backward(model: Net, batch: tuple[Tensor, Tensor], both: bool = False) -> Tensor:
    loss = F.cross_entropy(model(batch[0].to(model.first.weight.dtype), both), batch[1])
    loss.backward()
    return loss


def everything(model: nn.Module, boundary: Boundary) -> dict[str, Tensor]:
    """All there is: the network's weights, and the state of every transform."""
    out = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, site in boundary.sites.items():
        out |= {f"{name}/{key}": value for key, value in site.chain[0].state_dict().items()}
        if site.raw is not None:
            out[f"{name}/raw"] = site.raw.clone()
    return out


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_a_closure_makes_no_difference() -> None:
    plain, with_closure = prepared(), prepared()
    for batch in batches(5):
        model, optimizer, _ = plain
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step(closure=None)
        model, optimizer, _ = with_closure

        def closure(model: Net = model, optimizer: Any = optimizer, batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            return backward(model, batch)

        assert optimizer.step(closure).requires_grad, "the closure's result must come back"
    assert_identical(everything(plain[0], plain[2]), everything(with_closure[0], with_closure[2]))


class Twice(torch.optim.SGD):
    """Evaluates its closure twice."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
            closure()
        return super().step()


class Fails(torch.optim.SGD):
    """Fails inside ``step`` when told to."""

    failing = False

    def step(self, closure: Any = None) -> Any:
        if self.failing:
            raise OSError("inside step")
        return super().step(closure)


def test_a_closure_evaluated_twice_is_refused_and_leaves_the_network() -> None:
    model, optimizer, boundary = prepared(lambda p: Twice(p, lr=0.1))
    before = everything(model, boundary)
    forwards: list[Tensor] = []

    def closure() -> Tensor:
        forwards.append(model.first.weight.detach().clone())
        optimizer.zero_grad()
        return backward(model, batches(1)[0])

    with pytest.raises(RuntimeError, match=r"Twice evaluated its closure twice.*enabled=False"):
        optimizer.step(closure)
    assert len(forwards) == 1, "the second evaluation must not have run"
    after = everything(model, boundary)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=2.4e-7, atol=0)  # 2 ulp: there and back


def test_an_exception_in_the_closure_leaves_the_network() -> None:
    model, optimizer, boundary = prepared()
    before = everything(model, boundary)

    def closure() -> Tensor:
        backward(model, batches(1)[0])
        boundary.before_step(optimizer)  # opens the window, as a Trainer's hook does; then clipping fails
        raise OSError("clipping")

    with pytest.raises(OSError, match="clipping"):
        optimizer.step(closure)
    after = everything(model, boundary)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=2.4e-7, atol=0)


@pytest.mark.parametrize("restored", [True, False])
def test_an_exception_inside_the_step(restored: bool) -> None:
    model, optimizer, boundary = prepared(lambda p: Fails(p, lr=0.1))
    twin, twin_optimizer, twin_boundary = prepared(lambda p: Fails(p, lr=0.1))
    first, second = batches(2)
    before = everything(model, boundary)
    backward(model, first)
    optimizer.failing = True
    with pytest.raises(OSError, match="inside step"):
        optimizer.step()
    if restored:
        boundary.restore()
        after = everything(model, boundary)
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=2.4e-7, atol=0)
        boundary.restore()  # twice is once
        assert_identical(everything(model, boundary), after)
    optimizer.failing = False
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        if restored or m is twin:
            o.zero_grad()
            backward(m, second)
        else:
            # Nobody closed the window, so that this gradient is of the raw weights; the step after it is sound again.
            o.zero_grad()
            for p in m.parameters():
                p.grad = torch.zeros_like(p)
        o.step()
    if restored:
        a, b = everything(model, boundary), everything(twin, twin_boundary)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=2e-5, atol=1e-7)
    else:
        after = everything(model, boundary)
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-7)


def test_grad_scaler_skips_a_step_without_changing_a_bit() -> None:
    """Plain loop with unscaling, pulling back, clipping; the bad batch leaves no trace at all."""
    runs = {}
    for name, scaled, bad in (("plain", False, False), ("scaled", True, False), ("skipped", True, True)):
        model, optimizer, boundary = prepared()
        scaler = torch.amp.GradScaler(
            "cpu", enabled=scaled, init_scale=1024.0, growth_interval=1000, backoff_factor=0.5
        )
        data = batches(6)
        order = [*data[:3], "bad", *data[3:]] if bad else data
        for batch in order:
            optimizer.zero_grad()
            spoiled = batch == "bad"
            x, y = data[0] if spoiled else batch
            before = everything(model, boundary)
            loss = F.cross_entropy(model(x), y) * (float("inf") if spoiled else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            boundary.before_step(optimizer)
            if not spoiled:
                norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.1)
                assert norm > 0.1, "the clipping must be felt"
            scaler.step(optimizer)
            scaler.update()
            if spoiled:
                assert_identical(everything(model, boundary), before)
        runs[name] = everything(model, boundary)
    assert_identical(runs["plain"], runs["scaled"])  # the scale is a power of two
    assert_identical(runs["plain"], runs["skipped"])


def test_without_a_gradient_nothing_moves() -> None:
    model, optimizer, boundary = prepared()
    for step, batch in enumerate(batches(4)):
        optimizer.zero_grad()
        before = everything(model, boundary)
        both = step % 2 == 0
        backward(model, batch, both)
        optimizer.step()
        moved = {name for name, value in everything(model, boundary).items() if not torch.equal(value, before[name])}
        assert any("unused" in name for name in moved) is both
        assert any("first" in name for name in moved)
        assert (boundary.sites["unused.weight"].chain[0].theta.grad is not None) is both


def test_the_state_advances_once_a_step() -> None:
    model, optimizer, boundary = prepared()
    counts: list[str] = []
    for name, site in boundary.sites.items():
        advance = site.chain[0].advance

        def counting(weight: Tensor, name: str = name, advance: Any = advance) -> None:
            counts.append(name)
            advance(weight)

        site.chain[0].advance = counting
    for batch in batches(3):
        optimizer.zero_grad()
        for _ in range(4):  # accumulation
            backward(model, batch, both=True)
            model(batch[0])  # further forwards
        optimizer.step()
    assert counts == [*boundary.sites] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zero_gradients_for_a_hundred_steps_do_not_wear_narrow_weights(dtype: torch.dtype) -> None:
    model, optimizer, boundary = prepared(lambda p: torch.optim.SGD(p, lr=0.1), dtype)

    def stand_still(steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        return everything(model, boundary)

    untouched = everything(model, boundary)
    raw = [name for name in untouched if name.endswith("/raw")]
    weights = [name for name, _ in model.named_parameters()]
    assert len(raw) == 3
    after = stand_still(100)
    assert_identical({n: after[n] for n in raw + weights}, {n: untouched[n] for n in raw + weights})

    backward(model, batches(1)[0], both=True)
    optimizer.step()  # gains differ from the norms now, and the norms' estimates are one step behind
    moved = everything(model, boundary)
    assert not torch.equal(moved["first.weight"], moved["first.weight/raw"])
    settled = stand_still(200)
    assert_identical({n: settled[n] for n in raw}, {n: moved[n] for n in raw})
    after = stand_still(100)
    assert_identical({n: after[n] for n in raw + weights}, {n: settled[n] for n in raw + weights})


def test_zero_gradients_wear_float32_weights_no_more_than_rounding() -> None:
    model, optimizer, boundary = prepared(lambda p: torch.optim.SGD(p, lr=0.1))
    optimizer.zero_grad()
    backward(model, batches(1)[0], both=True)
    optimizer.step()
    for _ in range(100):  # until the power iteration stands still
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    before = everything(model, boundary)
    for _ in range(1000):
        optimizer.step()
    after = everything(model, boundary)
    for name in boundary.sites:
        torch.testing.assert_close(after[name], before[name], rtol=2e-6, atol=0)


# -- refusals, before anything changes -------------------------------------------------------------------------------


def refused(make: Callable[[Net], Any], match: str, schedulers: Callable[[Any], list[Any]] = lambda o: []) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model)
    built = schedulers(optimizer)
    groups = copy.deepcopy(optimizer.state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=match):
        apply_sigma_reparam(model, optimizer, SigmaReparamConfig(init="one"), schedulers=built)
    assert_identical({name: p.detach().clone() for name, p in model.named_parameters()}, before)
    assert optimizer.state_dict() == groups
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_optimizers_that_cannot_work_are_refused() -> None:
    refused(lambda m: torch.optim.LBFGS(m.parameters()), r"LBFGS.*first-order optimizer.*enabled=False")
    refused(lambda m: torch.optim.SGD([m.first.weight], lr=0.1), r"not in the optimizer.*second\.weight.*Exclude")
    if hasattr(torch.optim, "Muon"):
        weights = lambda m: [m.first.weight, m.second.weight, m.unused.weight]  # noqa: E731
        refused(lambda m: torch.optim.Muon(weights(m), lr=0.1), r"Muon optimizes matrices only")


def test_a_scheduler_that_cannot_follow_is_refused() -> None:
    class PerGroup(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any) -> None:
            self.table = [0.5]
            super().__init__(optimizer)

        def get_lr(self) -> list[float]:
            return [self.table[0]]

    refused(lambda m: adamw(m.parameters()), r"PerGroup does not give the added", lambda o: [PerGroup(o)])


def test_a_weight_in_two_optimizers_is_refused() -> None:
    model = Net()
    boundary = Boundary()
    for name, (param, blocks) in find_targets(model).matched.items():
        boundary.add(name, param, make_transform(SigmaReparamConfig(), blocks))
    optimizers = [adamw(model.parameters()), torch.optim.SGD(model.first.parameters(), lr=0.1)]
    with pytest.raises(ValueError, match=r"'first.weight' is in two optimizers \(AdamW, SGD\).*exclude"):
        boundary.attach(optimizers)
    assert not boundary.attached


def test_two_transforms_of_a_kind_are_refused() -> None:
    model, boundary = Net(), Boundary()
    boundary.add("first.weight", model.first.weight, SpectralTransform([Block(0, 8)]))
    with pytest.raises(ValueError, match=r"already has a 'spectral' transform.*disjoint"):
        boundary.add("first.weight", model.first.weight, SpectralTransform([Block(0, 8)]))
    assert len(boundary.sites["first.weight"].chain) == 1


# -- states ----------------------------------------------------------------------------------------------------------


def saved_state(boundary: Boundary, name: str) -> dict[str, Tensor]:
    site = boundary.sites[name]
    return site.chain[0].state_dict() | ({} if site.raw is None else {"raw": site.raw.clone()})


def continued(
    model: Net, states: dict[str, dict[str, Tensor]], make: Callable[..., Any] = adamw
) -> tuple[Any, Boundary, list[str]]:
    """A boundary on a model whose weights are the network's, with saved states."""
    boundary, optimizer = Boundary(), make(model.parameters())
    for name, (param, blocks) in find_targets(model).matched.items():
        boundary.add(name, param, make_transform(SigmaReparamConfig(), blocks), states[name])
    add_parameters(optimizer, boundary.thetas(optimizer))
    strangers = boundary.start()
    boundary.attach([optimizer])
    return optimizer, boundary, strangers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_state_continues_exactly(dtype: torch.dtype) -> None:
    sgd = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    model, optimizer, boundary = prepared(sgd, dtype)
    for batch in batches(3):
        optimizer.zero_grad()
        backward(model, batch, both=True)
        optimizer.step()
    twin = copy.deepcopy(model)
    before = everything(model, boundary)
    states = {name: saved_state(boundary, name) for name in boundary.sites}
    other, twin_boundary, strangers = continued(twin, states, sgd)
    assert strangers == []
    assert_identical(everything(twin, twin_boundary), before)
    for m, o in ((model, optimizer), (twin, other)):
        for batch in batches(3, seed=2):
            o.zero_grad()
            backward(m, batch, both=True)
            o.step()
    assert_identical(everything(twin, twin_boundary), everything(model, boundary))


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_a_state_continues_in_another_precision(saved: torch.dtype, now: torch.dtype) -> None:
    sgd = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    model, optimizer, boundary = prepared(sgd, saved)
    for batch in batches(3):
        optimizer.zero_grad()
        backward(model, batch, both=True)
        optimizer.step()
    twin = copy.deepcopy(model).to(now)
    states = {name: saved_state(boundary, name) for name in boundary.sites}
    other, twin_boundary, strangers = continued(twin, states, sgd)
    if saved != torch.bfloat16:  # whose rounding alone may look like another weight: it is taken as it is
        assert strangers == []
    previous = [p.detach().clone() for p in twin.parameters()]
    for batch in batches(6, seed=2):
        other.zero_grad()
        loss = backward(twin, batch, both=True)
        assert torch.isfinite(loss)
        other.step()
        present = [p.detach().clone() for p in twin.parameters()]
        assert not any(torch.equal(a, b) for a, b in zip(previous, present, strict=True)), "stuck on the saved weights"
        previous = present
    for m, o in ((model, optimizer),):
        for batch in batches(6, seed=2):
            o.zero_grad()
            backward(m, batch, both=True)
            o.step()
    bound = 0.05 if torch.bfloat16 in (saved, now) else 1e-5
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=bound, atol=bound)
    assert twin_boundary.sites["first.weight"].raw is None or now == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_changed_meanwhile_are_taken_as_the_networks(dtype: torch.dtype) -> None:
    """Averaged weights, for instance: the function stays, the state is derived anew, and it says which."""
    sgd = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    model, optimizer, boundary = prepared(sgd, dtype)
    initial = copy.deepcopy(model)
    for batch in batches(3):
        optimizer.zero_grad()
        backward(model, batch, both=True)
        optimizer.step()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(twin.parameters(), initial.parameters(), strict=True):
            p.lerp_(q, 0.5)
    averaged = {name: p.detach().clone() for name, p in twin.named_parameters()}
    states = {name: saved_state(boundary, name) for name in boundary.sites}
    other, twin_boundary, strangers = continued(twin, states, sgd)
    assert strangers
    if dtype == torch.bfloat16:  # kept raw weights tell exactly
        assert set(strangers) == set(boundary.sites)
    assert_identical({name: p.detach().clone() for name, p in twin.named_parameters()}, averaged)
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    other.step()
    after = {name: p.detach() for name, p in twin.named_parameters()}
    for name, value in averaged.items():
        bound = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(after[name], value, rtol=bound, atol=1e-6)
    for site in twin_boundary.sites.values():
        true = torch.linalg.matrix_norm(site.param.detach().double(), 2).item()
        assert site.chain[0].gain.abs().item() == pytest.approx(true, rel=0.02)


def test_states_that_do_not_fit_change_nothing() -> None:
    _, _, boundary = prepared()
    good = saved_state(boundary, "first.weight")

    def broken(**changes: Tensor | None) -> dict[str, Tensor]:
        return {k: v for k, v in {**good, **changes}.items() if v is not None}

    for state in (
        broken(gain=torch.ones(2)),
        broken(sigma=torch.ones(())),
        broken(**{"left.0": torch.ones(7)}),
        broken(**{"right.0": torch.ones(6, 1)}),
        broken(**{"right.0": None}),
        broken(**{"left.1": torch.ones(8)}),
        broken(raw=torch.ones(6, 8)),
        {},
    ):
        model, fresh = Net(), Boundary()
        transform = SpectralTransform([Block(0, 8)])
        before = model.first.weight.detach().clone()
        with pytest.raises(ValueError, match=r"saved state of 'first.weight' does not fit"):
            fresh.add("first.weight", model.first.weight, transform, state)
        assert torch.equal(model.first.weight, before)
        assert "first.weight" not in fresh.sites
        assert torch.equal(transform.gain, torch.ones(1))
        assert transform.left == []


def test_gains_keep_their_place_whatever_the_order_of_the_sites() -> None:
    """A saved optimizer state goes by position: the order of two callbacks must not exchange their gains."""
    model = Net()
    optimizer = adamw(model.parameters())
    orders = []
    for names in (["first.weight", "second.weight"], ["second.weight", "first.weight"]):
        boundary = Boundary()
        for name in names:
            boundary.add(
                name, model.get_parameter(name), SpectralTransform([Block(0, model.get_parameter(name).shape[0])])
            )
        orders.append([weight for _, weight in boundary.thetas(optimizer)])
    assert [id(w) for w in orders[0]] == [id(w) for w in orders[1]]


def test_detached_the_model_is_an_ordinary_one() -> None:
    model, optimizer, boundary = prepared()
    backward(model, batches(1)[0])
    optimizer.step()
    boundary.detach()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gains = [site.chain[0].gain.detach().clone() for site in boundary.sites.values()]
    optimizer.zero_grad()
    backward(model, batches(1)[0])
    plain = copy.deepcopy(model)
    grads = {name: p.grad for name, p in model.named_parameters()}
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    twin = adamw(
        [{"params": list(plain.parameters())}, {"params": [nn.Parameter(g) for g in gains], "weight_decay": 0.0}]
    )
    twin.load_state_dict(optimizer_state)
    for name, p in plain.named_parameters():
        p.grad = None if grads[name] is None else grads[name].clone()
    twin.step()
    assert_identical(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert not torch.equal(before["first.weight"], model.first.weight)
    for gain, site in zip(gains, boundary.sites.values(), strict=True):
        assert torch.equal(site.chain[0].gain.detach(), gain)
