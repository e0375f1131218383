"""Zeroed units against removed units over architectures: the largest difference of the outputs, in float32.

Weights are random and away from their initial values, biases and batch statistics too; nothing is downloaded. Half of
the units of every group are zeroed in one copy and cut out of another. Where zeros are not enough (LayerNorm over the
residual width, GroupNorm, activations with f(0) ≠ 0) the groups are refused by default; asked for with
``inexact=True``, they are marked, and the difference is shown as it is.

    python benchmarks/slim_zoo.py
    python benchmarks/slim_zoo.py --only "resnet18" "vit"
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from common import arguments, markdown, save
from timm.models import ConvNeXt, DenseNet, SwinTransformer, VisionTransformer
from torch import Tensor, nn

from lightning_efficient.common.comparing import difference
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.common.nests import tensors_behind
from lightning_efficient.common.running import as_call, evaluating
from lightning_efficient.deploy.measure import count_macs
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups
from lightning_efficient.structured.slim import apply_slim

COLUMNS = {
    "model": "model", "groups": "groups", "units": "units", "refused": "refused", "params": "parameters kept",
    "macs": "MACs kept", "difference": "max abs difference", "scale": "output scale", "exact": "claimed equal",
    "seconds": "seconds to find", "why": "not offered by default, because",
}  # fmt: skip


class UNet(nn.Module):
    """Two levels with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = _block(3, 16), _block(16, 32), _block(32, 64)
        self.up2, self.up1, self.head = _block(96, 32), _block(48, 16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, h, w) to (batch, 4, h, w)."""
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = F.interpolate(self.bottom(F.max_pool2d(two, 2)), scale_factor=2.0)
        y = F.interpolate(self.up2(torch.cat([two, y], 1)), scale_factor=2.0)
        return self.head(self.up1(torch.cat([one, y], 1)))


class TwoTasks(nn.Module):
    """A shared trunk with a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(_block(3, 24), nn.MaxPool2d(2), _block(24, 48))
        self.left, self.right = _block(48, 32), _block(48, 16)
        self.digit, self.parity = nn.Linear(32, 10), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of both tasks."""
        x = self.trunk(x)
        return {"digit": self.digit(self.left(x).mean((2, 3))), "parity": self.parity(self.right(x).mean((2, 3)))}


def _block(inputs: int, outputs: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU())


def _group_norm() -> nn.Module:
    blocks = [_block(3, 16, lambda n: nn.GroupNorm(4, n)), _block(16, 16, lambda n: nn.GroupNorm(4, n))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def _sigmoid() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Sigmoid(), nn.Linear(32, 5))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=100, num_key_value_heads=4, tie_word_embeddings=False, use_cache=False, **sizes)
    )


def _vit() -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=96, depth=3, num_heads=6, num_classes=10)


def _swin() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4}
    return SwinTransformer(embed_dim=48, depths=(2, 2), num_heads=(3, 6), num_classes=10, **sizes)


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
        build: Makes it.
        example: Makes its input.
        include: As for ``find_groups``.
        inexact: Whether to ask for groups whose zeros are not removals.
    """

    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    include: list[str] | None = None
    inexact: bool = False


def _images(size: int = 32) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, size, size)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10)


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 100, (2, 12))}


CASES = {
    "ResNet-18": Case(_timm("resnet18"), _images(64)),
    "MobileNetV2 0.5": Case(_timm("mobilenetv2_050"), _images(64)),
    "DenseNet (2, 2, 2)": Case(lambda: DenseNet(growth_rate=16, block_config=(2, 2, 2), num_classes=10), _images()),
    "SE-ResNet-18": Case(_timm("seresnet18"), _images(64)),
    "ViT, FFN": Case(_vit, _images(), ["blocks.*.mlp"]),
    "ViT, heads": Case(_vit, _images(), ["blocks.*.attn"]),
    "Swin": Case(_swin, _images()),
    "ConvNeXt": Case(lambda: ConvNeXt(depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), num_classes=10), _images(64)),
    "SwiGLU decoder (Llama, grouped queries)": Case(_llama, _tokens),
    "U-Net": Case(UNet, _images()),
    "two tasks": Case(TwoTasks, _images()),
    "ViT, residual width": Case(_vit, _images(), ["patch_embed"], inexact=True),
    "GroupNorm": Case(_group_norm, _images(8), inexact=True),
    "sigmoid": Case(_sigmoid, lambda: torch.randn(2, 16), inexact=True),
}


def run(name: str, case: Case) -> dict[str, Any]:
    """Zero half of the units, cut them out of a copy, compare."""
    torch.manual_seed(0)
    model, example = lively(case.build()).eval(), case.example()
    started, why = time.perf_counter(), ""
    if case.inexact:
        try:
            find_groups(model, example, case.include)
        except NoMatchError as error:
            why = str(error).partition("not removing them: ")[2].partition(" (`")[0]
    groups = find_groups(model, example, case.include, inexact=case.inexact)
    seconds = time.perf_counter() - started
    keep = half(groups)
    zeroed, slim = copy.deepcopy(model), copy.deepcopy(model)
    for group, stay in keep.items():
        found = groups.found[group]
        found.zero(dict(zeroed.named_parameters()), set(range(found.units)) - set(stay))
    apply_slim(slim, keep, groups)
    call = as_call(example)
    with evaluating(zeroed, slim):
        expected = call.run(zeroed)
        apart = difference(expected, call.run(slim))
        scale = max(float(t.abs().max()) for t in tensors_behind(expected))
        macs = count_macs(slim, call) / count_macs(model, call)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, slim)]
    return {
        "model": name, "groups": len(groups.found), "units": sum(g.units for g in groups.found.values()),
        "refused": len(groups.refused), "params": sizes[1] / sizes[0], "macs": macs,
        "difference": f"{apart.absolute:.1e}", "scale": f"{scale:.2g}",
        "exact": "yes" if all(g.exact for g in groups.found.values()) else "no", "seconds": seconds, "why": why,
    }  # fmt: skip


def half(groups: Groups) -> dict[str, list[int]]:
    """Half of the units of every group, at random."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randperm(group.units, generator=generator)[: max(group.units // 2, 1)].tolist()
        for name, group in groups.found.items()
    }


def lively(model: nn.Module) -> nn.Module:
    """No weight, bias or statistic as it is initialised."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) - 0.5, alpha=0.1)
    return model


def main() -> None:
    """Run the cases and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names")
    only = parser.parse_args().only
    rows = []
    for name, case in CASES.items():
        if any(part.lower() in name.lower() for part in only):
            with warnings.catch_warnings(action="ignore"):
                rows.append(run(name, case))
            print(markdown(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    print(markdown(rows, COLUMNS))
    if only == [""]:
        save("slim_zoo", rows)


if __name__ == "__main__":
    main()
