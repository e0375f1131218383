"""Whether adapters also train right: their derivative by the temperature, against a difference of two forwards.

An adapter scales what runs inside one forward. Activation checkpointing *inside* that forward repeats a part of it in
backward, when the adapter is over, and a hand-written ``autograd.Function`` has a backward of its own: the output is
right then and the gradient is not, without an error. (Checkpointing of the module or of what holds it is fine: the
adapter is repeated as well.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.attention.adapter import install
from lightning_efficient.attention.owners import ROOT
from lightning_efficient.attention.sites import perturbed
from lightning_efficient.attention.temper import Law, without_blind
from lightning_efficient.common.match import modules_by_name
from lightning_efficient.common.nests import mapped, tensors_behind
from lightning_efficient.common.running import Float64, float64_copy, forget
from lightning_efficient.folding.probes import Probe

_STEP = 1e-2  # of log tau; the error of a central difference is its square
# Of the output, whose rounding a difference divides by the step: many models compute their softmax in float32.
_NOISE = 1e-5


@torch.inference_mode(False)
@torch.enable_grad()
def wrong_gradients(model: nn.Module, probe: Probe, sites: Sequence[str]) -> dict[str, str]:
    """Adapters whose scaled logits autograd does not differentiate, in the mode that the model is in.

    Args:
        model: Not touched.
        probe: Its arguments.
        sites: Those with an adapter.

    Returns:
        Site -> what is wrong.
    """
    twin = perturbed(float64_copy(model))
    for module, theirs in zip(twin.modules(), model.modules(), strict=True):
        module.training = theirs.training
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    modules = modules_by_name(twin)
    taus = {site: nn.Parameter(torch.tensor([-0.5], dtype=torch.float64)) for site in sites}
    for site, log_tau in taus.items():
        install(twin, modules["" if site == ROOT else site], Law(log_tau=log_tau))
    try:
        with _Checked():  # also while checkpointing repeats a forward, which `Tensor.backward` would switch it off for
            total = _weighted(twin, probe)
            torch.autograd.backward([total])
    except Exception as why:  # torch notices that it repeats something else
        text = str(why).strip().splitlines() or [""]
        return dict.fromkeys(sites, f"backward fails: {type(why).__name__}: {text[0]}")
    wrong = {}
    for site, log_tau in taus.items():
        found = 0.0 if log_tau.grad is None else float(log_tau.grad)
        ends = []
        for shift in (_STEP, -_STEP):
            log_tau.data.add_(shift)
            ends.append(_weighted(twin, probe).detach())
            log_tau.data.sub_(shift)
        expected = float(ends[0] - ends[1]) / (2 * _STEP)
        noise = (1e-9 if log_tau.grad is None else _NOISE) * float(total.detach().abs())
        if not abs(found - expected) <= 1e-2 * abs(expected) + noise:
            wrong[site] = f"its derivative by log tau is {expected:.3g}, and autograd finds {found:.3g}"
    return wrong


class _Checked(Float64):
    """In float64, queries that see no key left out."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The call, without them."""
        args, kwargs, sees = without_blind(func, args, kwargs or {})
        out = super().__torch_function__(func, types, args, kwargs)
        return out if sees is None else torch.where(sees, out, 0.0)


def _weighted(twin: nn.Module, probe: Probe) -> Tensor:
    """A number that depends on all outputs; the same random numbers are drawn every time."""

    def double(value: Any) -> Any:
        value = value.detach().clone() if isinstance(value, Tensor) else value
        return value.double().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value

    forget(twin)
    with torch.random.fork_rng(), _Checked():
        torch.manual_seed(0)
        result = twin(*mapped(probe.args, double), **mapped(probe.kwargs, double))
    random = torch.Generator().manual_seed(1)
    parts = []
    for tensor in (t for t in tensors_behind(result) if t.is_floating_point()):
        weights = torch.randn(tensor.shape, generator=random, dtype=torch.float64).to(tensor.device)
        parts.append((weights * tensor.double()).sum())
    return torch.stack(parts).sum()
