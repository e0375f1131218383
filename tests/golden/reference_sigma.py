"""sigmaReparam as an autograd parametrization, written from the published formula: the oracle of the boundary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Sigma(nn.Module):
    """``W -> gamma W / sigma``, sigma = uᵀ W v with u and v constants of the gradient; rows cut into equal parts."""

    def __init__(self, weight: Tensor, parts: int = 1, init: str = "preserve") -> None:
        super().__init__()
        self.parts = parts
        chunks = [c.flatten(1) for c in weight.detach().chunk(parts)]
        svds = [torch.linalg.svd(c, full_matrices=False) for c in chunks]
        self.register_buffer("v", torch.stack([s.Vh[0] for s in svds]))
        self.register_buffer("u", torch.stack([s.U[:, 0] for s in svds]))
        sigma = torch.stack([s.S[0] for s in svds])
        self.gamma = nn.Parameter(sigma.clone() if init == "preserve" else torch.ones_like(sigma))

    def forward(self, weight: Tensor) -> Tensor:
        out = []
        for i, chunk in enumerate(weight.chunk(self.parts)):
            sigma = self.u[i] @ chunk.flatten(1) @ self.v[i]
            out.append(chunk * (self.gamma[i] / sigma))
        return torch.cat(out)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        for i, chunk in enumerate(weight.chunk(self.parts)):
            matrix = chunk.flatten(1)
            u = matrix @ self.v[i]
            self.u[i] = u / u.norm()
            v = matrix.t() @ self.u[i]
            self.v[i] = v / v.norm()


def parametrized(model: nn.Module, names: dict[str, int], init: str = "preserve") -> list[tuple[nn.Module, str]]:
    """Register the oracle on ``{parameter name: parts}``; returns what :func:`iterate` needs."""
    sites = []
    for name, parts in names.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        parametrize.register_parametrization(
            module, attribute, Sigma(getattr(module, attribute), parts, init), unsafe=True
        )
        sites.append((module, attribute))
    return sites


def iterate(sites: list[tuple[nn.Module, str]]) -> None:
    """One power iteration of every site, after an optimizer step."""
    for module, attribute in sites:
        plist = module.parametrizations[attribute]
        plist[0].iterate(plist.original)


def raw_and_gains(sites: list[tuple[nn.Module, str]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    plists = [module.parametrizations[attribute] for module, attribute in sites]
    return [p.original for p in plists], [p[0].gamma for p in plists]
