"""One odd part of a model refuses what it touches and nothing else; what goes along with a width goes along."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups
from lightning_efficient.structured.slim import apply_slim
from tests.slim_models import lively
from tests.unit.test_structured_attention import SUBSETS


class TwoPaths(nn.Module):
    """A head that runs in training only reads the flattened features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head, self.deep = nn.Linear(6, 4), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).relu()
        y = self.head(self.second(x).relu().mean((2, 3)))
        return (y, self.deep(x.flatten(1))) if self.training else y


def test_what_is_read_in_training_only_is_cut_too() -> None:
    model = TwoPaths().train()
    groups = find_groups(model, torch.randn(2, 3, 6, 6))
    assert set(groups.found) == {"first", "second"}
    apply_slim(model, {"first": [1, 2, 7], "second": [0]}, groups)
    one, two = model(torch.randn(2, 3, 6, 6))
    (one.sum() + two.sum()).backward()
    assert model.deep.weight.shape == (4, 3 * 36)


class Spare(nn.Module):
    """Layers that never run, as wide as others; a layer whose weight another function uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU())
        self.spare = nn.Sequential(nn.Linear(9, 5), nn.ReLU())
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.last.weight, self.last.bias)


def test_layers_that_cannot_meet_a_width_do_not_protect_it() -> None:
    groups = find_groups(Spare(), torch.randn(2, 4))
    assert list(groups.found) == ["body.0", "body.2"]


def test_a_model_that_does_not_train_on_the_example_is_said() -> None:
    class NeedsTargets(Spare):
        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            if self.training and target is None:
                raise ValueError("give targets")
            return y

    groups = find_groups(NeedsTargets(), torch.randn(2, 4))
    assert groups.found
    assert "give targets" in groups.notes[0]
    assert "note: it does not run in training mode" in groups.report()


class Odd(nn.Module):
    """Something odd between two plain parts."""

    def __init__(self, part: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, width))
        self.part = part
        self.behind = nn.Sequential(nn.Linear(width, 7), nn.ReLU(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.part(self.before(x)))


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=8)


class Single(nn.Module):
    """Has no float64 kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return x.relu()


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


def _old_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(8, 8))
    layer(torch.randn(2, 8))  # its weight is no leaf now
    return layer


@pytest.mark.parametrize(
    ("part", "refused"), [(Spectral, True), (Single, False), (Numbers, True), (_old_norm, True)],
    ids=["complex", "float32 only", "numpy", "old weight norm"],
)  # fmt: skip
def test_one_odd_part_ends_nothing_else(part: Callable[[], nn.Module], refused: bool) -> None:
    groups = find_groups(Odd(part()), torch.randn(3, 4))
    assert {"before.0", "behind.0"} <= set(groups.found)
    assert ("before.2" in groups.refused) == refused


class Turned(nn.Module):
    """A linear map with its weight the other way round, and a gain."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.w, self.shift = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))
        self.gain = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.einsum("...i,io->...o", x, self.w) + self.shift) * self.gain


class Scaled(nn.Conv2d):
    """A convolution with a gain and a constant of its own for every channel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1))
        self.register_buffer("constant", torch.rand(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain * self.constant[:, None, None]


class Halves(nn.Module):
    """YOLO's C2f: halves by ``chunk``, or by a fixed size."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.c, self.fixed = 8, fixed
        self.cv1, self.m, self.cv2 = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(24, 6, 1)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x).relu()
        parts = list(y.split((self.c, self.c), 1) if self.fixed else y.chunk(2, 1))
        parts.append(self.m(parts[-1]).relu())
        return self.out(self.cv2(torch.cat(parts, 1)).relu())


class Shuffled(nn.Module):
    def __init__(self, shuffle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 3), nn.Conv2d(5, 2, 1)
        self.shuffle = shuffle

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.shuffle(self.first(x).relu())).relu())


def by_hand(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, h, w)


def _pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 24, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 2, 1))


def _groups() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 2, 1))


class Stem(nn.Module):
    """Rows and hidden state of a recurrent layer."""

    def __init__(self, kind: Any, **kwargs: Any) -> None:
        super().__init__()
        self.inner, self.rnn = nn.Linear(5, 7), kind(7, 6, batch_first=True, **kwargs)
        self.out = nn.Linear(12 if kwargs.get("bidirectional") else 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.inner(x))[0])


class Experts(nn.Module):
    """Experts in tensors of three axes, one after the other for the tokens that are sent to them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 5)), nn.Parameter(torch.randn(3, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i in range(len(self.up)):
            sent = chosen == i
            value, switch = F.linear(x[sent], self.up[i]).chunk(2, -1)
            y[sent] = F.linear(value * switch.sigmoid(), self.down[i]) * weight[sent][:, None]
        return y


class Depth(nn.Module):
    """A residual branch that is left out for some samples in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        branch = self.second(x.relu())
        if self.training:
            branch = branch * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.8).div_(0.8)
        return self.out(x + branch)


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8).double()


def sequences() -> Tensor:
    return torch.randn(2, 4, 5).double()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, int]]] = {
    "custom linear": (lambda: nn.Sequential(Turned(5, 8), nn.ReLU(), Turned(8, 2)), sequences, {"0": 8}),
    "gain and buffer": (lambda: nn.Sequential(Scaled(3, 8), nn.ReLU(), Scaled(8, 2)), images, {"0": 8}),
    "chunked halves": (lambda: Halves(False), images, {"cv1": 8, "m": 8, "cv2": 6}),
    "halves of a fixed size": (lambda: Halves(True), images, {"cv1": 8, "m": 8, "cv2": 6}),
    "channel shuffle": (lambda: Shuffled(nn.ChannelShuffle(3)), images, {"first": 4, "second": 5}),
    "shuffle by hand": (lambda: Shuffled(by_hand), images, {"first": 4, "second": 5}),
    "pixel shuffle": (_pixels, images, {"0": 6, "3": 4}),
    "group norm": (_groups, images, {"0": 4}),
    "experts in one tensor": (Experts, sequences, {"up": 8}),
    "stochastic depth": (Depth, images, {"first": 8}),
    "lstm": (lambda: Stem(nn.LSTM), sequences, {"inner": 7, "rnn": 6}),
    "stacked both ways": (lambda: Stem(nn.GRU, num_layers=2, bidirectional=True), sequences, {"inner": 7, "rnn": 6}),
}


def check(model: nn.Module, x: Tensor, groups: Groups) -> None:
    """Zeroed equals removed, all groups at once, whichever units go."""
    for subset in SUBSETS:
        keep = {name: subset(group.units) for name, group in groups.found.items()}
        zeroed, slim = copy.deepcopy(model), copy.deepcopy(model)
        for name, stay in keep.items():
            group = groups.found[name]
            group.zero(dict(zeroed.named_parameters()), set(range(group.units)) - set(stay))
        apply_slim(slim, keep, groups)
        torch.testing.assert_close(slim(x), zeroed(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_whatever_is_on_a_width_goes_with_it(name: str) -> None:
    build, example, expected = CASES[name]
    model, x = lively(build()).double().eval(), example()
    groups = find_groups(model, x)
    assert {n: g.units for n, g in groups.found.items()} == expected, groups.report()
    check(model, x, groups)


def test_group_norm_keeps_its_group_size() -> None:
    model, x = _groups().double().eval(), images()
    apply_slim(model, {"0": [1, 3]}, find_groups(model, x))
    assert (model[1].num_groups, model[1].num_channels) == (2, 8)  # type: ignore[index]
