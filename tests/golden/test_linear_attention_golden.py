"""Simplified linear attention against loops over numbers and against a dense attention matrix, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_linear_attention import dense, loops
from timm.layers import Attention
from torch import Tensor

from lightning_efficient.attention.linear import LinearAttention, LinearAttentionConfig

# (grid, head_dim): the first forms pairs of tokens, (QK)V; the others do not.
SHAPES = [(2, 5), (3, 4), (4, 3)]
KERNELS = [1, 3, 5]


def layer(grid: int, dim: int, heads: int = 2, kernel_size: int = 5, eps: float = 1e-6, **options: Any) -> Any:
    torch.manual_seed(0)
    old = Attention(heads * dim, heads, **{"qkv_bias": True, **options})
    new = LinearAttention(old, grid, LinearAttentionConfig(kernel_size, eps=eps), seed=1).double()
    with torch.no_grad():
        for p in new.parameters():
            p.normal_()
    return new


def tokens(grid: int, dim: int, heads: int = 2, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid * grid, heads * dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize(("grid", "dim"), SHAPES)
def test_forward_equals_the_loops(grid: int, dim: int, kernel_size: int) -> None:
    heads, eps = 2, 0.3  # large enough to be seen
    new, x = layer(grid, dim, heads, kernel_size, eps), tokens(grid, dim)
    seen: list[Tensor] = []
    new.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    new(x)
    qkv = (x @ new.qkv.weight.T + new.qkv.bias).tolist()
    position = new.position[0].tolist()
    kernel, bias = new.dwc.weight[:, 0].tolist(), new.dwc.bias.tolist()
    for sample in range(2):
        for h in range(heads):
            part = [slice(third * heads * dim + h * dim, third * heads * dim + (h + 1) * dim) for third in range(3)]
            q, k, v = ([row[cut] for row in qkv[sample]] for cut in part)
            p = [row[h * dim : (h + 1) * dim] for row in position]
            expected = torch.tensor(loops(q, k, v, p, kernel, bias, eps), dtype=torch.float64)
            found = seen[0][sample, :, h * dim : (h + 1) * dim]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("grid", "dim"), SHAPES)
def test_outputs_and_gradients_equal_the_dense_form(grid: int, dim: int, bias: bool) -> None:
    new, x = layer(grid, dim, qkv_bias=bias), tokens(grid, dim).requires_grad_()
    twin = {name: value.detach().clone().requires_grad_() for name, value in new.state_dict().items()}
    other = x.detach().clone().requires_grad_()
    found, expected = new(x), dense(other, twin, 2, 1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-8, atol=1e-9)
    for name, parameter in new.named_parameters():
        torch.testing.assert_close(parameter.grad, twin[name].grad, rtol=1e-8, atol=1e-9, msg=name)
        assert parameter.grad.abs().max() > 1e-3, name


def test_the_normaliser_makes_a_weighted_mean() -> None:
    """With equal values everywhere and no convolution, attention returns them: the weights sum to one."""
    new, x = layer(4, 3, eps=1e-12), tokens(4, 3)
    with torch.no_grad():
        new.qkv.weight[12:] = 0.0
        new.qkv.bias[12:] = torch.arange(6.0)
        new.dwc.weight.zero_()
        new.dwc.bias.zero_()
    seen: list[Tensor] = []
    new.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    new(x)
    attends = (x @ new.qkv.weight[:6].T + new.qkv.bias[:6]).unflatten(-1, (2, 3)).amax(-1) > 0.05
    assert attends.sum() > 40
    expected = torch.arange(6.0, dtype=torch.float64).expand(2, 16, 6).unflatten(-1, (2, 3))
    torch.testing.assert_close(seen[0].unflatten(-1, (2, 3))[attends], expected[attends], rtol=1e-9, atol=1e-9)


def test_a_query_that_is_zero_after_the_relu_gives_the_local_part_alone() -> None:
    new, x = layer(3, 4), tokens(3, 4)
    with torch.no_grad():
        new.qkv.weight[:8] = 0.0
        new.qkv.bias[:8] = -1.0
    new(x.requires_grad_()).sum().backward()
    assert torch.isfinite(x.grad).all()
    v = (x @ new.qkv.weight[16:].T + new.qkv.bias[16:]).detach()
    image = v.transpose(1, 2).reshape(2 * 2, 4, 3, 3)
    local = new.dwc(image).reshape(2, 8, 9).transpose(1, 2)
    torch.testing.assert_close(new(x), new.proj(local), rtol=1e-12, atol=1e-12)


def test_all_heads_share_the_kernel() -> None:
    new = layer(3, 4, heads=3)
    assert new.dwc.weight.shape == (4, 1, 5, 5)
    assert new.position.shape == (1, 9, 12)


def test_norms_and_gates_of_the_old_attention_stay() -> None:
    """Query-key norms act before the position and the ReLU, the output norm and the gate before the projection."""
    options = {"qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": torch.nn.LayerNorm}
    new, x = layer(3, 4, **options), tokens(3, 4)
    q, k, v = (x @ new.qkv.weight.T + new.qkv.bias).unflatten(-1, (3, 2, 4)).unbind(2)
    q, k = (
        torch.nn.functional.layer_norm(t, [4], n.weight, n.bias, n.eps) for t, n in ((q, new.q_norm), (k, new.k_norm))
    )
    joined = torch.cat([t.flatten(2) for t in (q, k, v)], -1)
    core = {"qkv.weight": torch.eye(24), "proj.weight": torch.eye(8), "proj.bias": torch.zeros(8)}
    core = {name: value.double() for name, value in core.items()}
    core |= {name: value for name, value in new.state_dict().items() if name.startswith(("dwc", "position"))}
    y = dense(joined, core, 2, 1e-6)
    y = torch.nn.functional.layer_norm(y, [8], new.norm.weight, new.norm.bias, new.norm.eps)
    y = y * torch.sigmoid(x @ new.gate.weight.T + new.gate.bias)
    torch.testing.assert_close(new(x), y @ new.proj.weight.T + new.proj.bias, rtol=1e-11, atol=1e-12)
