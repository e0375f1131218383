"""Precise statistics: the plain average over batches, everything else as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.recalibrate import recalibrate
from lightning_efficient.norms.swap import apply_norm_swap

C = 4


class Net(nn.Module):
    def __init__(self, target: str, **config: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.LayerNorm(C)
        self.drop = nn.Dropout(0.5)
        self.other = nn.BatchNorm1d(C)
        self.last = nn.LayerNorm(C)
        apply_norm_swap(self, {"target": target, "warmup": 4, **config})
        for blend in blend_norms(self).values():
            blend.finish()

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(self.drop(self.first(x)).flatten(0, 1)).view(x.shape)
        return self.last(y.mean(1))


def batches(n: int = 5, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, C, generator=generator) * (i + 1) for i in range(n)]


@pytest.mark.parametrize("target", ["repbn", "un"])
@pytest.mark.parametrize("frozen", [False, True])
def test_plain_average(target, frozen):
    net = Net(target, frozen=frozen)
    data = batches()
    net(data[0])
    done = recalibrate(net, data)
    assert (done.batches, done.norms, done.untouched) == (5, 2, [])
    rows = [x.reshape(-1, C).double().numpy() for x in data]
    if target == "repbn":
        bn = net.first.target.bn
        np.testing.assert_allclose(bn.running_mean, np.mean([r.mean(0) for r in rows], 0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(bn.running_var, np.mean([r.var(0, ddof=1) for r in rows], 0), rtol=1e-5)
        assert bn.num_batches_tracked == 5
        assert bn.momentum == 0.1
    else:
        np.testing.assert_allclose(net.first.target.running_var, np.mean([(r**2).mean(0) for r in rows], 0), rtol=1e-5)
    # afterwards training goes on as before
    before = [b.clone() for b in net.first.target.buffers()]
    net(data[0])
    moved = not all(map(torch.equal, before, net.first.target.buffers()))
    assert moved == (not frozen)


def test_masked_rows_stay_out():
    net = Net("repbn")
    data = batches(2)
    mask = torch.arange(3).expand(6, 3) < 2
    net.first.mask = mask
    for x in data:
        x[~mask] = 1e4
    recalibrate(net, data)
    expected = torch.stack([x[mask].mean(0) for x in data]).mean(0)
    torch.testing.assert_close(net.first.target.bn.running_mean, expected)


@pytest.mark.parametrize("target", ["repbn", "un"])
def test_all_else_is_left_alone(target):
    net = Net(target)
    net.first.eval()
    net.last.target.collect = False
    modes = {name: module.training for name, module in net.named_modules()}
    others = [b.clone() for b in net.other.buffers()]
    parameters = [p.clone() for p in net.parameters()]
    state = torch.get_rng_state()
    recalibrate(net, batches(), forward=lambda model, x: model(x + torch.rand(())))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(map(torch.equal, net.other.buffers(), others))
    assert all(map(torch.equal, net.parameters(), parameters))
    assert all(p.grad is None for p in net.parameters())
    assert (net.first.target.collect, net.last.target.collect) == (True, False)


def test_a_norm_that_saw_single_rows_keeps_its_statistics():
    net = Net("repbn")
    net(batches()[0])
    before = [b.clone() for b in net.last.target.buffers()]
    done = recalibrate(net, batches(size=1))
    assert (done.norms, done.untouched) == (1, ["last"])
    assert all(map(torch.equal, net.last.target.buffers(), before))
    assert net.first.target.bn.num_batches_tracked == 5


@pytest.mark.parametrize("target", ["repbn", "un"])
def test_after_an_error_everything_is_as_before(target):
    net = Net(target)
    net(batches()[0])
    before = [b.clone() for b in net.buffers()]

    def broken(model: nn.Module, x: Tensor) -> None:
        model(x)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        recalibrate(net, batches(), forward=broken)
    with pytest.raises(ValueError, match="no batches"):
        recalibrate(net, [])
    assert all(map(torch.equal, net.buffers(), before))
    assert net.training
    assert net.first.training


def test_nothing_to_do_reads_no_batch():
    def data():
        raise AssertionError("read")
        yield

    for target in ("affine", "dyt", "rms"):
        done = recalibrate(Net(target), data())
        assert (done.batches, done.norms) == (0, 0)


@pytest.mark.parametrize(
    "wrap", [lambda x: (x, 1), lambda x: [x, 1], lambda x: {"x": x}], ids=["tuple", "list", "dict"]
)
def test_kinds_of_batches(wrap):
    a, b = Net("repbn"), Net("repbn")
    recalibrate(a, batches())
    recalibrate(b, [wrap(x) for x in batches()], device="cpu")
    for x, y in zip(a.buffers(), b.buffers(), strict=True):
        assert torch.equal(x, y)


def test_it_repairs_statistics_that_lag():
    """After the inputs' scale has jumped, evaluation agrees with training only once recalibrated."""
    net = Net("repbn")
    for x in batches():
        net(x)
    big = 50 * torch.cat(batches(8, 64))
    norm = net.first
    before = [b.clone() for b in norm.target.buffers()]
    reference = norm(big).std()
    for buffer, old in zip(norm.target.buffers(), before, strict=True):
        buffer.copy_(old)
    lagging = norm.eval()(big).std()
    net.train()
    recalibrate(net, [big])
    repaired = norm.eval()(big).std()
    assert abs(lagging - reference) > 1
    assert abs(repaired - reference) < 1e-2
