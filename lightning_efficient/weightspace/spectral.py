"""``Ŵ = γ W / σ(W)`` on the blocks of one parameter: sigmaReparam's transform (Zhai et al., arXiv 2303.06296).

``σ`` is estimated by power iteration with singular vectors that are constants of the gradient, as in the paper:
with ``c = γ / σ`` and ``a = ⟨∂L/∂Ŵ, W⟩ / σ`` the chain rule gives ``∂L/∂γ = a`` and ``∂L/∂W = c (∂L/∂Ŵ - a u vᵀ)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.common.schema import MapOf, Schema, Such, TensorOf, Text
from lightning_efficient.weightspace.block import Block, as_matrices
from lightning_efficient.weightspace.gain import Gain
from lightning_efficient.weightspace.layout import Groups, Layout
from lightning_efficient.weightspace.sums import Sums, summed
from lightning_efficient.weightspace.transform import Transform, compute_dtype

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
    k = min(_LANCZOS_STEPS, m, n)
    left, right = matrix.new_empty(k, m), matrix.new_empty(k + 1, n)
    alphas, betas = matrix.new_empty(k), matrix.new_empty(k)
    right[0] = _normalize(start)[0]
    for i in range(k):
        left[i], alphas[i] = _normalize(_orthogonalize(torch.mv(matrix, right[i]), left[:i]))
        right[i + 1], betas[i] = _normalize(_orthogonalize(torch.mv(matrix.t(), left[i]), right[: i + 1]))
    bidiagonal = torch.diag(alphas) + torch.diag(betas[:-1], 1)
    return _normalize(torch.linalg.svd(bidiagonal).Vh[0] @ right[:k])[0]


def _orthogonalize(vector: Tensor, basis: Tensor) -> Tensor:
    """``vector`` without what it has along the orthonormal rows of ``basis``."""
    for _ in range(2):  # twice is enough (Kahan)
        vector = torch.addmv(vector, basis.t(), torch.mv(basis, vector), alpha=-1)
    return vector


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
        log_gain: Train ``log γ`` instead of ``γ``.
        gain_lr: Factor on the learning rate of the gains.
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
        log_gain: bool = False,
        gain_lr: float = 1.0,
        monitor: bool = False,
    ) -> None:
        self.blocks = self._here = tuple(blocks)
        self.init = init
        self.monitor = monitor
        self.stack = any(block.stack for block in self.blocks)
        if self.stack and len(self.blocks) != 1:
            raise ValueError(f"a stack of matrices is the whole of its parameter; got {self.blocks}.")
        count = self.blocks[0].length if self.stack else len(self.blocks)
        self._gain = Gain(count, log_gain, gain_lr, learnable and not monitor)
        self.sigma = torch.ones(count)
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self._scale = torch.ones(count)
        self._scales = self._scale.unbind()

    def place(self, layout: Layout) -> None:
        """Work on the parts of the matrices that are here.

        Raises:
            ValueError: The parameter is cut inside a convolution's kernel, or is a stack of matrices that is cut.
        """
        super().place(layout)
        if layout.groups and (self.stack or max(layout.groups) > 1):
            what = "a stack of matrices" if self.stack else "cut along an axis of its kernel"
            raise ValueError(f"a parameter of shape {layout.shape} is {what}, and cut over processes: exclude it.")
        self._here = tuple(layout.block(block) for block in self.blocks)

    @property
    def theta(self) -> nn.Parameter | None:
        """``γ`` or ``log γ``, one a matrix, or None when the gains are not trained."""
        parameter = self._gain.parameter
        return parameter if parameter.requires_grad else None

    @property
    def gain(self) -> Tensor:
        """The gains ``γ``, one a matrix."""
        return self._gain.value

    def start(self, weight: Tensor) -> None:
        """Accurate singular vectors of every block, and the first gain, from the whole matrix."""
        whole = self.layout.gather(weight)
        triplets = [leading_singular_triplet(m) for block in self.blocks for m in as_matrices(block, whole)]
        self.left = [self._part(i, u, 0).clone() for i, (u, _, _) in enumerate(triplets)]
        self.right = [self._part(i, v, 1).clone() for i, (_, _, v) in enumerate(triplets)]
        self.sigma = torch.stack([sigma for _, sigma, _ in triplets])
        self._gain.set(self.sigma if self.init == "preserve" else torch.ones_like(self.sigma))
        self._rescale()

    def _part(self, i: int, vector: Tensor, axis: int) -> Tensor:
        """What is here of a vector over the rows (0) or columns (1) of matrix ``i``, a view."""
        if not self.layout.groups:
            return vector
        start, length = self.layout.within(self.blocks[i], axis)
        rest = math.prod(self.layout.shape[2:]) if axis else 1
        return vector.narrow(0, start * rest if length else 0, length * rest)

    @property
    def _rows(self) -> Groups:
        """The processes that share out the rows."""
        return self.layout.groups.get(0, ())

    @property
    def _columns(self) -> Groups:
        return self.layout.groups.get(1, ())

    @summed
    def pull(self, weight: Tensor, grad: Tensor | None) -> Sums[None]:
        """Divide by ``c``; project the gradient; leave that of the gains in ``theta.grad``."""
        if self.monitor:
            return
        self._gain.begin()
        if self.stack:
            self._pull_stack(weight, grad)
            return
        if grad is not None:
            dots = [torch.dot(block.of(grad).reshape(-1), block.of(weight).reshape(-1)) for block in self._here]
            (products,) = yield self.layout.everyone, [torch.stack(dots)]
            rates = self._rates(products)
            parts = zip(self._here, self._scales, rates.unbind(), self.left, self.right, strict=True)
            for block, c, a, u, v in parts:
                g = block.of(grad)
                if g.numel():
                    column = (a * u).view(-1, *[1] * (g.ndim - 1))
                    # Not `addr`: its scalars would have to leave the device.
                    g.addcmul_(column, v.view(1, *g.shape[1:]), value=-1).mul_(c)
        for block, c in zip(self._here, self._scales, strict=True):
            block.of(weight).div_(c)

    def _rates(self, products: Tensor) -> Tensor:
        """``∂L/∂γ`` from ``⟨∂L/∂Ŵ, Ŵ⟩``; leaves the gradient of the gains' parameter."""
        rates = products / (self._scale * self.sigma)
        self._gain.pull(rates, products)
        return rates

    def _pull_stack(self, weight: Tensor, grad: Tensor | None) -> None:
        c = self._scale.view(-1, 1, 1)
        if grad is not None:
            rates = self._rates((grad * weight).sum((1, 2)))
            u, v = torch.stack(self.left), torch.stack(self.right)
            grad.addcmul_((rates[:, None] * u).unsqueeze(2), v.unsqueeze(1), value=-1).mul_(c)
        weight.div_(c)

    def _matrices(self, weight: Tensor) -> list[Tensor]:
        return [matrix for block in self._here for matrix in as_matrices(block, weight)]

    @summed
    def advance(self, weight: Tensor) -> Sums[None]:
        """The gains' whole step, and one power iteration on the new weights."""
        self._gain.end()
        if self.stack:
            u, self.sigma, v = _power_steps(weight, torch.stack(self.right))
            self.left, self.right = list(u), list(v)
        else:
            yield from self._power_step(self._matrices(weight))

    def _power_step(self, matrices: list[Tensor]) -> Sums[None]:
        """``u = W v / |W v|`` and ``v' = Wᵀ u / |Wᵀ u|``; then ``uᵀ W v' = |Wᵀ u|`` costs nothing.

        Of parts of ``W``, ``W v`` is a sum over those of the columns, and ``Wᵀ u`` one over those of the rows, which
        brings ``|W v|`` along.
        """
        tiny = torch.finfo(self.sigma.dtype).tiny
        lefts = [torch.mv(matrix, v) for matrix, v in zip(matrices, self.right, strict=True)]
        if self._columns:
            lefts = yield self._columns, lefts
        if not self._rows:
            self.left = [_normalize(left)[0] for left in lefts]
            rights = [torch.mv(matrix.t(), u) for matrix, u in zip(matrices, self.left, strict=True)]
        else:
            # The last norm makes them about 1 long, so that nothing over- or underflows.
            lefts = [left / sigma for left, sigma in zip(lefts, self.sigma.clamp_min(tiny), strict=True)]
            rights = [torch.mv(matrix.t(), left) for matrix, left in zip(matrices, lefts, strict=True)]
            squares = torch.stack([left.dot(left) for left in lefts])
            *rights, squares = yield self._rows, [*rights, squares]
            lengths = squares.sqrt().clamp_min(tiny)
            self.left = [left / length for left, length in zip(lefts, lengths, strict=True)]
            rights = [right / length for right, length in zip(rights, lengths, strict=True)]
        if self._columns:
            (squares,) = yield self._columns, [torch.stack([right.dot(right) for right in rights])]
            self.sigma = squares.sqrt()
            self.right = [right / norm for right, norm in zip(rights, self.sigma.clamp_min(tiny), strict=True)]
        else:
            pairs = [_normalize(right) for right in rights]
            self.right, self.sigma = [v for v, _ in pairs], torch.stack([norm for _, norm in pairs])

    def follow(self, weight: Tensor) -> Any:
        """One power iteration on what is left."""
        return self.advance(weight)

    def push(self, weight: Tensor) -> None:
        """Multiply by ``c = γ / σ``."""
        self._rescale()
        if self.monitor:
            return
        if self.stack:
            weight.mul_(self._scale.view(-1, 1, 1))
            return
        for block, c in zip(self._here, self._scales, strict=True):
            block.of(weight).mul_(c)

    @summed
    def fits(self, weight: Tensor, tolerance: float) -> Sums[bool]:
        """``uᵀ Ŵ v`` is ``γ`` by construction; weights from elsewhere miss it, as those of no norm do."""
        if self.monitor:
            return True
        if not bool((self.sigma > 0).all()):
            return False
        parts = zip(self._matrices(weight), self.left, self.right, strict=True)
        (found,) = yield self.layout.everyone, [torch.stack([torch.dot(u, torch.mv(m, v)) for m, u, v in parts])]
        return bool(torch.allclose(found, self.gain, rtol=tolerance, atol=1e-6))

    def rebase(self, weight: Tensor) -> None:
        """``γ = σ(Ŵ)`` and ``W = Ŵ``."""
        self.init = "preserve"
        self.start(weight)

    @classmethod
    def state_schema(cls, weight: Tensor) -> Schema:
        """Finite real vectors; how many, and how long, depends on the blocks."""
        vectors = MapOf(Text(), TensorOf("floating", ndim=1, finite=True))
        return Such(vectors, lambda state: bool((state.get("sigma", torch.ones(1)) >= 0).all()), "no 'sigma' below 0")

    @summed
    def state_dict(self) -> Sums[dict[str, Tensor]]:
        """``gain`` (or ``log_gain``) and ``sigma`` of shape ``(matrices,)``, ``left.i``/``right.i`` of each matrix."""
        state = self._gain.state_dict() | {"sigma": self.sigma.clone()}
        lefts, rights = [u.clone() for u in self.left], [v.clone() for v in self.right]
        # Every process puts its part into zeros, and these are added up.
        if self._rows:
            lefts = yield self._rows, [self._whole(i, u, 0) for i, u in enumerate(lefts)]
        if self._columns:
            rights = yield self._columns, [self._whole(i, v, 1) for i, v in enumerate(rights)]
        for i, (u, v) in enumerate(zip(lefts, rights, strict=True)):
            state |= {f"left.{i}": u, f"right.{i}": v}
        return state

    def _whole(self, i: int, part: Tensor, axis: int) -> Tensor:
        whole = part.new_zeros(self._lengths()[i][axis])
        self._part(i, whole, axis).copy_(part)
        return whole

    def _lengths(self) -> list[tuple[int, int]]:
        """Rows and columns of every matrix, wherever its parts are."""
        found = []
        for block in self.blocks:
            sizes = [block.length if axis == block.dim else size for axis, size in enumerate(self.layout.shape)]
            if block.stack:
                found += [(sizes[1], sizes[2])] * sizes[0]
            else:
                found.append((sizes[0], math.prod(sizes[1:])))
        return found

    def load_state_dict(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take over gains, norms and vectors; the matrices must be of the same number and shapes."""
        if not self.layout.shape:
            self.place(Layout.find("a weight", weight))
        lengths = self._lengths()
        gain = "log_gain" if "log_gain" in state else "gain"
        expected: dict[str, tuple[int, ...]] = {gain: (len(lengths),), "sigma": (len(lengths),)}
        for i, (rows, columns) in enumerate(lengths):
            expected |= {f"left.{i}": (rows,), f"right.{i}": (columns,)}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            raise ValueError(
                f"a spectral state of {len(lengths)} block(s) holds {expected}; got {found}. "
                "Was `qkv` or the model changed since it was saved?"
            )
        own = {k: v.to(weight.device, compute_dtype(weight.dtype), copy=True) for k, v in state.items()}
        self._gain.load({gain: own[gain]})
        self.sigma = own["sigma"]
        self.left = [self._part(i, own[f"left.{i}"], 0) for i in range(len(lengths))]
        self.right = [self._part(i, own[f"right.{i}"], 1) for i in range(len(lengths))]
        self._rescale()

    def _rescale(self) -> None:
        sigma = self.sigma.clamp_min(torch.finfo(self.sigma.dtype).tiny)
        c = self.gain / sigma
        self._scale = torch.copysign(c.abs().clamp_min_(_SMALLEST_SCALE), c)
        self._scales = self._scale.unbind()
