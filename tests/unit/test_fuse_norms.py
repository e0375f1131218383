"""``export(fuse_norms=True)``: batch norms disappear where that is exact, and stay where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_efficient import HESSOPruning, export
from tests.integration.test_hesso_pruning import Module, loader, trainer
from tests.slim_models import MobileNet, ResNet, lively


class Shared(nn.Module):
    """The convolution's output is also used without the norm; another norm comes before an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.pre, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.last(self.pre(self.norm(x) + x).relu())  # type: ignore[no-any-return]


def _transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False), nn.Flatten(), nn.Linear(8 * 16, 7, bias=False),
        nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 2),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "residual": (ResNet, 0),
    "depthwise": (MobileNet, 0),
    "groups, linear, no affine": (_transposed, 0),
    "used twice, or before an activation": (Shared, 2),
    "with its activation": (lambda: timm.create_model("mobilenetv2_050", num_classes=3), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_norms_are_gone_and_nothing_else(case: str) -> None:
    build, left = CASES[case]
    model, x = lively(build()).eval(), torch.randn(2, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = export(model, x, fuse_norms=True)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules()) == left
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    y = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(fused.double()(y.double()), model.double()(y.double()), rtol=1e-5, atol=1e-5)


def test_after_a_cut() -> None:
    """A convolution without bias gets one that is as wide as what is left."""
    module, hesso = Module(), HESSOPruning(target=0.8, start=2, duration=12, periods=3)
    module.net[0] = nn.Conv2d(1, 8, 3, padding=1, bias=False)
    trainer(hesso).fit(module, loader())
    small = export(module, torch.randn(2, 1, 8, 8), fuse_norms=True)
    first = small.net[0]
    assert first.bias.shape == (first.out_channels,) == (len(hesso.keep["net.0"]),)
    assert isinstance(small.net[1], nn.Identity)
