"""The optimizer boundary: weights are ``W`` inside ``optimizer.step()`` and ``Ŵ`` everywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.weightspace.transform import Transform, compute_dtype


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

    @property
    def narrow(self) -> bool:
        """Whether the parameter is too narrow to be rescaled back and forth without losing bits."""
        return self.param.dtype != compute_dtype(self.param.dtype)

    @property
    def keeps_raw(self) -> bool:
        """Whether ``W`` is kept beside the model because ``Ŵ`` does not determine it."""
        return self.narrow or not all(t.invertible for t in self.chain)

    def insert(self, transform: Transform) -> None:
        """Put a transform in its place of the chain and start it on its input; the parameter becomes ``Ŵ``."""
        self.pull(None)
        self.chain = sorted([*self.chain, transform], key=lambda t: t.order)
        work = self._work(self.param.data)
        for member in self.chain:
            if member is transform:
                member.start(work)
            member.push(work)
        self._settle(work)

    def pull(self, grad: Tensor | None) -> None:
        """``Ŵ → W`` in place, and ``∂L/∂Ŵ → ∂L/∂W``."""
        weight = self._work(self.param.data)
        gradient = None if grad is None else self._work(grad)
        for transform in reversed(self.chain):
            transform.pull(weight, gradient)
        if grad is not None and gradient is not None and gradient is not grad:
            grad.copy_(gradient)
        if self.raw is not None:
            self.param.data.copy_(self.raw)
        elif weight is not self.param.data:
            self.param.data.copy_(weight)
        self.pulled = True

    def push(self, advance: bool) -> None:
        """``W → Ŵ`` in place, after advancing every transform's state if asked to."""
        work = self._work(self.param.data)
        for transform in self.chain:
            if advance:
                transform.advance(work)
            transform.push(work)
        self._settle(work)

    def _settle(self, transformed: Tensor) -> None:
        if self.keeps_raw:
            self.raw = self.param.data.clone() if self.raw is None else self.raw.copy_(self.param.data)
        if transformed is not self.param.data:
            self.param.data.copy_(transformed)
        self.pulled = False

    def _work(self, tensor: Tensor) -> Tensor:
        """The tensor itself where it can be worked on in place, else a copy in the compute dtype."""
        if self.narrow:
            return tensor.to(compute_dtype(tensor.dtype))
        return tensor.clone() if not all(t.invertible for t in self.chain) else tensor

    @property
    def _tolerance(self) -> float:
        return max(1e-3, 8 * torch.finfo(self.param.dtype).eps)

    def fits(self) -> bool:
        """Whether the present weights can have come from the present state of the chain."""
        work = self.param.detach().to(compute_dtype(self.param.dtype), copy=True)
        for transform in reversed(self.chain):
            if not transform.fits(work, self._tolerance):
                return False
            transform.pull(work, None)
        return True

    def rebase(self) -> None:
        """Take the present weights for the network's, whatever the state was; the function stays as it is."""
        work = self.param.detach().to(compute_dtype(self.param.dtype), copy=True)
        for transform in reversed(self.chain):
            if not transform.fits(work, self._tolerance):
                transform.rebase(work)
            transform.pull(work, None)
        if self.keeps_raw:
            self.raw = work.to(self.param.dtype)


class Boundary:
    """Opens and closes the window in which parameters hold ``W``, once per optimizer step.

    Inside Lightning the owner calls :meth:`before_step` from ``on_before_optimizer_step`` (gradients complete and
    unscaled, not yet clipped); in a plain loop the optimizer's own pre-hook does. The post-hook closes the window.
    A step that a ``GradScaler`` skips never opens it.
    """

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}
        self._members: dict[Optimizer, list[Site]] = {}
        self._handles: list[RemovableHandle] = []
        self._in_step: set[Optimizer] = set()
        self._grads_done: set[Optimizer] = set()

    # -- building ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, name: str, param: nn.Parameter, transform: Transform) -> None:
        """Put a transform on a parameter; the parameter then holds ``Ŵ``.

        Raises:
            ValueError: The parameter already has a transform of this kind.
        """
        site = self.sites.get(name) or Site(name, param)
        if any(t.kind == transform.kind for t in site.chain):
            raise ValueError(
                f"{name!r} already has a {transform.kind!r} transform. Two callbacks of one method may not target the "
                "same weight: make their `include`/`exclude` disjoint."
            )
        site.insert(transform)
        self.sites[name] = site

    def adopt(
        self,
        name: str,
        param: nn.Parameter,
        transform: Transform,
        state: Mapping[str, Tensor],
        raw: Tensor | None = None,
    ) -> None:
        """Put a transform with a saved state on a parameter that already holds ``Ŵ``.

        Raises:
            ValueError: The state does not fit the transform; nothing is changed.
        """
        transform.load_state_dict({key: value.to(param.device) for key, value in state.items()})
        site = self.sites.setdefault(name, Site(name, param))
        site.chain = sorted([*site.chain, transform], key=lambda t: t.order)
        if raw is not None:
            site.raw = raw.to(param.device, copy=True)

    def remove(self, name: str, transform: Transform) -> None:
        """Take a transform off a parameter; the parameter keeps its present values."""
        site = self.sites[name]
        site.chain = [t for t in site.chain if t is not transform]
        if not site.chain:
            del self.sites[name]

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Hook the optimizers that hold the parameters.

        Raises:
            ValueError: An optimizer evaluates its closure several times in a step.
        """
        optimizers = list(optimizers)
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                raise ValueError(
                    "LBFGS evaluates the model several times inside one step, while the weights are not the network's. "
                    "Use a first-order optimizer, or switch the weight-space callbacks off (`enabled=False`)."
                )
        self.detach()
        owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
        for optimizer in optimizers:
            members = [site for site in self.sites.values() if owner.get(id(site.param)) is optimizer]
            if members:
                self._members[optimizer] = members
                self._handles.append(optimizer.register_step_pre_hook(self._pre_hook))
                self._handles.append(optimizer.register_step_post_hook(self._post_hook))

    def detach(self) -> None:
        """Take the hooks off the optimizers; the model stays as it is, plain."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._members.clear()
        self._in_step.clear()
        self._grads_done.clear()

    @property
    def attached(self) -> bool:
        """Whether any optimizer is hooked."""
        return bool(self._members)

    def thetas(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Pairs of a transform's parameter and the weight whose learning rate it follows, for one optimizer."""
        for site in self._members.get(optimizer, []):
            for transform in site.chain:
                if transform.theta is not None:
                    yield transform.theta, site.param

    # -- stepping ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Gradients are complete: pull them (and, inside ``step``, the weights) back to ``W``."""
        if optimizer not in self._members:
            return
        if optimizer not in self._in_step:
            # A GradScaler is between unscaling and a step that it may skip: only the gradients may stay pulled back.
            for site in self._pull(optimizer, grads=True):
                site.push(advance=False)
            self._grads_done.add(optimizer)
        elif any(site.pulled for site in self._members[optimizer]):
            self.restore()
            raise RuntimeError(
                f"{type(optimizer).__name__} evaluated its closure twice in one step, and the second evaluation would "
                "have seen weights that are not the network's. Use an optimizer that evaluates the closure once, or "
                "switch the weight-space callbacks off (`enabled=False`)."
            )
        else:
            self._pull(optimizer, grads=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Close the window without a step, for instance after an exception inside it."""
        for members in self._members.values():
            for site in members:
                if site.pulled:
                    site.push(advance=False)
        self._in_step.clear()
        self._grads_done.clear()

    def _pull(self, optimizer: Optimizer, grads: bool) -> list[Site]:
        # Without a gradient the optimizer leaves the parameter alone, and so do we.
        pulled = [site for site in self._members[optimizer] if site.param.grad is not None]
        for site in self._members[optimizer]:
            for transform in site.chain:
                if transform.theta is not None and site.param.grad is None:
                    transform.theta.grad = None
        for site in pulled:
            site.pull(site.param.grad if grads else None)
        return pulled

    @torch.no_grad()
    def _pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # torch passes the optimizer itself as the first positional argument
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            self._in_step.add(optimizer)  # the gradients come later: `before_step` opens the window
        else:
            self._pull(optimizer, grads=optimizer not in self._grads_done)

    @torch.no_grad()
    def _post_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        members = self._members[optimizer]
        ready = any(site.param.grad is not None for site in members)
        if optimizer in self._in_step and ready and not any(site.pulled for site in members):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step(closure) moved the network's weights as if they were the raw ones. "
                "Outside a Lightning Trainer run the closure first and call `step()` without it."
            )
        for site in members:
            if site.pulled:
                site.push(advance=True)
        self._in_step.discard(optimizer)
        self._grads_done.discard(optimizer)
