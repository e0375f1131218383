"""Units cut out: the smaller model computes what the model with zeros computes, and nothing is done by halves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.common.nests import tensors_in
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups, Slice, UnitGroup
from lightning_efficient.structured.slim import apply_slim, is_cut, plan_slim, replay_slim
from lightning_efficient.surgery.cuts import cut_states
from tests.slim_models import MODELS, ResNet, Transformer, images, lively, tokens


def _zeroed(model: nn.Module, groups: Groups, keep: dict[str, list[int]]) -> nn.Module:
    zeroed = copy.deepcopy(model)
    for name, stay in keep.items():
        group = groups.found[name]
        group.zero(dict(zeroed.named_parameters()), set(range(group.units)) - set(stay))
    return zeroed


def _half(groups: Groups, seed: int = 0) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(group.units, generator=generator)[: max(group.units // 2, 1)].tolist()
        for name, group in groups.found.items()
    }


def _outputs(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors_in(model.eval()(x)))


@pytest.mark.parametrize("name", MODELS)
def test_zeroed_equals_removed(name: str) -> None:
    build, example, expected = MODELS[name]
    model, x = lively(build()), example()
    groups = find_groups(model, x)
    assert set(groups.found) == expected, groups.report()
    keep = _half(groups)
    zeroed = _zeroed(model, groups, keep)
    slim = copy.deepcopy(model)
    apply_slim(slim, keep, groups)
    for one, two in zip(_outputs(zeroed, x), _outputs(slim, x), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in slim.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    # What is left has its groups, too, as wide as what was kept.
    if name not in ("grouped", "grouped queries"):  # a depthwise convolution and shared keys: other units than before
        again = find_groups(slim, x)
        assert {n: g.units for n, g in again.found.items()} == {n: len(keep[n]) for n in again.found}
    # The attributes say what the tensors are.
    for module in slim.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_mean.shape == (module.num_features,)


def test_training_mode_is_the_same_too() -> None:
    model, x = lively(ResNet()), torch.randn(4, 3, 8, 8)
    groups = find_groups(model, x)
    keep = _half(groups)
    zeroed, slim = _zeroed(model, groups, keep).train(), model.train()
    apply_slim(slim, keep, groups)
    torch.testing.assert_close(zeroed(x), slim(x), rtol=0, atol=1e-5)


def test_refusals_leave_everything_as_it_was() -> None:
    model = lively(ResNet())
    groups = find_groups(model, images())
    before = copy.deepcopy(model.state_dict())
    objects = [id(p) for p in model.parameters()]
    alien = Groups({"x": UnitGroup("x", 2, (Slice("no.such", 0, torch.tensor([[0], [1]]), "produce"),))})
    calls = [
        (lambda: apply_slim(model, {"head": [0]}, groups), "an output of the model"),
        (lambda: apply_slim(model, {"a.0": []}, groups), "all 6 units would go"),
        (lambda: apply_slim(model, {"a.0": [0], "nothing": [1]}, groups), "is no group"),
        (lambda: apply_slim(model, {"x": [0]}, alien), "does not belong to this model"),
        (lambda: replay_slim(model, plan_slim(Wider(), {"a.0": [0]}, find_groups(Wider(), images()))), "it has 6"),
    ]
    for call, words in calls:
        with pytest.raises(ValueError, match=words):
            call()
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert [id(p) for p in model.parameters()] == objects


class Wider(ResNet):
    def __init__(self) -> None:
        super().__init__()
        self.a[0], self.a[1] = nn.Conv2d(8, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.b[0] = nn.Conv2d(7, 8, 3, padding=1, bias=False)


def test_parameters_stay_the_same_objects_and_gradients_go_along() -> None:
    model, x = lively(ResNet()).train(), images()
    groups = find_groups(model, x)
    model(x).square().sum().backward()
    objects = dict(model.named_parameters())
    grads = {name: p.grad.clone() for name, p in objects.items() if p.grad is not None}
    change = apply_slim(model, {"a.0": [1, 4]}, groups)
    assert all(objects[name] is p for name, p in model.named_parameters())
    assert torch.equal(model.a[0].weight.grad, grads["a.0.weight"][[1, 4]])
    assert torch.equal(model.b[0].weight.grad, grads["b.0.weight"][:, [1, 4]])
    assert set(change.targets) >= {"a.0.weight", "a.1.running_var", "b.0.weight"}
    assert "(6, 8, 3, 3) -> (2, 8, 3, 3)" in change.report()
    model(x).square().sum().backward()  # and autograd takes the new shapes


def test_cutting_twice_is_cutting_once() -> None:
    model, x = lively(Transformer()), tokens()
    groups = find_groups(model, x)
    cuts = plan_slim(model, {"attn": [0, 3], "fc1": range(5)}, groups)
    assert not is_cut(model, cuts)
    replay_slim(model, cuts)
    assert is_cut(model, cuts)
    assert model.attn.num_heads == 2
    state = copy.deepcopy(model.state_dict())
    assert not replay_slim(model, cuts).targets
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    model.fc2.weight.data = torch.zeros(16, 24)
    with pytest.raises(ValueError, match="cut in part already"):
        replay_slim(model, cuts)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
}


def _losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, groups: Any = None, gone: Any = None
) -> Any:
    """Training on fixed random data; with groups, units that are gone are held at zero, memory and all."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        y = torch.randint(0, 5, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if groups is not None:
            grads = {n: p.grad for n, p in model.named_parameters()}
            for name, units in gone.items():
                groups.found[name].zero(grads, units)
        optimizer.step()
        if groups is not None:
            for name, units in gone.items():
                groups.found[name].zero(dict(model.named_parameters()), units)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_training_equals_removed_training(kind: str) -> None:
    torch.manual_seed(0)
    model = ResNet().train()
    groups = find_groups(model, images())
    optimizer = OPTIMIZERS[kind](model.parameters())
    _losses(model, optimizer, 5)  # something to remember
    keep = _half(groups)
    gone = {name: set(range(groups.found[name].units)) - set(stay) for name, stay in keep.items()}
    masked, masked_optimizer = _twins(model, optimizer, kind)
    for name, units in gone.items():
        groups.found[name].zero(dict(masked.named_parameters()), units)
    fresh = copy.deepcopy(model)
    change = apply_slim(model, keep, groups)
    counts = cut_states([optimizer], change.cuts)
    assert counts == {"state_cut": len(change.cuts), "state_dropped": 0}
    assert cut_states([optimizer], change.cuts) == {"state_cut": 0, "state_dropped": 0}
    expected = _losses(masked, masked_optimizer, 40, groups, gone)
    assert _losses(model, optimizer, 40) == pytest.approx(expected, abs=1e-6)
    apply_slim(fresh, keep, groups)
    assert _losses(fresh, OPTIMIZERS[kind](fresh.parameters()), 40) != pytest.approx(expected, abs=1e-3)


def _twins(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    copied = copy.deepcopy(model)
    other = OPTIMIZERS[kind](copied.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return copied, other


def test_memory_that_cannot_be_cut_is_dropped_with_one_warning() -> None:
    torch.manual_seed(0)
    model = ResNet()
    groups = find_groups(model, images())
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    _losses(model, optimizer, 2)
    change = apply_slim(model, {"a.0": [0, 1]}, groups)
    with pytest.warns(UserWarning, match="Adafactor keeps its memory of 2 cut parameters in a form") as seen:
        counts = cut_states([optimizer], change.cuts)
    assert len(seen) == 1
    assert counts["state_dropped"] == 2
    assert counts["state_cut"] == 2
    _losses(model, optimizer, 2)


def test_lbfgs_forgets_everything() -> None:
    model = ResNet()
    groups = find_groups(model, images())
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(images()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    change = apply_slim(model, {"c.0": [0, 1]}, groups)
    with pytest.warns(UserWarning, match="LBFGS keeps its memory"):
        cut_states([optimizer], change.cuts)
    optimizer.step(closure)  # type: ignore[arg-type]


def test_a_compiled_model_sees_the_cut() -> None:
    torch.compiler.reset()
    model, x = lively(ResNet()).eval(), images()
    groups = find_groups(model, x)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        apply_slim(compiled, _half(groups), groups)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)


class Caching(nn.Module):
    """Keeps what its weights make in evaluation mode, as timm's LeViT its position biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gain, self.last = nn.Linear(4, 6), nn.Parameter(torch.rand(6)), nn.Linear(6, 2)
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Caching:
        if mode:
            self.kept.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        gain = self.kept.setdefault("gain", self.gain.exp() - 1) if not self.training else self.gain.exp() - 1
        return self.last(self.first(x).relu() * gain)  # type: ignore[no-any-return]


def test_what_a_module_keeps_in_evaluation_mode_is_forgotten() -> None:
    model, x = Caching().eval(), torch.randn(3, 4)
    groups = find_groups(model, x)
    model(x)
    apply_slim(model, {"first": [1, 4]}, groups)
    assert not model.training
    assert model(x).shape == (3, 2)
