"""``torch.compile``: one graph for a whole transition, one more after it, and the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.norms.blend import BlendNorm, blend_norms
from lightning_efficient.norms.swap import TARGETS, apply_norm_swap


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model_with(target: str) -> tuple[nn.Module, BlendNorm]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    apply_norm_swap(model, {"target": target, "init": "slab", "warmup": 3, "window": 2})
    model[1].target.calibrating = True
    return model, model[1]


def counting(graphs: list[Any]) -> Callable[..., Any]:
    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    return backend


def tail(test: str, cell: dict[str, Any]) -> bool:
    """A mask is for what takes statistics of the batch."""
    return test == "test_one_graph_per_phase" and cell["masked"] and cell["target"] != "repbn"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_one_graph_per_phase(target, masked):
    model, blend = model_with(target)
    graphs: list[Any] = []
    compiled = torch.compile(model, backend=counting(graphs), fullgraph=True)
    x = torch.randn(5, 7, 6)
    if masked:
        blend.mask = torch.rand(5, 7) > 0.3
    for lam in (1.0, 0.75, 0.5, 0.1, 0.0):
        blend.lam.fill_(lam)
        compiled(x).sum().backward()
    assert len(graphs) == 1
    blend.finish()
    for _ in range(3):
        compiled(x).sum().backward()
    assert len(graphs) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_same_numbers_as_eager(target):
    """Outputs, gradients, parameters and buffers over a schedule, the stateful backward of ``un`` included."""
    eager, _ = model_with(target)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for step in range(7):
        x = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(step))
        for model, call in ((eager, eager), (twin, compiled)):
            (blend,) = blend_norms(model).values()
            blend.lam.fill_(1 - step / 5) if step < 5 else blend.finish()
            model.zero_grad()
            call(x).square().sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad
    for (name, a), (_, b) in zip(eager.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-5, atol=1e-6)
    for (name, a), (_, b) in zip(eager.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-5, atol=1e-6)


class Recomputed(nn.Module):
    """A compiled block that is recomputed in the backward pass, which it cannot see: its owner closes the gate."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.block, self.blend = model_with("repbn")
        self.blend.lam.fill_(0.5)
        self.gate = gate
        self.compiled = torch.compile(self.block, backend="aot_eager")

    def step(self, x: Tensor) -> Tensor:
        y = checkpoint(self.compiled, x, use_reentrant=False)
        self.blend.target.collect = not self.gate
        y.square().sum().backward()
        self.blend.target.collect = True
        return self.blend.target.bn.num_batches_tracked


def test_the_gate_covers_compiled_recomputation():
    x = torch.randn(5, 7, 6)
    plain, _ = model_with("repbn")
    plain[1].lam.fill_(0.5)
    plain(x).square().sum().backward()
    gated = Recomputed(gate=True)
    assert gated.step(x) == 1
    for a, b in zip(plain.parameters(), gated.block.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(plain.buffers(), gated.block.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert Recomputed(gate=False).step(x) == 2  # why the gate is needed


def test_export_in_the_middle_of_a_transition():
    model, blend = model_with("repbn")
    blend.lam.fill_(0.3)
    x = torch.randn(5, 7, 6)
    model(x)
    model.eval()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
