"""``Ŵ = γ W / σ(W)`` on the blocks of one parameter: sigmaReparam's transform (Zhai et al., arXiv 2303.06296).

``σ`` is estimated by power iteration with singular vectors that are constants of the gradient, as in the paper:
with ``c = γ / σ`` and ``a = ⟨∂L/∂Ŵ, W⟩ / σ`` the chain rule gives ``∂L/∂γ = a`` and ``∂L/∂W = c (∂L/∂Ŵ - a u vᵀ)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_efficient.common.schema import MapOf, Schema, Such, TensorOf, Text
from lightning_efficient.weightspace.transform import Block, Transform, as_matrices, as_matrix, compute_dtype

# Up to this many rows or columns the eigenvectors of the Gram matrix are cheaper than Lanczos steps.
_EXACT_UP_TO = 256
_LANCZOS_STEPS = 48
# A gain that crosses zero must not erase W: |Ŵ| >= 1e-12 |W| keeps the division in `pull` exact to rounding.
_SMALLEST_SCALE = 1e-12


def leading_singular_triplet(matrix: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value of a matrix and its vectors.

    Small matrices are solved exactly (eigenvectors of the smaller Gram matrix, in float64); larger ones by
    Golub-Kahan-Lanczos bidiagonalization with full reorthogonalization, from a start vector drawn from an own
    generator, so that the global random state is left alone.

    Args:
        matrix: Real matrix of shape ``(m, n)``.
        seed: Seed of the start vector.

    Returns:
        ``(u, sigma, v)`` of shapes ``(m,)``, ``()`` and ``(n,)`` with ``sigma = uᵀ matrix v``, in the compute dtype.
    """
    work = matrix.detach().to(compute_dtype(matrix.dtype))
    right = _leading_right(work, seed)
    return _power_step(work, right)


def _leading_right(matrix: Tensor, seed: int) -> Tensor:
    """An accurate leading right singular vector, shape ``(n,)``."""
    m, n = matrix.shape
    if min(m, n) <= _EXACT_UP_TO:
        wide = matrix.double() if n <= m else matrix.double().t()
        vector = torch.linalg.eigh(wide.t() @ wide).eigenvectors[:, -1].to(matrix.dtype)
        return vector if n <= m else _normalize(torch.mv(matrix.t(), vector))[0]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, generator=generator, dtype=matrix.dtype).to(matrix.device)
    right = [_normalize(start)[0]]
    left: list[Tensor] = []
    alphas, betas = [], []
    for _ in range(min(_LANCZOS_STEPS, m, n)):
        u, alpha = _normalize(_orthogonalize(torch.mv(matrix, right[-1]), left))
        left.append(u)
        alphas.append(alpha)
        v, beta = _normalize(_orthogonalize(torch.mv(matrix.t(), u), right))
        right.append(v)
        betas.append(beta)
    k = len(alphas)
    bidiagonal = torch.diag(torch.stack(alphas)) + torch.diag(torch.stack(betas[: k - 1]), 1)
    vectors = torch.linalg.svd(bidiagonal).Vh[0]
    return _normalize(torch.stack(right[:k], dim=1) @ vectors)[0]


def _orthogonalize(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    if not basis:
        return vector
    q = torch.stack(tuple(basis), dim=1)
    vector = vector - q @ (q.t() @ vector)
    return vector - q @ (q.t() @ vector)  # twice is enough (Kahan)


def _normalize(vector: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(vector)
    return vector / norm.clamp_min(torch.finfo(vector.dtype).tiny), norm


def _power_step(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One power iteration: ``u = W v / |W v|``, ``v' = Wᵀ u / |Wᵀ u|``; then ``uᵀ W v' = |Wᵀ u|`` costs nothing."""
    u, _ = _normalize(torch.mv(matrix, right))
    v, sigma = _normalize(torch.mv(matrix.t(), u))
    return u, sigma, v


def _power_steps(stack: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a stack ``(matrices, m, n)`` at once."""
    u = nn.functional.normalize(torch.einsum("kmn,kn->km", stack, right), dim=1, eps=torch.finfo(stack.dtype).tiny)
    v = torch.einsum("kmn,km->kn", stack, u)
    sigma = torch.linalg.vector_norm(v, dim=1)
    return u, sigma, v / sigma.clamp_min(torch.finfo(stack.dtype).tiny).unsqueeze(1)


class SpectralTransform(Transform):
    """``Ŵ = γ W / σ(W)`` for each matrix of a parameter.

    Args:
        blocks: The matrices inside the parameter, each with its own gain; or one block that is a stack of them.
        init: ``"preserve"`` starts with ``γ = σ(W)``, which leaves the function unchanged; ``"one"`` starts with
            ``γ = 1``, the paper's pseudo-code.
        learnable: Whether ``γ`` is trained; False is plain spectral normalization at the initial gain.
        monitor: Track ``σ`` only; weights and gradients pass through untouched.
    """

    kind = "spectral"
    order = 20

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        init: str = "preserve",
        learnable: bool = True,
        monitor: bool = False,
    ) -> None:
        self.blocks = tuple(blocks)
        self.init = init
        self.monitor = monitor
        self.stack = any(block.stack for block in self.blocks)
        if self.stack and len(self.blocks) != 1:
            raise ValueError(f"a stack of matrices is the whole of its parameter; got {self.blocks}.")
        count = self.blocks[0].length if self.stack else len(self.blocks)
        self.gain = nn.Parameter(torch.ones(count), requires_grad=learnable and not monitor)
        self.sigma = torch.ones(count)
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self._scale = torch.ones(count)

    @property
    def theta(self) -> nn.Parameter | None:
        """The gains ``γ``, one a matrix, or None when they are not trained."""
        return self.gain if self.gain.requires_grad else None

    def start(self, weight: Tensor) -> None:
        """Accurate singular vectors of every block, and the first gain."""
        triplets = [leading_singular_triplet(matrix) for matrix in self._matrices(weight)]
        self.left = [u for u, _, _ in triplets]
        self.right = [v for _, _, v in triplets]
        self.sigma = torch.stack([sigma for _, sigma, _ in triplets])
        self.gain.data = self.sigma.clone() if self.init == "preserve" else torch.ones_like(self.sigma)
        self._rescale()

    def pull(self, weight: Tensor, grad: Tensor | None) -> None:
        """Divide by ``c``; project the gradient; leave ``∂L/∂γ`` in ``gain.grad``."""
        if self.monitor:
            return
        if self.stack:
            self._pull_stack(weight, grad)
            return
        if grad is not None:
            rates = []
            for block, c, sigma, u, v in zip(self.blocks, self._scale, self.sigma, self.left, self.right, strict=True):
                g, w = block.of(grad), block.of(weight)
                a = torch.dot(g.reshape(-1), w.reshape(-1)) / (c * sigma)
                column = (a * u).view(-1, *[1] * (g.ndim - 1))
                # Not `addr`: its scalars would have to leave the device.
                g.addcmul_(column, v.view(1, *g.shape[1:]), value=-1).mul_(c)
                rates.append(a)
            if self.theta is not None:
                self.theta.grad = torch.stack(rates)
        for block, c in zip(self.blocks, self._scale, strict=True):
            block.of(weight).div_(c)

    def _pull_stack(self, weight: Tensor, grad: Tensor | None) -> None:
        c = self._scale.view(-1, 1, 1)
        if grad is not None:
            rates = (grad * weight).sum((1, 2)) / (self._scale * self.sigma)
            u, v = torch.stack(self.left), torch.stack(self.right)
            grad.addcmul_((rates[:, None] * u).unsqueeze(2), v.unsqueeze(1), value=-1).mul_(c)
            if self.theta is not None:
                self.theta.grad = rates
        weight.div_(c)

    def _matrices(self, weight: Tensor) -> list[Tensor]:
        return [matrix for block in self.blocks for matrix in as_matrices(block, weight)]

    def advance(self, weight: Tensor) -> None:
        """One power iteration on the new weights."""
        if self.stack:
            u, self.sigma, v = _power_steps(weight, torch.stack(self.right))
            self.left, self.right = list(u), list(v)
            self._rescale()
            return
        for i, block in enumerate(self.blocks):
            self.left[i], self.sigma[i], self.right[i] = _power_step(as_matrix(block.of(weight)), self.right[i])
        self._rescale()

    def follow(self, weight: Tensor) -> None:
        """One power iteration on what is left."""
        self.advance(weight)

    def push(self, weight: Tensor) -> None:
        """Multiply by ``c = γ / σ``."""
        self._rescale()
        if self.monitor:
            return
        if self.stack:
            weight.mul_(self._scale.view(-1, 1, 1))
            return
        for block, c in zip(self.blocks, self._scale, strict=True):
            block.of(weight).mul_(c)

    def fits(self, weight: Tensor, tolerance: float) -> bool:
        """``uᵀ Ŵ v`` is ``γ`` by construction; weights from elsewhere miss it, as those of no norm do."""
        if self.monitor:
            return True
        if not bool((self.sigma > 0).all()):
            return False
        found = torch.stack(
            [
                torch.dot(u, torch.mv(matrix, v))
                for matrix, u, v in zip(self._matrices(weight), self.left, self.right, strict=True)
            ]
        )
        return bool(torch.allclose(found, self.gain.detach(), rtol=tolerance, atol=1e-6))

    def rebase(self, weight: Tensor) -> None:
        """``γ = σ(Ŵ)`` and ``W = Ŵ``."""
        self.init = "preserve"
        self.start(weight)

    @classmethod
    def state_schema(cls, weight: Tensor) -> Schema:
        """Finite real vectors; how many, and how long, depends on the blocks."""
        vectors = MapOf(Text(), TensorOf("floating", ndim=1, finite=True))
        return Such(vectors, lambda state: bool((state.get("sigma", torch.ones(1)) >= 0).all()), "no 'sigma' below 0")

    def state_dict(self) -> dict[str, Tensor]:
        """``gain`` and ``sigma`` of shape ``(matrices,)``, and ``left.i``/``right.i`` of each matrix."""
        state = {"gain": self.gain.detach().clone(), "sigma": self.sigma.clone()}
        for i, (u, v) in enumerate(zip(self.left, self.right, strict=True)):
            state |= {f"left.{i}": u.clone(), f"right.{i}": v.clone()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take over gains, norms and vectors; the matrices must be of the same number and shapes."""
        matrices = self._matrices(weight)
        expected = {"gain": (len(matrices),), "sigma": (len(matrices),)}
        for i, matrix in enumerate(matrices):
            expected |= {f"left.{i}": (matrix.shape[0],), f"right.{i}": (matrix[0].numel(),)}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            raise ValueError(
                f"a spectral state of {len(matrices)} block(s) holds {expected}; got {found}. "
                "Was `qkv` or the model changed since it was saved?"
            )
        own = {k: v.to(weight.device, compute_dtype(weight.dtype), copy=True) for k, v in state.items()}
        self.gain.data, self.sigma = own["gain"], own["sigma"]
        self.left = [own[f"left.{i}"] for i in range(len(matrices))]
        self.right = [own[f"right.{i}"] for i in range(len(matrices))]
        self._rescale()

    def _rescale(self) -> None:
        sigma = self.sigma.clamp_min(torch.finfo(self.sigma.dtype).tiny)
        c = self.gain.detach() / sigma
        floor = torch.copysign(torch.full_like(c, _SMALLEST_SCALE), c)
        self._scale = torch.where(c.abs() < _SMALLEST_SCALE, floor, c)
