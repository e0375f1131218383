"""One parameter on its way between ``W`` and ``Ŵ``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_efficient.common.schema import MapOf, TensorOf, Text, check
from lightning_efficient.common.shards import local
from lightning_efficient.weightspace.layout import Layout
from lightning_efficient.weightspace.memory import Memory, pack, unpack, without_memory
from lightning_efficient.weightspace.sums import Sums, steps, summed
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
    own = {name: tensor for name, tensor in without_memory(state).items() if name != "raw"}
    check(own, transform.state_schema(weight), where, error)
    check(dict(state), MapOf(Text(), TensorOf(finite=True)), where, error)
    if "raw" in state:
        check(state["raw"], TensorOf("floating", shape=tuple(weight.shape)), f"{where}, 'raw',", error)


class Site:
    """A parameter and the chain of transforms between its ``W`` and its ``Ŵ``.

    Args:
        name: Name of the parameter in the model.
        param: The parameter; it keeps its identity for good.
        memory: What optimizers remember of the transforms' own parameters while these are not with them.
    """

    def __init__(self, name: str, param: nn.Parameter, memory: Memory | None = None) -> None:
        self.name = name
        self.param = param
        self.layout = Layout.find(name, param)
        self.memory: Memory = {} if memory is None else memory
        self.chain: list[Transform] = []
        self.raw: Tensor | None = None
        self.pulled = False
        self._fresh: list[Transform] = []

    @property
    def weight(self) -> Tensor:
        """What is here of the parameter, to be written to."""
        return local(self.param)

    @property
    def gradient(self) -> Tensor | None:
        """What is here of the parameter's gradient, to be written to; a sum that is still to be made is made."""
        grad = self.param.grad
        if isinstance(grad, DTensor) and self.layout.of is not None and grad.placements != self.layout.of.placements:
            grad = self.param.grad = grad.redistribute(placements=self.layout.of.placements)
        return None if grad is None else local(grad)

    @property
    def narrow(self) -> bool:
        """Whether the parameter is too narrow to be rescaled back and forth without losing bits."""
        return self.param.dtype != compute_dtype(self.param.dtype)

    @property
    def keeps_raw(self) -> bool:
        """Whether ``W`` is kept beside the model because ``Ŵ`` does not determine it."""
        return self.narrow or not all(t.invertible for t in self.chain)

    def add(self, transform: Transform) -> None:
        """Give a transform its place in the chain; it does nothing before :meth:`start`.

        Raises:
            ValueError: It cannot work on a parameter that is cut like this one.
        """
        transform.place(self.layout)
        if self.layout.groups and (self.narrow or not transform.invertible):
            raise ValueError(
                f"{self.name!r} is {self.param.dtype} and cut over processes, and a second copy of it, which the "
                f"{transform.kind!r} transform would need, has no place in sharded checkpoints. Keep it in float32 "
                "(`MixedPrecisionPolicy` computes in half precision), or `exclude` it."
            )
        self.chain = sorted([*self.chain, transform], key=lambda t: t.order)
        self._fresh.append(transform)

    def load(self, transform: Transform, state: Mapping[str, Tensor]) -> None:
        """Give a transform of the chain a saved state, as :meth:`saved` returns it: the parameter is ``Ŵ``."""
        own = without_memory(state)
        raw = own.pop("raw", None)
        try:
            if raw is not None and raw.shape != self.param.shape:
                raise ValueError(f"raw weights of shape {tuple(raw.shape)} for {tuple(self.param.shape)}.")
            transform.load_state_dict(own, self.weight)
        except ValueError as error:
            raise ValueError(f"the saved state of {self.name!r} does not fit: {error}") from error
        if transform.theta is not None:
            self.memory[transform.theta] = unpack(state, transform.theta, self.layout)
        self._fresh = [t for t in self._fresh if t is not transform]
        if raw is not None:
            self.raw = raw.to(self.param, copy=True)

    @summed
    def saved(self, transform: Transform) -> Sums[dict[str, Tensor]]:
        """A transform's state, what optimizers remember of its parameter, and ``"raw"`` where ``W`` is kept beside."""
        state: dict[str, Tensor] = dict((yield from steps(transform.state_dict())))
        state |= pack(self.memory.get(transform.theta, {})) if transform.theta is not None else {}
        return state if self.raw is None else state | {"raw": self.raw.clone()}

    @summed
    def start(self) -> Sums[bool]:
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
        fitted: bool = yield from steps(self._fits())
        if not fitted:
            yield from steps(self._rebase())
        if not fresh:
            return fitted
        yield from steps(self.pull(None))
        self.chain = chain
        work = self._work(self.weight)
        for transform in chain:
            if transform in fresh:
                transform.start(work)
            transform.push(work)
        self._settle(work)
        return fitted

    @summed
    def pull(self, grad: Tensor | None) -> Sums[None]:
        """``Ŵ → W`` in place, and ``∂L/∂Ŵ → ∂L/∂W``; of a parameter that is cut, ``grad`` is what is here."""
        weight = self._work(self.weight)
        yield from self._pull(weight, grad)
        if self.raw is not None:  # to the bit: W divided out of a few bits, or of zeros, would be another one
            self.param.data.copy_(self.raw)
        elif self.keeps_raw:  # the work was done on a copy
            self.weight.copy_(weight)
        self.pulled = True

    @summed
    def pull_gradient(self, grad: Tensor) -> Sums[None]:
        """``∂L/∂Ŵ → ∂L/∂W``, without rounding a single bit of the parameter."""
        yield from self._pull(self.weight.to(compute_dtype(self.param.dtype), copy=True), grad)

    def _pull(self, weight: Tensor, grad: Tensor | None) -> Sums[None]:
        gradient = None if grad is None else self._work(grad)
        for transform in reversed(self.chain):
            yield from steps(transform.pull(weight, gradient))
        if grad is not None and gradient is not None and gradient is not grad:
            grad.copy_(gradient)

    @summed
    def push(self, advance: bool, follow: bool = False) -> Sums[None]:
        """``W → Ŵ`` in place, after advancing every transform's state, or having it follow a changed ``W``."""
        work = self._work(self.weight)
        for transform in self.chain:
            if advance:
                yield from steps(transform.advance(work))
            elif follow:
                yield from steps(transform.follow(work))
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

    @summed
    def _fits(self) -> Sums[bool]:
        """Whether the present weights can have come from the present state of the chain."""
        dtype = compute_dtype(self.param.dtype)
        work = self.weight.to(dtype, copy=True)
        if self.raw is not None:
            made = self.raw.to(dtype, copy=True)
            for transform in self.chain:
                transform.push(made)
            # Another device may round differently.
            info = torch.finfo(self.param.dtype)
            made = made.to(self.param.dtype).to(dtype)
            return torch.allclose(made, work, rtol=2 * info.eps, atol=2 * info.eps * info.smallest_normal)
        for transform in reversed(self.chain):  # from the outside in: each judges what it has put out itself
            if not (yield from steps(transform.fits(work, self._tolerance))):
                return False
            yield from steps(transform.pull(work, None))
        return True

    @summed
    def _rebase(self) -> Sums[None]:
        """Take the present weights for the network's, whatever the state was; the function stays as it is."""
        work = self.weight.to(compute_dtype(self.param.dtype), copy=True)
        for transform in reversed(self.chain):
            transform.rebase(work)
            yield from steps(transform.pull(work, None))
        if self.keeps_raw:
            self.raw = work.to(self.param.dtype)
