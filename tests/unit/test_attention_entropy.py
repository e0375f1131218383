"""The functional core against a brute force in float64 that builds the whole matrix, loop by loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_efficient.functional as LF
from lightning_efficient.metrics.functional import (
    attention_entropy,
    attention_rows,
    entropy_lower_bound,
    normalized_entropy,
    query_indices,
    row_logit_norm,
    rows_from_logits,
)
from lightning_efficient.metrics.functional import attention_entropy as attention_entropy_function

F32_EPS = torch.finfo(torch.float32).eps


def qk(b=2, h=4, t=11, d=8, keys=None, heads=None, sharp=1.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(b, h, t, d, generator=g, dtype=torch.float64) * sharp
    k = torch.randn(b, heads or h, keys or t, d, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def reference(q: Tensor, k: Tensor, scale=None, allowed=None, bias=None) -> Tensor:
    """sum over the visible keys of -p log p, row by row, in float64 Python arithmetic."""
    b, h, t, d = q.shape
    groups = h // k.shape[1]
    scale = 1 / math.sqrt(d) if scale is None else scale
    out = torch.empty(b, h, t, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            for n in range(t):
                logits = (k[i, j // groups].double() @ q[i, j, n].double()) * scale
                if bias is not None:
                    logits = logits + bias[i, j, n].double()
                if allowed is not None:
                    logits = logits[allowed[i, j, n]]
                if not len(logits):
                    out[i, j, n] = math.nan
                    continue
                weights = (logits - logits.max()).exp().tolist()
                total = math.fsum(weights)
                out[i, j, n] = -math.fsum(w / total * math.log(w / total) for w in weights if w > 0)
    return out


def float32_tolerance(q: Tensor, k: Tensor) -> float:
    """|dH| <= max|da| * sqrt(Var log p) + the sum's own rounding, to first order; Var log p < log(n)^2/4 + 1.

    A float32 dot product of length d errs by at most about d eps/2 |q||k|.
    """
    d, n = q.shape[-1], k.shape[2]
    logit_error = (d + 2) * F32_EPS / 2 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / math.sqrt(d)
    return logit_error * math.sqrt(0.25 * math.log(n) ** 2 + 1) + 2 * n * F32_EPS * (1 + math.log(n))


def test_functional_namespace_holds_the_same_function():
    assert LF.attention_entropy is attention_entropy_function


@pytest.mark.parametrize("sharp", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_plain(sharp, scale):
    q, k = qk(sharp=sharp, keys=7)
    expected = reference(q, k, scale)
    exact = attention_entropy(q.double(), k.double(), scale=scale)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-12)
    assert (attention_entropy(q, k, scale=scale) - expected).abs().max() < float32_tolerance(q, k)
    if sharp == 0.0:
        torch.testing.assert_close(expected, torch.full_like(expected, math.log(7)))


def test_bool_mask_in_every_broadcastable_shape_and_rows_that_see_nothing():
    q, k = qk(dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    for shape in [(2, 4, 11, 11), (2, 1, 1, 11), (1, 4, 11, 1), (4, 11, 11), (11, 11), (11,)]:
        mask = torch.rand(shape, generator=g) > 0.4
        allowed = mask.expand(2, 4, 11, 11)
        entropy = attention_entropy(q, k, mask=mask)
        torch.testing.assert_close(entropy, reference(q, k, allowed=allowed), rtol=0, atol=1e-12, equal_nan=True)
    assert entropy.isfinite().all()
    mask = torch.ones(11, 11, dtype=torch.bool)
    mask[3] = False
    assert attention_entropy(q, k, mask=mask).isnan().nonzero()[:, 2].unique().tolist() == [3]


def test_causal_and_causal_with_padding():
    q, k = qk(dtype=torch.float64)
    lower = torch.ones(11, 11, dtype=torch.bool).tril().expand(2, 4, 11, 11)
    torch.testing.assert_close(
        attention_entropy(q, k, is_causal=True), reference(q, k, allowed=lower), rtol=0, atol=1e-12
    )
    padding = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    padding[0, ..., 6:] = False
    torch.testing.assert_close(
        attention_entropy(q, k, mask=padding, is_causal=True),
        reference(q, k, allowed=lower & padding),
        rtol=0,
        atol=1e-12,
    )


def test_padding_keys_hold_nothing_and_do_not_matter():
    q, k = qk()
    mask = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    mask[..., 8:] = False
    noisy = k.clone()
    noisy[:, :, 8:] = 1e4
    assert torch.equal(attention_entropy(q, noisy, mask=mask), attention_entropy(q, k, mask=mask))
    cut = attention_entropy(q, k[:, :, :8])
    torch.testing.assert_close(attention_entropy(q, k, mask=mask), cut, rtol=1e-6, atol=1e-6)


def test_grouped_query_attention():
    q, k = qk(h=6, heads=2, dtype=torch.float64)
    torch.testing.assert_close(attention_entropy(q, k), reference(q, k), rtol=0, atol=1e-12)
    # The order of torch's own grouping.
    v = torch.eye(11, dtype=q.dtype).expand(2, 2, 11, 11)
    p = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attention_entropy(q, k), torch.special.entr(p).sum(-1), rtol=0, atol=1e-12)


def test_additive_bias_and_what_counts_as_masked():
    q, k = qk(dtype=torch.float64)
    bias = torch.randn(1, 4, 11, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    rows = attention_rows(q, k, mask=bias)
    torch.testing.assert_close(rows.entropy, reference(q, k, bias=bias.expand(2, 4, 11, 11)), rtol=0, atol=1e-12)
    assert (rows.keys == 11).all()
    allowed = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(3)) > 0.3
    allowed[..., 0] = True
    expected = reference(q, k, allowed=allowed.expand(2, 4, 11, 11), bias=bias.expand(2, 4, 11, 11))
    for masked in (-math.inf, torch.finfo(torch.float64).min, torch.finfo(torch.float32).min, -1e4, -100.0):
        rows = attention_rows(q, k, mask=bias.masked_fill(~allowed, masked))
        torch.testing.assert_close(rows.entropy, expected, rtol=0, atol=1e-12)
        assert torch.equal(rows.keys, allowed.sum(-1).expand(2, 4, 11))


def test_a_row_of_equal_large_negative_bias_is_no_mask_and_one_of_what_stands_for_minus_infinity_is():
    q, k = qk(t=3)
    bias = torch.zeros(3, 3)
    bias[0], bias[1] = -1e4, -math.inf
    rows = attention_rows(q, k, mask=bias)
    assert rows.keys[0, 0].tolist() == [3, 0, 3]
    assert rows.entropy[:, :, 1].isnan().all()
    torch.testing.assert_close(rows.entropy, attention_rows(q, k, mask=bias.clamp(min=-1e38)).entropy, equal_nan=True)
    assert rows.entropy[:, :, 0].isfinite().all()


def test_bfloat16_inputs_lose_only_what_their_rounding_loses():
    q, k = qk(t=33, sharp=3.0, dtype=torch.float64)
    q16, k16 = q.bfloat16(), k.bfloat16()
    entropy = attention_entropy(q16, k16)
    assert entropy.dtype == torch.float32
    # Given the rounded inputs, the arithmetic is float32's.
    assert (entropy - reference(q16, k16)).abs().max() < float32_tolerance(q16.float(), k16.float())
    # Against the unrounded: u = 2**-8 a factor; |dH| <= max|da| sqrt(Var log p), Var log p < log(n)^2/4 + 1.
    unit = 2.0**-8
    slack = (2 * unit + unit**2) * (q.abs() @ k.abs().mT).max() / math.sqrt(8)
    bound = slack * math.sqrt(0.25 * math.log(33) ** 2 + 1)
    assert 0 < (entropy - reference(q, k)).abs().max() < bound


def test_autocast_does_not_reach_inside():
    q, k = qk(t=33, sharp=5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention_entropy(q, k)
    assert torch.equal(inside, attention_entropy(q, k))


def test_blocks_do_not_show(monkeypatch):
    import sys

    module = sys.modules["lightning_efficient.metrics.functional.attention_entropy"]
    q, k = qk(dtype=torch.float64)
    bias = torch.randn(4, 11, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = attention_rows(q, k, mask=bias, is_causal=True)
    monkeypatch.setattr(module, "_BLOCK", 1)
    for a, b in zip(whole, attention_rows(q, k, mask=bias, is_causal=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_memory_grows_with_the_keys_only():
    """Peak of live tensor bytes, counted by a dispatch mode, stays far below one queries x keys matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    q, k = qk(b=1, h=2, t=6000, d=4)
    with Largest():
        attention_entropy(q, k, is_causal=True)
    assert largest <= 2**22 < 2 * 6000 * 6000 / 10


def test_sampled_queries_are_those_rows_of_the_exact_result():
    q, k = qk(t=50)
    exact = attention_entropy(q, k, is_causal=True)
    index = query_indices(50, 7)
    assert index.tolist() == [0, 8, 16, 24, 33, 41, 49]
    torch.testing.assert_close(attention_entropy(q, k, is_causal=True, max_queries=7), exact[:, :, index])
    chosen = torch.tensor([3, 3, 40])
    torch.testing.assert_close(attention_entropy(q, k, is_causal=True, queries=chosen), exact[:, :, chosen])
    assert torch.equal(attention_entropy(q, k, max_queries=50), attention_entropy(q, k))
    # A square grid of patches: the sample walks a diagonal and meets every column.
    assert (query_indices(64 * 64, 64) % 64).unique().numel() == 64


def test_gradients_match_finite_differences_with_masked_rows():
    q, k = qk(b=1, h=1, t=4, d=3, dtype=torch.float64)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: attention_entropy(a, b, mask=mask), (q, k))
    assert torch.autograd.gradcheck(attention_entropy, (q, k))
    mask[2] = False
    attention_entropy(q, k, mask=mask)[..., [0, 1, 3]].sum().backward()
    assert q.grad.isfinite().all()


def test_all_fields_from_the_logits_themselves():
    q, k = qk(dtype=torch.float64)
    logits = q @ k.mT / math.sqrt(8)
    mask = torch.rand(2, 4, 11, 11, generator=torch.Generator().manual_seed(5)) > 0.3
    for a, b in zip(
        attention_rows(q, k, mask=mask), rows_from_logits(logits.masked_fill(~mask, -math.inf)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    rows = attention_rows(q, k)
    torch.testing.assert_close(rows.first_key, logits.softmax(-1)[..., 0])
    centred = logits - logits.mean(-1, keepdim=True)
    torch.testing.assert_close(rows.logit_norm, centred.pow(2).sum(-1).sqrt())
    torch.testing.assert_close(row_logit_norm(logits), rows.logit_norm)


def test_a_nan_logit_shows():
    q, k = qk()
    q[0, 1, 2, 0] = math.nan
    assert attention_entropy(q, k).isnan().nonzero().tolist() == [[0, 1, 2]]
    logits = (q @ k.mT).masked_fill(torch.ones(11, 11, dtype=torch.bool).triu(1), -math.inf)
    assert rows_from_logits(logits).entropy.isnan().nonzero().tolist() == [[0, 1, 2]]


def test_normalized_entropy_leaves_out_rows_without_a_choice():
    keys = torch.tensor([0, 1, 2, 8])
    entropy = torch.tensor([math.nan, 0.0, math.log(2), math.log(2)])
    torch.testing.assert_close(
        normalized_entropy(entropy, keys), torch.tensor([math.nan, math.nan, 1.0, 1 / 3]), equal_nan=True
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 300),
    norm=st.floats(0, 60),
    kind=st.sampled_from(["gauss", "one", "two", "cauchy"]),
    seed=st.integers(0, 2**16),
)
def test_the_lower_bound_is_never_violated(n, norm, kind, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 1, 1, n, generator=g, dtype=torch.float64)
    if kind == "one":
        logits = torch.zeros_like(logits).index_fill(-1, torch.tensor([seed % n]), 1.0)
    if kind == "two":
        logits = logits.sign()
    if kind == "cauchy":
        logits = logits / torch.randn(logits.shape, generator=g, dtype=torch.float64)
    logits = logits - logits.mean()
    logits = logits * (norm / logits.norm().clamp(min=1e-9))
    rows = rows_from_logits(logits)
    bound = entropy_lower_bound(rows.logit_norm, rows.keys)
    assert (rows.entropy - bound).min() >= -1e-12 * math.log(n) - 1e-13


def test_the_lower_bound_is_attained_and_not_vacuous():
    for n in (2, 4, 50, 197):
        for s in (0.0, 0.5, 3.0, 12.0):
            logits = torch.full((1, 1, 1, n), -s / math.sqrt(n * (n - 1)), dtype=torch.float64)
            logits[..., 0] = s * math.sqrt((n - 1) / n)
            rows = rows_from_logits(logits)
            torch.testing.assert_close(rows.logit_norm.item(), s, rtol=1e-12, atol=1e-12)
            bound = entropy_lower_bound(rows.logit_norm, rows.keys)
            torch.testing.assert_close(bound, rows.entropy, rtol=1e-9, atol=1e-12)
    assert entropy_lower_bound(torch.tensor([2.0, 2.0, 1e30]), torch.tensor([0, 1, 9])).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q \(2, 3, 4\)"),
        ({"k": torch.zeros(2, 3, 5, 8)}, "multiple of key heads"),
        ({"k": torch.zeros(2, 4, 5, 7)}, "one dim"),
        ({"k": torch.zeros(2, 4, 0, 8)}, "nothing to attend"),
        ({"mask": torch.ones(3, 11, dtype=torch.bool)}, r"\(3, 11\) does not broadcast"),
        ({"mask": torch.ones(1, 1, 1, 1, 11, dtype=torch.bool)}, "does not broadcast"),
        ({"max_queries": 0}, "`max_queries` is 0"),
        ({"max_queries": 3, "queries": torch.tensor([1])}, "not both"),
    ],
)
def test_errors_name_what_is_wrong(arguments, match):
    q, k = qk()
    with pytest.raises(ValueError, match=match):
        attention_entropy(**({"q": q, "k": k} | arguments))
    with pytest.raises(TypeError, match=r"int64; expected bool"):
        attention_entropy(q, k, mask=torch.ones(11, 11, dtype=torch.long))
