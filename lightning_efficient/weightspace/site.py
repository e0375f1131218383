"""One parameter on its way between ``W`` and ``Ŵ``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_efficient.common.schema import TensorOf, check
from lightning_efficient.weightspace.transform import Transform, compute_dtype


def check_state(
    state: Mapping[str, Tensor], transform: type[Transform], weight: Tensor, where: str, error: type[ValueError]
) -> None:
    """Refuse what a file says of a weight if it is no state of its transform.

    Args:
        state: As :meth:`Transform.state_dict` returns it, with ``"raw"`` where ``W`` was kept.
        transform: The class.
        weight: As the file has it.
        where: Whose state it is, for the error.
        error: What to raise.

    Raises:
        ValueError: ``error``, with the field and what was expected.
    """
    own = {name: tensor for name, tensor in state.items() if name != "raw"}
    check(own, transform.state_schema(weight), where, error)
    if "raw" in state:
        check(state["raw"], TensorOf("floating", shape=tuple(weight.shape)), f"{where}, 'raw',", error)


class Site:
    """A parameter and the chain of transforms between its ``W`` and its ``Ŵ``.

    Args:
        name: Name of the parameter in the model.
        param: The parameter; it keeps its identity for good.
    """

    def __init__(self, name: str, param: nn.Parameter) -> None:
        self.name = name
        self.param = param
        self.chain: list[Transform] = []
        self.raw: Tensor | None = None
        self.pulled = False
        self._fresh: list[Transform] = []

    @property
    def narrow(self) -> bool:
        """Whether the parameter is too narrow to be rescaled back and forth without losing bits."""
        return self.param.dtype != compute_dtype(self.param.dtype)

    @property
    def keeps_raw(self) -> bool:
        """Whether ``W`` is kept beside the model because ``Ŵ`` does not determine it."""
        return self.narrow or not all(t.invertible for t in self.chain)

    def add(self, transform: Transform) -> None:
        """Give a transform its place in the chain; it does nothing before :meth:`start`."""
        self.chain = sorted([*self.chain, transform], key=lambda t: t.order)
        self._fresh.append(transform)

    def load(self, transform: Transform, state: Mapping[str, Tensor]) -> None:
        """Give a transform of the chain a saved state, ``"raw"`` among it if ``W`` was kept: the parameter is ``Ŵ``."""
        own = dict(state)
        raw = own.pop("raw", None)
        try:
            if raw is not None and raw.shape != self.param.shape:
                raise ValueError(f"raw weights of shape {tuple(raw.shape)} for {tuple(self.param.shape)}.")
            transform.load_state_dict(own, self.param.detach())
        except ValueError as error:
            raise ValueError(f"the saved state of {self.name!r} does not fit: {error}") from error
        self._fresh = [t for t in self._fresh if t is not transform]
        if raw is not None:
            self.raw = raw.to(self.param, copy=True)

    def start(self) -> bool:
        """Choose the state of every transform without one, on its input; the parameter becomes ``Ŵ``.

        Returns:
            False if the parameter cannot have come from the saved states, which then were derived anew from it.
        """
        fresh, self._fresh, chain = self._fresh, [], self.chain
        if not self.keeps_raw:
            self.raw = None  # saved from narrower weights
        # The weights are the output of the saved transforms alone: judge those by themselves, go back to W through
        # them, and only then forward through the whole chain, in which new ones may stand in the middle.
        self.chain = [t for t in chain if t not in fresh]
        if not (fitted := self._fits()):
            self._rebase()
        if not fresh:
            return fitted
        self.pull(None)
        self.chain = chain
        work = self._work(self.param.data)
        for transform in chain:
            if transform in fresh:
                transform.start(work)
            transform.push(work)
        self._settle(work)
        return fitted

    def pull(self, grad: Tensor | None) -> None:
        """``Ŵ → W`` in place, and ``∂L/∂Ŵ → ∂L/∂W``."""
        weight = self._work(self.param.data)
        self._pull(weight, grad)
        if self.raw is not None:  # to the bit: W divided out of a few bits, or of zeros, would be another one
            self.param.data.copy_(self.raw)
        elif self.keeps_raw:  # the work was done on a copy
            self.param.data.copy_(weight)
        self.pulled = True

    def pull_gradient(self, grad: Tensor) -> None:
        """``∂L/∂Ŵ → ∂L/∂W``, without rounding a single bit of the parameter."""
        self._pull(self.param.data.to(compute_dtype(self.param.dtype), copy=True), grad)

    def _pull(self, weight: Tensor, grad: Tensor | None) -> None:
        gradient = None if grad is None else self._work(grad)
        for transform in reversed(self.chain):
            transform.pull(weight, gradient)
        if grad is not None and gradient is not None and gradient is not grad:
            grad.copy_(gradient)

    def push(self, advance: bool, follow: bool = False) -> None:
        """``W → Ŵ`` in place, after advancing every transform's state, or having it follow a changed ``W``."""
        work = self._work(self.param.data)
        for transform in self.chain:
            if advance:
                transform.advance(work)
            elif follow:
                transform.follow(work)
            transform.push(work)
        self._settle(work)

    def _settle(self, transformed: Tensor) -> None:
        if self.keeps_raw:
            self.raw = self.param.data.clone() if self.raw is None else self.raw.copy_(self.param.data)
            self.param.data.copy_(transformed)
        self.pulled = False

    def _work(self, tensor: Tensor) -> Tensor:
        """The tensor itself where it can be worked on in place, else a copy in the compute dtype."""
        if self.narrow:
            return tensor.to(compute_dtype(tensor.dtype))
        return tensor.clone() if not all(t.invertible for t in self.chain) else tensor

    @property
    def _tolerance(self) -> float:
        # Above what another device or fewer bits in a file round; weights of another run or an average are off by more.
        return max(1e-3, 8 * torch.finfo(self.param.dtype).eps)

    def _fits(self) -> bool:
        """Whether the present weights can have come from the present state of the chain."""
        dtype = compute_dtype(self.param.dtype)
        work = self.param.detach().to(dtype, copy=True)
        if self.raw is not None:
            made = self.raw.to(dtype, copy=True)
            for transform in self.chain:
                transform.push(made)
            # Another device may round differently.
            info = torch.finfo(self.param.dtype)
            made = made.to(self.param.dtype).to(dtype)
            return torch.allclose(made, work, rtol=2 * info.eps, atol=2 * info.eps * info.smallest_normal)
        for transform in reversed(self.chain):  # from the outside in: each judges what it has put out itself
            if not transform.fits(work, self._tolerance):
                return False
            transform.pull(work, None)
        return True

    def _rebase(self) -> None:
        """Take the present weights for the network's, whatever the state was; the function stays as it is."""
        work = self.param.detach().to(compute_dtype(self.param.dtype), copy=True)
        for transform in reversed(self.chain):
            transform.rebase(work)
            transform.pull(work, None)
        if self.keeps_raw:
            self.raw = work.to(self.param.dtype)
